"""The page that opens after a chain: what the tool did to some images, the scores, the audit, the lineage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.artifact import Card
from shared.figures import hero
from shared.report import ONE_BRAIN, Example, Made, tour_report
from shared.runlog import read_metrics

if TYPE_CHECKING:
    from pipelines.chain import Summary

_ARMS = {"finetuned": "from the encoder", "scratch": "from scratch"}
_SCORES = {
    ("accuracy",): "accuracy",
    ("balanced_accuracy",): "balanced accuracy",
    ("auroc",): "AUROC",
    ("mask", "ap"): "MaskAP",
    ("box", "ap"): "BoxAP",
    ("dice",): "Dice",
    ("iou",): "IoU",
}
"""Where a score stands on a model's card -> its name; each task has scores of its own."""
_SHARES = {"hidden_inside_share": "inside", "hidden_outside_share": "outside", "hidden_share": "overall"}
_AT_ONCE_S = 0.3
"""What took less was there already."""
_Series = dict[str, tuple[list[float], list[float]]]


def chain_report(out: Path, summary: Summary, *, template: bool) -> str:
    """Write the page of a finished chain.

    Args:
        out: The chain's folder.
        summary: What was made.
        template: The corpus is the packaged template: the page says what that can show.

    Returns:
        HTML.
    """
    cards = summary.cards
    arms = {label: cards[name] for name, label in _ARMS.items() if name in cards}
    classes = max((card.identity.outputs["classes"] for card in arms.values()), default=1)
    outputs = cards["regions"].identity.outputs
    return tour_report(
        prompts=prompts(cards["regions"]),
        examples=_examples(out) if "encoder" in cards else [],
        curves=_curves(out, {"loss": "loss"}, "step"),
        hidden=_curves(out, _SHARES, "epoch"),
        arms={label: _rows(card) for label, card in arms.items()},
        audit=summary.audit.get("rows", ()),
        made=[
            Made(
                name,
                card.identity.kind,
                card.artifact_id,
                [item.artifact_id for item in card.identity.inputs],
                _seconds(summary, name),
            )
            for name, card in cards.items()
        ],
        again=["mwm run tour", "mwm audit OUT --level masks", "mwm inspect OUT/regions", "mwm localize --help"],
        facts={
            "images": outputs["samples"],
            "left out": outputs["quarantined"],
        },
        chance={"accuracy": 1 / classes, "balanced accuracy": 1 / classes, "AUROC": 0.5},
        quarantined=outputs.get("quarantine_reasons"),
        note=ONE_BRAIN if template else "",
    )


def _seconds(summary: Summary, name: str) -> float | None:
    """How long an artifact took; None where it was there already."""
    steps = {"regions": "localize", "encoder": "pretrain"}
    took = summary.arm_seconds.get(name, summary.seconds.get(steps.get(name, name)))
    return took if took is not None and took >= _AT_ONCE_S else None


def opening_picture(out: Path, region: str, index: int) -> bytes:
    """The picture that opens the README, as PNG, from a finished chain.

    Args:
        out: The chain's folder.
        region: Whose words and map are shown.
        index: Which of the encoder's examples.
    """
    from shared.artifact import read_card

    item = _examples(out)[index]
    asked = prompts(read_card(out / "regions", "region-store"))
    assert item.hidden is not None
    assert item.reconstruction is not None
    return hero(item.image, {region: asked[region]}, {region: item.maps[region]}, item.hidden, item.reconstruction)


def prompts(card: Card) -> dict[str, list[str]]:
    """Region -> its wordings, from a region store's card."""
    return {item["name"]: item["texts"] for item in card.identity.spec["regions"]}


def _examples(out: Path) -> list[Example]:
    from stage2_pretrain.pictures import read_examples

    # The image with most to see in it first: it tells the story.
    return sorted(
        read_examples(out / "encoder"), key=lambda item: -sum(float(part.sum()) for part in item.maps.values())
    )


def _curves(out: Path, names: dict[str, str], axis: str) -> _Series:
    found: _Series = {}
    for row in read_metrics(out / "encoder"):
        for name, label in names.items():
            if axis in row and row.get(name) is not None:
                x, y = found.setdefault(label, ([], []))
                x.append(row[axis])
                y.append(row[name])
    return found


def _rows(card: Card) -> list[tuple[str, float, float, float]]:
    """Scores with intervals; a score without one (a single group) is left to the model's own report."""
    test = card.provenance.metrics["test"]
    found = {label: _at(test, place) for place, label in _SCORES.items()}
    return [
        (label, score["value"], score["low"], score["high"])
        for label, score in found.items()
        if score.get("low") is not None
    ]


def _at(scores: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any]:
    for key in place:
        scores = scores.get(key) or {}
    return scores
