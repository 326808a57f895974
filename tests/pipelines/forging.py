"""Cards of a real study, changed in memory: each change must be told from what the study asks, or be its right."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.study_check import run_differences
from pipelines.study_config import StudyConfig
from pipelines.study_plan import Run, plan, run_settings
from pipelines.study_summary import run_cards
from shared.artifact import Card
from shared.config import spec as config_spec
from shared.config import validate

Cards = dict[Run, dict[str, Card]]
UNIFORM, SCRATCH = Run("discs", 0, 0, "uniform"), Run("discs", 0, 0, "scratch")
FIRST = "discs/round-0/fold-0/scratch/full"


def changed(cards: Cards, run: Run, made: str, section: str, *path: str, value: object) -> Cards:
    """One entry of one card, in ``spec``, ``outputs`` or ``inputs``."""
    body = cards[run][made].model_dump(mode="json")
    place = body["identity"]
    for key in (section, *path)[:-1]:
        place = place[key]
    place[(section, *path)[-1]] = value
    return {**cards, run: {**cards[run], made: Card.model_validate(body)}}


def assert_a_run_of_other_settings_is_found(out: Path, recipe: Mapping[str, Any]) -> None:
    """Every setting that a study gives, another on one card; other labels, options, store or encoder too."""
    study = validate(StudyConfig, recipe)
    cards: Cards = {run: run_cards(study, run, out) for run in plan(study)}

    def said(made: str, *path: str, value: object) -> list[str]:
        return [text for _, text in run_differences(study, changed(cards, UNIFORM, made, *path, value=value), out)]

    assert list(run_differences(study, cards, out)) == []
    tried = 0
    for made, settings in run_settings(study, UNIFORM, out).items():
        spec = cards[UNIFORM][made].identity.spec
        for key, wanted in config_spec(settings).items():
            if made != "encoder" and key in ("backbone", "backbone_options", "channels"):
                continue  # the encoder's
            name = "dtype" if (made, key) == ("encoder", "precision") else key
            places = [("spec",), ("spec", "mask"), ("spec", "numeric")] if made == "encoder" else [("spec", "config")]
            known = {("spec",): spec, **{("spec", part): spec.get(part, {}) for part in ("mask", "numeric", "config")}}
            place = next((place for place in places if name in known[place]), ("spec",))
            nested = key in ("policy", "method")
            found = said(
                made, *place, name, value={"name": "another", "options": {}, "version": 1} if nested else "another"
            )
            left_open = key in ("impl", "subset") or wanted == "auto"
            assert bool(found) != left_open, (made, key)
            tried += not left_open
    assert tried > 35

    # What the study leaves to its defaults, and what only other runs can tell.
    assert said("encoder", "spec", "mask", "schedule", "first", value={"hide": 100})[0].startswith(
        "encoder: schedule: "
    )
    assert said("encoder", "spec", "method", "patch_px", value=4)[0].startswith("encoder: method: ")
    drop = said("encoder", "spec", "backbone_options", "drop_path_rate", value="0.3")
    assert drop[0].startswith("encoder: backbone_options: ")
    assert said("encoder", "spec", "mask", "seed", value=7)[0].startswith("encoder: seed of its masks: 7 there")
    assert said("encoder", "spec", "rows", value=None)[0].startswith("encoder: rows: all of the store")
    assert said("full", "spec", "config", "options", "mixup_milli", value=200)[0].startswith("full: options: ")
    assert said("full", "spec", "weights", value={"source": "timm"}) == ["full: weights: of timm there, none asked"]
    assert said("full", "spec", "labels", "sha256", value="0") == [f"full: labels: not what {FIRST} has"]
    assert said("full", "spec", "images", "sha256", value="0") == [f"full: images: not what {FIRST} has"]
    assert said("full", "spec", "version", "task", value=9) == [f"full: versions: not what {FIRST} has"]
    assert said("full", "inputs", value=[])[0].startswith("full: encoder: None there")
    store = {("discs", "localized"): "0" * 64}
    told = next(text for _, text in run_differences(study, cards, out, store))
    assert told == "encoder: region store: not what the store of this study has"
    folds = {run.fold: own["full"] for run, own in cards.items() if run.arm == "scratch"}
    swapped = {run: {**own, "full": folds[0]} if run.arm == "scratch" else own for run, own in cards.items()}
    found = [text for _, text in run_differences(study, swapped, out)]
    assert f"full: labels of a fold: the same as {FIRST} has" in found
    assert any(text.startswith("full: seed: 0 there, 1 asked") for text in found)


def assert_encoders_are_compared_with_each_other(out: Path, recipe: Mapping[str, Any]) -> None:
    """A second arm of the same cards: what one of its encoders alone has, or has in common with another fold."""
    uniform = recipe["arms"]["uniform"]
    study = validate(StudyConfig, {**recipe, "arms": {**recipe["arms"], "again": uniform}})
    cards: Cards = {run: run_cards(study, run, out) for run in plan(study)}
    for run in cards:
        if run.arm == "again":
            cards[run] = cards[Run("discs", 0, run.fold, "uniform")]
    assert list(run_differences(study, cards, out)) == []
    again = Run("discs", 0, 0, "again")

    def said(*path: str, value: object) -> list[str]:
        return [text for _, text in run_differences(study, changed(cards, again, "encoder", *path, value=value), out)]

    first = "discs/round-0/fold-0/uniform/encoder"
    for path, name in (
        (("spec", "rows"), "rows"),
        (("outputs", "samples"), "samples"),
        (("outputs", "witness_names"), "samples"),
        (("outputs", "steps"), "steps"),
        (("spec", "mask", "steps"), "steps"),
        (("spec", "mask", "policy", "version"), "version of the policy"),
        (("spec", "mask", "views"), "views"),
        (("spec", "mask", "bits_version"), "versions"),
        (("spec", "mask", "window_version"), "versions"),
        (("spec", "loop_version"), "versions"),
        (("spec", "method", "version"), "versions"),
    ):
        assert said(*path, value=99) == [f"encoder: {name}: not what {first} has"], path
    both = cards
    for arm in ("uniform", "again"):
        rows = cards[UNIFORM]["encoder"].identity.spec["rows"]
        both = changed(both, Run("discs", 0, 1, arm), "encoder", "spec", "rows", value=rows)
    found = [text for _, text in run_differences(study, both, out)]
    assert found == [f"encoder: rows of a fold: the same as {first} has"] * 2
    outlines = {"discs": {**recipe["corpora"]["discs"], "outlines": "outlines.json"}}
    arms = {**recipe["arms"], "again": {**uniform, "store": "oracle"}}
    other = validate(StudyConfig, {**recipe, "corpora": outlines, "arms": arms})
    found = [text for _, text in run_differences(other, cards, out)]
    assert found == [f"encoder: region store: the same as {first} has"] * 2


def assert_what_a_stage_decides_is_its_right(out: Path, recipe: Mapping[str, Any]) -> None:
    """Arms with other encoders, a ViT's size, neighbours that train nothing: none of it is a difference."""
    options = {"output_stride": 16}
    uniform = {"pretrain": {**recipe["arms"]["uniform"]["pretrain"], "backbone_options": options}}
    study = validate(StudyConfig, {**recipe, "arms": {**recipe["arms"], "uniform": uniform}})
    cards: Cards = {run: run_cards(study, run, out) for run in plan(study)}
    for run in [run for run in cards if run.arm == "uniform"]:
        cards = changed(cards, run, "encoder", "spec", "backbone_options", value=options)
        cards = changed(cards, run, "full", "spec", "config", "backbone_options", value=options)
    assert list(run_differences(study, cards, out)) == []
    place = ("spec", "config", "backbone_options")
    sized = [changed(cards, SCRATCH, "full", *place, value={"img_size": size_px}) for size_px in (64, 32)]
    assert [len(list(run_differences(study, one, out))) for one in sized] == [0, 1]
    discs = {**recipe["corpora"]["discs"], "endpoints": {"full": {"finetune": {"options": {"head": "knn"}}}}}
    neighbours = validate(StudyConfig, {**recipe, "arms": study.model_dump()["arms"], "corpora": {"discs": discs}})
    for run in list(cards):
        for key, value in (("freeze", True), ("options", {**cards[run]["full"].identity.spec["config"]["options"]})):
            change = {**value, "head": "knn", "k": 5} if isinstance(value, dict) else value
            cards = changed(cards, run, "full", "spec", "config", key, value=change)
    assert list(run_differences(neighbours, cards, out)) == []
    trained = changed(cards, SCRATCH, "full", "spec", "config", "freeze", value=False)
    assert [text for _, text in run_differences(neighbours, trained, out)] == ["full: freeze: False there, True asked"]
