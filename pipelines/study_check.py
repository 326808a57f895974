"""Whether a study's runs are what it asks for: an arm trained harder than its baseline, or on other rows, is found.

Runs are commands that can be repeated by hand, with other settings too; what each was made of stands on its card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.study_config import ENCODER, StudyConfig
from pipelines.study_plan import Run, fold_folder, run_settings
from shared.artifact import Card
from shared.config import spec as config_spec

_NOT_ON_CARDS = ("impl", "subset")
"""Implementations give the same bits; of a subset the rows are on the card."""


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
    """
    alike: dict[tuple[str, ...], Any] = {("region store", *place): found for place, found in (stores or {}).items()}
    for run, own in cards.items():
        place, store = (run.corpus, str(run.round), str(run.fold)), config.arms[run.arm].store
        asked = run_settings(config, run, fold_folder(out, run.corpus, run.round, run.fold)) if own else {}
        for made, card in own.items():
            folder, spec = run.folder(out) / made, card.identity.spec
            told = _told(made, spec)
            for key, wanted in config_spec(asked[made]).items():
                if key not in _NOT_ON_CARDS and not _agree(wanted, told.get(key)):
                    yield folder, f"{key}: {told.get(key)!r} there, {wanted!r} asked"
            inputs = {item.role: item.artifact_id for item in card.identity.inputs}
            same: dict[tuple[str, ...], Any] = {}
            if made == ENCODER:
                same["region store", run.corpus, store] = inputs["regions"]
                same["rows", *place, store] = spec.get("rows")
            else:
                same["labels", *place, made] = [spec["labels"], spec["images"]]
                same["settings", run.corpus, made] = {**told, "seed": None}
                start = {ENCODER: own[ENCODER].artifact_id} if ENCODER in own else {}
                if inputs != start:
                    yield folder, f"encoder: {inputs.get(ENCODER)} there, {start.get(ENCODER)} beside it"
            for key, value in same.items():
                if alike.setdefault(key, value) != value:
                    yield folder, f"{key[0]}: others than those of the runs that it is compared with"


def _told(made: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Settings on a card by the names that they have in a recipe."""
    if made != ENCODER:
        return dict(spec["config"])
    mask, numeric = spec["mask"], spec["numeric"]
    policy = {"name": mask["policy"]["name"], **mask["policy"]["options"]}
    where = {"device": numeric["device"], "precision": numeric["dtype"], "threads": numeric["threads"]}
    return {**spec, **mask, **where, "policy": policy, "seed": spec["seed"]}


def _agree(wanted: Any, told: Any) -> bool:
    """Whether a card holds what was asked for; what was left to the stage may be anything."""
    if isinstance(wanted, Mapping) and isinstance(told, Mapping):
        return all(_agree(value, told.get(key)) for key, value in wanted.items())
    return wanted == "auto" or wanted == told
