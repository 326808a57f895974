"""The report page of a fitted head: what it knows, its scores, and held-out images with truth and answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from shared.artifact import write_atomic
from shared.report import Example, Section, gallery, page, table
from stage1_localize.choose import Trier
from stage1_localize.contracts import MAP_SIZE_PX
from stage1_localize.fit_tasks import FitTask, as_picture, batch_of
from stage1_localize.grounders.lite_card import Card
from stage1_localize.grounders.lite_head import LiteHead
from stage1_localize.pictures import Picture, truth_map
from stage1_localize.segmenters.lite_medsam import LiteMedSam

REPORT = "report.html"
PICTURES_MAX = 40
_SCORES = (("dice", "Dice"), ("precision", "box precision"), ("recall", "box recall"), ("f1", "box F1"))


def write_report(
    out: Path,
    card: Card,
    heads: Mapping[int, LiteHead],
    tasks: Sequence[FitTask],
    *,
    quarantined: Mapping[str, int],
    warnings: Sequence[str],
    stop: Callable[[], None],
) -> None:
    """Write ``report.html``.

    Args:
        out: The head's folder.
        card: Of the head.
        heads: Fold -> the head that never saw it.
        tasks: The folds.
        quarantined: Reason -> images left out.
        warnings: What a reader should act upon.
        stop: Called between pictures; what it raises ends the report.
    """
    held_out = sorted(
        ((item, task) for task in tasks for item in task.held_out), key=lambda pair: pair[0].source.sample_id
    )
    places = np.linspace(0, len(held_out) - 1, min(PICTURES_MAX, len(held_out))).round().astype(int)
    segmenter = LiteMedSam(LiteMedSam.Options())
    triers = {fold: Trier(head, segmenter) for fold, head in heads.items()}
    examples = []
    for item, task in (held_out[place] for place in places):
        stop()
        picture = as_picture(item, task.subject)
        examples.append(_example(item.source.sample_id, picture, triers[task.fold], card, Path(task.subject.folder)))
    sections = [
        Section("What this head knows", _words(card), card.not_for_diagnosis, loud=True),
        Section("Scores on held-out images", _scores(card), str(card.fit["scored"])),
        Section(
            "Held-out images: as labelled, and as answered",
            gallery(examples, controls=False),
            f"{len(examples)} of {len(held_out)} images, each answered by a head that was fitted without its group.",
        ),
        Section("Left out and noticed", _left_out(quarantined, warnings)),
    ]
    facts = {
        "images": len(held_out),
        "regions": len(card.concepts),
        "things": sum(card.fit["things"].values()),
        "quarantined": sum(quarantined.values()),
        "steps a fit": card.fit["fit"]["steps"],
    }
    text = page("Head", "Regions learnt from labelled images, found by their words.", sections, facts)
    write_atomic(out / REPORT, text.encode())


def _example(name: str, picture: Picture, trier: Trier, card: Card, folder: Path) -> Example:
    batch = batch_of(picture, folder)
    maps: dict[str, np.ndarray] = {}
    for region, concept in card.concepts.items():
        if region not in picture.boxes and region not in picture.absent:
            continue
        ((_, answered),) = trier.answer(batch, concept.wordings[0], [concept], maps=True)
        assert answered is not None
        maps[f"{region}, labelled"] = _truth(picture, region)
        maps[f"{region}, answered"] = answered
    return Example(name, picture.image, maps)


def _truth(picture: Picture, region: str) -> Float32[np.ndarray, "256 256"]:
    """The outlines, or the boxes where there are none, in the map frame."""
    if region in picture.masks:
        return truth_map(picture.masks[region]).astype(np.float32)
    drawn = np.zeros((MAP_SIZE_PX, MAP_SIZE_PX), np.float32)
    _, height, width = picture.image.shape
    for x0, y0, x1, y1 in picture.boxes.get(region, np.zeros((0, 4))) * (MAP_SIZE_PX / np.array([width, height] * 2)):
        drawn[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = 1
    return drawn


def _words(card: Card) -> str:
    rows = []
    for name, concept in card.concepts.items():
        how = {"mask": "its own map", "component": "boxes of its map's parts, then the segmenter"}
        rows.append((name, ", ".join(concept.wordings), how.get(concept.route, "boxes at centres, then the segmenter")))
    return table(("region", "words", "answered by"), rows)


def _scores(card: Card) -> str:
    rows = []
    for name, scores in card.scores.items():
        cells = [_cell(scores.get(key)) for key, _ in _SCORES]
        silent = f"{scores['false_regions'][0]:.0%} of {scores['images_without']}" if "false_regions" in scores else "–"
        rows.append((name, *cells, f"{scores.get('images', 0)} ({scores.get('groups', 0)})", silent))
    heads = [shown for _, shown in _SCORES]
    return table(("region", *heads, "images (groups)", "found where it is not"), rows)


def _cell(value: Sequence[float] | None) -> str:
    return "–" if value is None else f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def _left_out(quarantined: Mapping[str, int], warnings: Sequence[str]) -> str:
    from shared.page import lines

    body = table(("reason", "images"), sorted(quarantined.items())) if quarantined else ""
    return body + lines(warnings) if body or warnings else '<p class="muted">Nothing was left out; no warnings.</p>'
