"""A region store scores itself on labelled images: overlap, boxes, coverage, calibration, and false finds.

No threshold is chosen on the labels: maps count at 0.5 and every detection counts. The labels are read, never stored.
An image without an annotation of a region says nothing of it, unless the caller declares the labels exhaustive.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from shared.coco import Labelled, Thing
from shared.region_layout import HALF
from shared.regions import RegionStore, decode_boxes
from stage1_localize.evaluate import bootstrap, hits_of
from stage1_localize.score_labels import Truth, true_pixels

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
BINS = 10
_RESAMPLES_AP = 200
_LEVELS = np.arange(255)


@dataclass(frozen=True)
class Measured:
    """One image and region, as far as pictures need it."""

    row: int
    dice: float


@dataclass
class _Tally:
    """Columns of sums: an entry an image, and the group of each."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    groups: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, group: str, values: Any) -> None:
        self.columns[name].append(np.atleast_1d(np.asarray(values, float)))
        self.groups[name].append(group)


def score_store(
    store: RegionStore, truth: Truth, *, exhaustive: bool = False, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Measured]]]:
    """Compare every labelled row with its labels.

    Args:
        store: Its maps and boxes as published.
        truth: From `join_labels`.
        exhaustive: An image of the labels without an annotation of a region does not hold it.
        seed: Of the bootstrap.

    Returns:
        By region, scores as ``[value, low, high]`` with 95 % intervals from resampled groups, counts and curves; and
        by region the images with their Dice. What does not apply is left out:
        ``dice``, ``iou``, ``soft_dice`` (2 sum p y / (sum p + sum y)): means over images;
        ``found_share`` of true pixels in the map, ``outside_share`` of the map out of the truth (images with a map);
        ``coverage`` and ``true_coverage``: share of the image; ``precision``, ``recall``, ``f1``,
        ``average_precision`` of boxes at IoU .5; ``pixel_ece``, ``pixel_brier``, ``box_ece``, ``box_brier``;
        ``false_regions`` and ``false_pixels`` on images without the region.
    """
    tallies = {region: _Tally() for region in truth.categories}
    detections: dict[str, list[tuple[str, float, bool]]] = {region: [] for region in truth.categories}
    counts: dict[str, dict[str, int]] = {region: defaultdict(int) for region in truth.categories}
    images: dict[str, list[Measured]] = {region: [] for region in truth.categories}
    height, width = store.grid
    for row, item in truth.rows.items():
        maps = store.maps([row])[0]
        boxes, scores, owners = store.boxes(row)
        decoded, confidence = decode_boxes(boxes), scores.astype(np.float32) / np.float32(65535)
        group = store.samples[row].group or store.samples[row].sample_id
        ignored = [thing for thing in item.things if thing.region in truth.ignored]
        counted = ~true_pixels(ignored, item, (height, width))
        for region, categories in truth.categories.items():
            things = [thing for thing in item.things if thing.region in categories]
            if item.unknown & set(categories) or not (things or exhaustive):
                counts[region]["images_unknown"] += 1
                continue
            place = store.regions.index(region)
            own = owners == place
            tally = tallies[region]
            counts[region]["images" if things else "images_without"] += 1
            kept, hits = _hits(decoded[own], confidence[own], things, ignored)
            detections[region] += [(group, float(s), bool(h)) for s, h in zip(confidence[own][kept], hits, strict=True)]
            tally.add("boxes", group, (hits.sum(), kept.sum(), len(things)))
            if not things:
                tally.add("false_regions", group, float(kept.any()))
            if truth.outlined(region):
                dice = _pixels(tally, group, maps[place], things, item, counted)
                if dice is not None:
                    images[region].append(Measured(row, dice))
    return {
        region: _summary(tallies[region], detections[region], counts[region], seed) for region in truth.categories
    }, images


def _hits(
    boxes: Float32[np.ndarray, "n 4"],
    score: Float32[np.ndarray, "n"],
    things: Sequence[Thing],
    ignored: Sequence[Thing],
) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "m"]]:
    """Detections that count, and which of those are hits; one that lies by half in an ignored box is left out."""
    hits = hits_of(boxes, score, _boxes(things))
    area = np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-9)
    inside = np.zeros(len(boxes))
    for box in _boxes(ignored):
        shared = np.clip(np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]), 0, None).prod(axis=1)
        inside = np.maximum(inside, shared / area)
    kept = hits | (inside < 0.5)
    return kept, hits[kept]


def _boxes(things: Sequence[Thing]) -> Float32[np.ndarray, "n 4"]:
    return np.array([thing.box_xyxy_px for thing in things], np.float32).reshape(-1, 4)


def _pixels(
    tally: _Tally,
    group: str,
    stored: UInt8[np.ndarray, "h w"],
    things: Sequence[Thing],
    item: Labelled,
    counted: Bool[np.ndarray, "h w"],
) -> float | None:
    """Count the pixels of one map; its Dice, or None where there is nothing to overlap with."""
    true = true_pixels(things, item, (stored.shape[0], stored.shape[1]))[counted]
    values = stored[counted]
    every = np.bincount(values, minlength=255)[:255]
    inside = np.bincount(values[true], minlength=255)[:255]
    tally.add("calibration", group, _calibration(_LEVELS / 254, every, inside))
    pixels = max(1, len(values))
    above = every[::-1].cumsum()[::-1]  # pixels at this level or more
    shared = inside[::-1].cumsum()[::-1]
    if not things:
        tally.add("false_pixels", group, above[HALF] / pixels)
        return None
    total = int(true.sum())
    if not total:  # ignored as a whole, or lost between map pixels: finding nothing is no merit here
        return None
    both, found = int(shared[HALF]), int(above[HALF])
    dice = _ratio(2 * both, found + total)
    tally.add("dice", group, dice)
    tally.add("iou", group, _ratio(both, found + total - both))
    tally.add("soft_dice", group, _ratio(float(2 * (_LEVELS @ inside) / 254), float((_LEVELS @ every) / 254 + total)))
    tally.add("coverage", group, found / pixels)
    tally.add("true_coverage", group, total / pixels)
    tally.add("found_share", group, both / total)
    if found:
        tally.add("outside_share", group, 1 - both / found)
    levels = [int(np.floor(254 * np.float32(t) + np.float32(0.5))) for t in THRESHOLDS]
    tally.add("dice_by_threshold", group, [_ratio(2 * int(shared[k]), int(above[k]) + total) for k in levels])
    return dice


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0


def _calibration(probability: Float[np.ndarray, "n"], every: Any, true: Any) -> Float[np.ndarray, "columns"]:
    """Sums of a reliability diagram: count, probability and truth of each bin, then the squared error."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    sums = [np.bincount(bins, weights, BINS) for weights in (every, every * probability, true)]
    squared = float((probability**2 * every).sum() - 2 * (probability * true).sum() + np.sum(true))
    return np.concatenate([*sums, [squared]])


def _reliability(sums: Float[np.ndarray, "r columns"]) -> Float[np.ndarray, "r 2"]:
    """Expected calibration error and Brier score of sums that `_calibration` gives."""
    count, said, true = (sums[:, k * BINS : (k + 1) * BINS] for k in range(3))
    total = np.maximum(count.sum(axis=1), 1e-9)
    return np.stack([np.abs(said - true).sum(axis=1) / total, sums[:, -1] / total], axis=1)


def _diagram(sums: Float[np.ndarray, "columns"]) -> list[list[float]]:
    """``[mean probability, share that is true, count]`` of each bin that holds something."""
    count, said, true = (sums[k * BINS : (k + 1) * BINS] for k in range(3))
    return [
        [round(float(s / n), 4), round(float(t / n), 4), int(n)]
        for n, s, t in zip(count, said, true, strict=True)
        if n > 0
    ]


def _summary(
    tally: _Tally, detections: Sequence[tuple[str, float, bool]], counts: dict[str, int], seed: int
) -> dict[str, Any]:
    result: dict[str, Any] = {name: counts[name] for name in ("images", "images_without", "images_unknown")}
    result["groups"] = len({group for groups in tally.groups.values() for group in groups})

    def values(name: str, score: Callable[[np.ndarray], np.ndarray]) -> list[list[float]]:
        return bootstrap(np.array(tally.columns[name]), tally.groups[name], score, seed)

    for name in ("dice", "soft_dice", "iou", "found_share", "outside_share", "coverage", "true_coverage"):
        if name in tally.columns:
            result[name] = _mean(tally, name, seed)[0]
    if result["images"]:
        result |= dict(zip(("precision", "recall", "f1"), values("boxes", _box_scores), strict=True))
        result["average_precision"] = _average_precision(detections, tally, seed)
    if "calibration" in tally.columns:
        result |= dict(zip(("pixel_ece", "pixel_brier"), values("calibration", _reliability), strict=True))
        result["pixel_reliability"] = _diagram(np.sum(tally.columns["calibration"], axis=0))
    if detections:
        columns = np.array([_calibration(np.array([s]), np.ones(1), np.array([float(h)])) for _, s, h in detections])
        groups = [group for group, _, _ in detections]
        result |= dict(zip(("box_ece", "box_brier"), bootstrap(columns, groups, _reliability, seed), strict=True))
        result["box_reliability"] = _diagram(columns.sum(axis=0))
        result["box_scores"] = np.histogram([s for _, s, _ in detections], 20, (0, 1))[0].tolist()
    for name in ("false_regions", "false_pixels"):
        if name in tally.columns:
            result[name] = _mean(tally, name, seed)[0]
    if "dice_by_threshold" in tally.columns:
        curve = _mean(tally, "dice_by_threshold", seed)
        result["dice_by_threshold"] = [[t, *value] for t, value in zip(THRESHOLDS, curve, strict=True)]
    return result


def _mean(tally: _Tally, name: str, seed: int) -> list[list[float]]:
    columns = np.array(tally.columns[name])
    columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    return bootstrap(columns, tally.groups[name], lambda s: s[:, :-1] / np.maximum(s[:, -1:], 1e-9), seed)


def _box_scores(sums: np.ndarray) -> np.ndarray:
    """Precision, recall, F1; nothing found is a precision of 0."""
    hits, found, true = sums.T
    return np.stack([a / np.maximum(b, 1e-9) for a, b in ((hits, found), (hits, true), (2 * hits, found + true))], 1)


def _average_precision(detections: Sequence[tuple[str, float, bool]], tally: _Tally, seed: int) -> list[float]:
    """Mean over 101 recalls of the best precision at that recall or more, detections of all images by score."""
    names, index = np.unique(tally.groups["boxes"], return_inverse=True)
    true = np.zeros(len(names))
    np.add.at(true, index, np.array(tally.columns["boxes"])[:, 2])
    score = np.array([s for _, s, _ in detections])
    order = np.argsort(-score, kind="stable")
    owner = np.searchsorted(names, np.array([group for group, _, _ in detections], dtype=names.dtype))[order]
    hit = np.array([h for _, _, h in detections], float)[order]
    # Detections of one score come together: their order among themselves means nothing.
    last = np.flatnonzero(np.diff(score[order], append=-1.0)) if len(score) else np.zeros(0, int)

    def once(times: np.ndarray) -> float:
        weights = times[owner]
        hits, found = np.cumsum(weights * hit)[last], np.cumsum(weights)[last]
        recall = hits / max(float(times @ true), 1e-9)
        precision = np.maximum.accumulate((hits / np.maximum(found, 1e-9))[::-1])[::-1]
        place = np.searchsorted(recall, np.linspace(0, 1, 101) - 1e-12)
        return float(np.append(precision, 0.0)[np.minimum(place, len(precision))].mean())

    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES_AP)
    low, high = np.quantile([once(times.astype(float)) for times in drawn], (0.025, 0.975))
    return [round(value, 4) for value in (once(np.ones(len(names))), float(low), float(high))]
