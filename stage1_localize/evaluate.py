"""Score a grounder and a segmenter on labelled images: boxes, region maps, and what is found where nothing is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from shared.errors import PromptError
from stage1_localize.boxes import overlaps
from stage1_localize.contracts import Batch, Detections, Grounder, Region, Segmenter
from stage1_localize.fuse import fuse

IOU_MIN = 0.5
RESAMPLES = 1000
Maps = Float32[np.ndarray, "256 256"]


@dataclass(frozen=True)
class Case:
    """One labelled image.

    Attributes:
        group: Unit of resampling.
        image: As a grounder sees it.
        masks: Concept -> truth in the map frame.
        boxes: Concept -> half-open boxes, px of the image; a concept with a mask and no boxes has the mask's own.
        absent: Concepts that are not there.
        ignore: True where the masks' truth is unknown, map frame.
    """

    group: str
    image: Float32[np.ndarray, "C H W"]
    masks: Mapping[str, Bool[np.ndarray, "256 256"]]
    boxes: Mapping[str, Float32[np.ndarray, "n 4"]]
    absent: frozenset[str]
    ignore: Bool[np.ndarray, "256 256"] | None = None


@dataclass
class Tally:
    """One concept's counts, a list entry an image, and the group of each."""

    groups: list[str] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    true: list[int] = field(default_factory=list)
    dice_groups: list[str] = field(default_factory=list)
    dice: list[float] = field(default_factory=list)
    rival_groups: list[str] = field(default_factory=list)
    rival_dice: list[float] = field(default_factory=list)
    absent_groups: list[str] = field(default_factory=list)
    false_region: list[float] = field(default_factory=list)
    false_pixels: list[float] = field(default_factory=list)


Answers = dict[str, tuple[Detections, Maps | None]]
"""Concept -> detections and the region's map, or None where only boxes matter."""
Answerer = Callable[[Case, Mapping[str, str]], Answers]
"""Answers one image, given concept -> wording."""


def evaluate(
    cases: Iterable[Case],
    wordings: Mapping[str, Sequence[str]],
    answer: Answerer,
    *,
    rivals: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Ask every concept that is known of each image, its wordings in turn, and score the answers.

    Args:
        cases: Labelled images.
        wordings: Concept -> wordings; image i is asked the one at i modulo their number.
        answer: What is scored; see `answer_with` and the baselines in ``pipelines.lite_data``.
        rivals: Concept -> the concept whose truth it must not match better than its own.
        seed: Of the bootstrap.

    Returns:
        By concept: ``precision``, ``recall`` and ``f1`` of boxes at IoU .5, mean ``dice`` of maps cut at .5,
        ``rival_dice``, ``false_regions`` and ``false_pixels`` on images without it; each value with its 95 %
        interval by group, and the numbers of images and groups. What does not apply is left out.
    """
    tallies: dict[str, Tally] = defaultdict(Tally)
    for i, case in enumerate(cases):
        known = [concept for concept in wordings if concept in case.masks or concept in case.boxes]
        asked = [*known, *(concept for concept in wordings if concept in case.absent)]
        answers = answer(case, {concept: wordings[concept][i % len(wordings[concept])] for concept in asked})
        for concept in asked:
            found, region_map = answers[concept]
            if concept in known:
                _count_present(tallies[concept], case, concept, found, region_map, (rivals or {}).get(concept))
            else:
                _count_absent(tallies[concept], case, found, region_map)
    return {concept: summarise(tallies[concept], seed) for concept in wordings if concept in tallies}


def answer_with(grounder: Grounder, segmenter: Segmenter, batch_of: Callable[[Case], Batch]) -> Answerer:
    """Answer as a localize job does. A wording that the grounder refuses finds nothing.

    Args:
        grounder: Finds detections; regions asked together do not change one another.
        segmenter: Gives pixels to those without, where the truth has pixels or nothing should be there.
        batch_of: The batch of one image; its memo may hold a cached embedding.
    """

    def answer(case: Case, texts: Mapping[str, str]) -> Answers:
        batch = batch_of(case)
        regions = [Region(concept, (text,)) for concept, text in texts.items()]
        regions = [region for region in regions if _accepted(grounder, region)]
        found = grounder.locate(batch, regions)[0] if regions else Detections.none()
        answers: Answers = {concept: (Detections.none(), np.zeros((256, 256), np.float32)) for concept in texts}
        for r, region in enumerate(regions):
            part = _only(found, r)
            needs_pixels = region.name in case.masks or region.name in case.absent
            answers[region.name] = part, _region_map(batch, part, segmenter) if needs_pixels else None
        return answers

    return answer


def _accepted(grounder: Grounder, region: Region) -> bool:
    try:
        grounder.check([region])
    except PromptError:
        return False
    return True


def _only(found: Detections, region: int) -> Detections:
    kept = np.flatnonzero(found.region == region)
    return Detections(
        box_xyxy_px=found.box_xyxy_px[kept],
        score=found.score[kept],
        region=np.zeros(len(kept), np.int64),
        text=found.text[kept],
        probability=[found.probability[i] for i in kept],
    )


def _region_map(batch: Batch, found: Detections, segmenter: Segmenter) -> Maps:
    given = [p for p in found.probability if p is not None]
    segments = given if len(given) == len(found) else list(segmenter.segment(batch, [found])[0])
    return fuse(found, segments, 1)[0]


def _count_present(
    tally: Tally,
    case: Case,
    concept: str,
    found: Detections,
    region_map: Maps | None,
    rival: str | None,
) -> None:
    truth = case.boxes[concept] if concept in case.boxes else mask_box(case.masks[concept], case.image.shape[1:])
    tally.groups.append(case.group)
    tally.hits.append(match(found, truth))
    tally.found.append(len(found))
    tally.true.append(len(truth))
    if region_map is None or concept not in case.masks:
        return
    tally.dice_groups.append(case.group)
    tally.dice.append(dice(region_map > 0.5, case.masks[concept], case.ignore))
    if rival is not None and rival in case.masks:
        tally.rival_groups.append(case.group)
        tally.rival_dice.append(dice(region_map > 0.5, case.masks[rival], case.ignore))


def _count_absent(tally: Tally, case: Case, found: Detections, region_map: Maps | None) -> None:
    tally.absent_groups.append(case.group)
    tally.false_region.append(float(len(found) > 0))
    tally.false_pixels.append(0.0 if region_map is None else float((region_map > 0.5).mean()))


def dice(
    found: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"], ignore: Bool[np.ndarray, "H W"] | None = None
) -> float:
    """Twice the shared pixels over the sum of both; 1 where both are empty."""
    if ignore is not None:
        found, truth = found & ~ignore, truth & ~ignore
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else 1.0


def match(found: Detections, truth: Float32[np.ndarray, "m 4"]) -> int:
    """How many boxes are hit: by descending score, each takes the best free true box at IoU .5 or more."""
    return int(hits_of(found.box_xyxy_px, found.score, truth).sum())


def hits_of(
    boxes: Float32[np.ndarray, "n 4"], score: Float32[np.ndarray, "n"], truth: Float32[np.ndarray, "m 4"]
) -> Bool[np.ndarray, "n"]:
    """Which boxes are hits: by descending score, each takes the best free true box at IoU .5 or more."""
    iou = overlaps(boxes, truth)
    hits = np.zeros(len(boxes), bool)
    for i in np.argsort(-score, kind="stable"):
        if iou.shape[1] and iou[i].max() >= IOU_MIN:
            iou[:, iou[i].argmax()] = -1
            hits[i] = True
    return hits


def mask_box(mask: Bool[np.ndarray, "256 256"], shape: tuple[int, ...]) -> Float32[np.ndarray, "n 4"]:
    """The box around a mask of the map frame, in px of an image of ``shape`` (H, W); none for an empty mask."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return np.zeros((0, 4), np.float32)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / mask.shape[0]
    return (box * np.array([shape[1], shape[0]] * 2))[None].astype(np.float32)


def summarise(tally: Tally, seed: int) -> dict[str, Any]:
    """Values with 95 % intervals from a bootstrap over groups."""
    result: dict[str, Any] = {}
    if tally.groups:
        counts = np.array([tally.hits, tally.found, tally.true], float).T
        scores = bootstrap(counts, tally.groups, _box_scores, seed)
        result |= dict(zip(("precision", "recall", "f1"), scores, strict=True))
        result |= {"images": len(tally.groups), "groups": len(set(tally.groups))}
    if tally.dice:
        result["dice"] = _mean(tally.dice, tally.dice_groups, seed)
    if tally.rival_dice:
        result["rival_dice"] = _mean(tally.rival_dice, tally.rival_groups, seed)
    if tally.false_region:
        result["false_regions"] = _mean(tally.false_region, tally.absent_groups, seed)
        result["false_pixels"] = _mean(tally.false_pixels, tally.absent_groups, seed)
        result["images_without"] = len(tally.absent_groups)
    return result


def _mean(values: Sequence[float], groups: Sequence[str], seed: int) -> list[float]:
    columns = np.array([values, np.ones(len(values))]).T
    return bootstrap(columns, groups, lambda sums: sums[:, :1] / np.maximum(sums[:, 1:], 1e-9), seed)[0]


def _box_scores(sums: np.ndarray) -> np.ndarray:
    hits, found, true = np.maximum(sums, 1e-9).T
    return np.stack([hits / found, hits / true, 2 * hits / (found + true)], axis=1)


def bootstrap(
    columns: np.ndarray, groups: Sequence[str], score: Callable[[np.ndarray], np.ndarray], seed: int
) -> list[list[float]]:
    """[value, low, high] of each score of the column sums, resampling whole groups."""
    names, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, index, columns)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    low, high = np.quantile(score(times @ sums), (0.025, 0.975), axis=0)
    value = score(sums.sum(axis=0, keepdims=True))[0]
    return [[round(float(v), 4) for v in triple] for triple in zip(value, low, high, strict=True)]
