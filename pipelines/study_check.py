"""Whether a study's runs are what it asks for: an arm trained harder than its baseline, or on other rows, is found.

Runs are commands that can be repeated by hand, with other settings too; what each was made of stands on its card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.study_config import ENCODER, StudyConfig
from pipelines.study_plan import Run, fold_folder, run_settings
from shared.artifact import CARD, Card, read_card
from shared.config import spec as config_spec
from shared.config import validate
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.run import resolve
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.tasks import TASKS

_NOT_ON_CARDS = ("impl", "subset")
"""Implementations give the same bits; of a subset the rows are on the card."""
_ARCHITECTURE = ("backbone", "backbone_options", "channels")


def run_differences(
    config: StudyConfig,
    cards: Mapping[Run, Mapping[str, Card]],
    out: Path,
    stores: Mapping[tuple[str, str], str] | None = None,
) -> Iterator[tuple[Path, str]]:
    """What published runs were made of, where the study asks for something else.

    Args:
        config: The study.
        cards: Of its runs, by what was made.
        out: Its folder.
        stores: Ids of region stores, by corpus and kind, where they are known.

    Yields:
        Folder of a run, and one difference: the setting, what stands on its card and what the study says.

    Raises:
        KeyError, TypeError, ValueError, ConfigError: A card, or the study, is no such thing.
    """
    alike: dict[tuple[Any, ...], tuple[Any, str]] = {
        ("region store", *place): (found, "the store of this study") for place, found in (stores or {}).items()
    }
    unlike: dict[tuple[Any, ...], tuple[Any, str]] = {}
    for run, own in cards.items():
        folder = run.folder(out)
        asked = run_settings(config, run, fold_folder(out, run.corpus, run.round, run.fold)) if own else {}
        for made, card in own.items():
            wanted, told = _asked(asked[made]), _told(card)
            if made != ENCODER and ENCODER in own:  # the architecture is the encoder's
                wanted = {key: value for key, value in wanted.items() if key not in _ARCHITECTURE}
            for key, value in wanted.items():
                if key not in _NOT_ON_CARDS and not _agree(value, told.get(key)):
                    yield folder, f"{made}: {key}: {told.get(key)!r} there, {value!r} asked"
            yield from ((folder, f"{made}: {text}") for text in _start(made, card, own))
            place = f"{folder.relative_to(out)}/{made}"
            for name, value in _must_agree(config, run, made, card).items():
                first = alike.setdefault(name, (value, place))
                if first[0] != value:
                    yield folder, f"{made}: {name[0]}: not what {first[1]} has"
            for name, value in _must_differ(config, run, made, card).items():
                first = unlike.setdefault(name, (value, place))
                if first[0] != value:
                    yield folder, f"{made}: {name[0]}: the same as {first[1]} has"


def store_differences(config: StudyConfig, out: Path) -> Iterator[tuple[Path, str]]:
    """Stores in a study's folder that are called cross-fitted and are not.

    Yields:
        Folder of a store, and why.

    Raises:
        KeyError, MwmError: A card is no such thing.
    """
    for name in config.corpora:
        folder, head = out / name / "cross-fitted", out / name / "head"
        if "cross-fitted" not in config.stores(name) or not (folder / CARD).is_file():
            continue
        identity = read_card(folder, "region-store").identity
        if not identity.spec["grounder"]["identity"].get("cross_fitted"):
            yield folder, "its images were not answered by heads that never saw them"
        fitted = [read_card(head, "head").artifact_id] if (head / CARD).is_file() else []
        if fitted != [item.artifact_id for item in identity.inputs if item.kind == "head"]:
            yield folder, "its head is not the one beside it"


def _asked(settings: PretrainConfig | FinetuneConfig) -> dict[str, Any]:
    """Settings with all that the stage fills in; what depends on machine or labels stays ``auto``."""
    if isinstance(settings, PretrainConfig):
        return {**config_spec(resolve(settings)), "device": settings.device, "threads": settings.threads}
    options = validate(TASKS.load(settings.task).Options, settings.options).model_dump(mode="json")
    neighbours = {"freeze": True} if options.get("head") == "knn" else {}
    return {**config_spec(settings), "options": options, **neighbours}


def _told(card: Card) -> dict[str, Any]:
    """Settings on a card by the names that they have in a recipe."""
    spec = card.identity.spec
    if card.identity.kind == "model":
        told = dict(spec["config"])
        size = {"img_size": told["size_px"]}  # a ViT is told what the recipe says elsewhere
        options = {key: value for key, value in told["backbone_options"].items() if size.get(key) != value}
        return {**told, "backbone_options": options}
    mask, numeric = spec["mask"], spec["numeric"]
    policy = {"name": mask["policy"]["name"], **mask["policy"]["options"]}
    method = {key: value for key, value in spec["method"].items() if key != "version"}
    where = {"device": numeric["device"], "precision": numeric["dtype"], "threads": numeric["threads"]}
    return {**spec, **mask, **where, "policy": policy, "method": method, "seed": spec["seed"]}


def _start(made: str, card: Card, own: Mapping[str, Card]) -> Iterator[str]:
    """What a run was started from, or lacks."""
    spec, inputs = card.identity.spec, {item.role: item.artifact_id for item in card.identity.inputs}
    if made == ENCODER:
        if spec.get("rows") is None:
            yield "rows: all of the store, the fold's training part asked"
        if spec["mask"]["seed"] != spec["seed"]:
            yield f"seed of its masks: {spec['mask']['seed']} there, {spec['seed']} asked"
        return
    start = {ENCODER: own[ENCODER].artifact_id} if ENCODER in own else {}
    if inputs != start:
        yield f"encoder: {inputs.get(ENCODER)} there, {start.get(ENCODER)} beside it"
    if spec.get("weights"):
        yield "weights: of timm there, none asked"


def _must_agree(config: StudyConfig, run: Run, made: str, card: Card) -> dict[tuple[Any, ...], Any]:
    """What runs that are compared have in common, by a name and the runs that share it."""
    spec, outputs, fold = card.identity.spec, card.identity.outputs, (run.corpus, run.round, run.fold)
    if made != ENCODER:
        return {
            ("labels", *fold, made): spec["labels"],
            ("images", *fold, made): spec["images"],
            ("versions", made): spec["version"],
        }
    arm, mask = config.arms[run.arm], spec["mask"]
    return {
        ("region store", run.corpus, arm.store): {i.role: i.artifact_id for i in card.identity.inputs}["regions"],
        ("rows", *fold, arm.store): spec.get("rows"),
        ("samples", *fold): [outputs["samples"], outputs["witness_names"]],
        ("steps", *fold): [outputs["steps"], mask["steps"]],
        ("versions",): [spec["loop_version"], spec["method"]["version"], mask["window_version"], mask["bits_version"]],
        ("version of the policy", mask["policy"]["name"]): mask["policy"]["version"],
        ("views",): mask["views"],
    }


def _must_differ(config: StudyConfig, run: Run, made: str, card: Card) -> dict[tuple[Any, ...], Any]:
    """What no other fold, or kind of store, may have: a name and a value, and whose it is."""
    spec = card.identity.spec
    if made != ENCODER:
        return {("labels of a fold", run.corpus, made, spec["labels"]["sha256"]): (run.round, run.fold)}
    store = {i.role: i.artifact_id for i in card.identity.inputs}["regions"]
    return {
        ("rows of a fold", run.corpus, store, spec.get("rows")): (run.round, run.fold),
        ("region store", run.corpus, store): config.arms[run.arm].store,
    }


def _agree(wanted: Any, told: Any) -> bool:
    """Whether a card holds what was asked for; what was left to the stage may be anything."""
    if isinstance(wanted, Mapping) and isinstance(told, Mapping):
        return wanted.keys() == told.keys() and all(_agree(value, told[key]) for key, value in wanted.items())
    return wanted == "auto" or wanted == told
