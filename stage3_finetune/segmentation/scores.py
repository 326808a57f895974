"""Scores of segmentation: overlap and surface distance, by class and over the classes, with intervals by group.

Each image is scored by itself; a class's score is the mean over images, and the mean over the classes (background is
none) is of those. Where neither truth nor answer has a class, the image says nothing of it: it is left out of that
class's means, and counted. Where one of the two has it, Dice and IoU are 0, and distances do not exist: they are left
out of their means, and counted, so that a mean distance is to be read with that count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from shared.page import table
from shared.report import Section
from stage3_finetune.intervals import Interval, bootstrap
from stage3_finetune.segmentation.drawn import IGNORE
from stage3_finetune.segmentation.surfaces import surface_distances

NAMES = ("dice", "iou", "hd95", "assd")
_SHOWN = {"dice": "Dice", "iou": "IoU", "hd95": "HD95", "assd": "ASSD"}

Measure = Callable[[Int64[np.ndarray, "R N"]], Float[np.ndarray, "R"]]
Pair = tuple[UInt8[np.ndarray, "H W"], UInt8[np.ndarray, "H W"]]
"""Truth and answer of an image, as `stage3_finetune.segmentation.drawn` numbers classes."""


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class, or means over classes.

    Attributes:
        dice: Mean over images of twice the overlap over the sum of both areas.
        iou: Mean over images of the overlap over the union.
        hd95: Mean over images of the 95th percentile Hausdorff distance.
        assd: Mean over images of the average symmetric surface distance.
        shown: Images whose truth has it.
        both_empty: Images in which neither truth nor answer has it.
        one_empty: Images in which one of the two has it.
    """

    dice: Interval
    iou: Interval
    hd95: Interval
    assd: Interval
    shown: int
    both_empty: int
    one_empty: int

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        counts = {name: getattr(self, name) for name in ("shown", "both_empty", "one_empty")}
        return {**{name: dict(vars(getattr(self, name))) for name in NAMES}, **counts}


@dataclass(frozen=True)
class SegmentScores:
    """Scores of one part.

    Attributes:
        mean: Over the classes; its counts are sums.
        by_class: In the order of the classes.
        unit: Of distances: ``mm`` where every image tells its spacing, else ``px``.
        samples: Number of images.
        groups: Number of groups, the unit that was resampled.
        resamples: Resamples drawn.
    """

    mean: ClassScores
    by_class: dict[str, ClassScores]
    unit: str
    samples: int
    groups: int
    resamples: int

    def named(self) -> dict[str, Interval]:
        """Overlap: of all classes, then of each where there are several."""
        told = {"Dice": self.mean.dice, "IoU": self.mean.iou}
        if len(self.by_class) > 1:
            told |= {f"Dice: {name}": found.dice for name, found in self.by_class.items()}
        return told

    def lines(self) -> list[str]:
        """Text for a log or a closing line; every interval says what it stands on."""
        base = f"{self.samples} samples in {self.groups} group{'s' if self.groups != 1 else ''}"
        mean = self.mean
        scores = f"Dice {mean.dice}, IoU {mean.iou}, HD95 {mean.hd95} {self.unit}, ASSD {mean.assd} {self.unit}"
        if mean.one_empty:
            scores += f"; without a distance {mean.one_empty}: found or there, not both"
        return [
            scores,
            f"95 % intervals by group: {base}" if mean.dice.low is not None else f"no intervals: {base}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for a card's metrics."""
        return {
            **self.mean.as_dict(),
            "by_class": {name: found.as_dict() for name, found in self.by_class.items()},
            "classes": list(self.by_class),
            "distance_unit": self.unit,
            "samples": self.samples,
            "groups": self.groups,
            "resamples": self.resamples,
        }

    def sections(self) -> list[Section]:
        """A table by class."""
        distances = [f"{_SHOWN[name]}, {self.unit}" for name in ("hd95", "assd")]
        columns = ("class", "Dice", "IoU", *distances, "images with it", "in neither", "in one only")
        rows: list[tuple[object, ...]] = [(name, *_cells(found)) for name, found in self.by_class.items()]
        if len(rows) > 1:
            rows.append(("mean over classes; sums", *_cells(self.mean)))
        return [Section("Scores by class", table(columns, rows), self.note)]

    @property
    def note(self) -> str:
        """How empty regions count, and what the distances are."""
        return (
            "Means over images, each scored at its own size. An image in which neither truth nor answer has a class "
            "is left out of its means; where one of the two has it, Dice and IoU are 0 and there is no distance. HD95: "
            "the larger of both directed 95th percentiles between surfaces; ASSD: mean distance over both surfaces."
        )


def overlaps(pairs: Iterable[Pair], classes: int) -> Int64[np.ndarray, "N 3 K"]:
    """Pixels of each class in the truth, in the answer, and in both; those to be ignored are in none."""
    return np.array([_counts(truth, found, classes) for truth, found in pairs], np.int64).reshape(-1, 3, classes)


def dice_of(counts: Int64[np.ndarray, "N 3 K"]) -> Float[np.ndarray, "N K"]:
    """Dice; NaN where neither has the class."""
    area = counts[:, 0] + counts[:, 1]
    return np.divide(2 * counts[:, 2], area, out=np.full(area.shape, np.nan), where=area > 0)


def iou_of(counts: Int64[np.ndarray, "N 3 K"]) -> Float[np.ndarray, "N K"]:
    """Intersection over union; NaN where neither has the class."""
    union = counts[:, 0] + counts[:, 1] - counts[:, 2]
    return np.divide(counts[:, 2], union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_over_classes(by_class: Float[np.ndarray, "R K"]) -> Float[np.ndarray, "R"]:
    """Of those that have a value; NaN where none has."""
    known = np.isfinite(by_class)
    total, count = np.where(known, by_class, 0).sum(axis=1), known.sum(axis=1)
    return np.divide(total, count, out=np.full(len(by_class), np.nan), where=count > 0)


def score(
    pairs: Iterable[Pair],
    spacing_mm: Sequence[tuple[float, float] | None],
    group: Sequence[str],
    *,
    classes: Sequence[str],
    seed: int,
    resamples: int,
) -> SegmentScores:
    """Score answers, with 95 % percentile bootstrap intervals over groups.

    Args:
        pairs: Truth and answer of each image; may be made one by one.
        spacing_mm: Of each image's rows and columns, where it is known.
        group: One group name an image.
        classes: The K names.
        seed: Run seed.
        resamples: How many.

    Raises:
        ValueError: No image at all.
    """
    if not group:
        raise ValueError("no sample to score")
    in_mm = all(spacing is not None for spacing in spacing_mm)
    counts, distances = [], []
    for (truth, found), spacing in zip(pairs, spacing_mm, strict=True):
        counts.append(_counts(truth, found, len(classes)))
        unit = spacing if in_mm and spacing is not None else (1.0, 1.0)
        distances.append([_distances(truth, found, number, unit) for number in range(1, len(classes) + 1)])
    told = np.array(counts, np.int64)
    values = {
        "dice": dice_of(told),
        "iou": iou_of(told),
        "hd95": np.array(distances)[:, :, 0],
        "assd": np.array(distances)[:, :, 1],
    }
    one, other = told[:, 0] > 0, told[:, 1] > 0
    counted = [one.sum(axis=0), (~one & ~other).sum(axis=0), (one != other).sum(axis=0)]
    both = partial(bootstrap, group=group, seed=seed, resamples=resamples)

    def scores_of(chosen: list[int]) -> ClassScores:
        dice, iou, hd95, assd = (both(partial(_weighted_mean, values[name][:, chosen]))[0] for name in NAMES)
        shown, both_empty, one_empty = (int(number[chosen].sum()) for number in counted)
        return ClassScores(dice, iou, hd95, assd, shown, both_empty, one_empty)

    by_class = {name: scores_of([k]) for k, name in enumerate(classes)}
    mean = scores_of([*range(len(classes))])
    return SegmentScores(mean, by_class, "mm" if in_mm else "px", len(group), len(set(group)), resamples)


def measures(counts: Int64[np.ndarray, "N 3 K"]) -> dict[str, Measure]:
    """Mean Dice and IoU over the classes, of weighted copies of the images, from their `overlaps`."""
    return {"Dice": partial(_weighted_mean, dice_of(counts)), "IoU": partial(_weighted_mean, iou_of(counts))}


def _counts(truth: UInt8[np.ndarray, "H W"], found: UInt8[np.ndarray, "H W"], classes: int) -> Int64[np.ndarray, "3 K"]:
    known = truth != IGNORE
    one, other = truth[known], found[known]
    parts = (one, other, one[one == other])
    return np.stack([np.bincount(part, minlength=IGNORE + 1)[1 : classes + 1] for part in parts])


def _distances(
    truth: UInt8[np.ndarray, "H W"], found: UInt8[np.ndarray, "H W"], number: int, spacing: tuple[float, float]
) -> tuple[float, float]:
    ignore = truth == IGNORE
    return surface_distances(truth == number, (found == number) & ~ignore, ignore, spacing)


def _weighted_mean(values: Float[np.ndarray, "N K"], weight: Int64[np.ndarray, "R N"]) -> Float[np.ndarray, "R"]:
    """Means over images of R weighted copies of them, and over classes."""
    known = np.isfinite(values)
    total, count = weight @ np.where(known, values, 0), weight @ known.astype(np.int64)
    return mean_over_classes(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def _cells(found: ClassScores) -> tuple[object, ...]:
    return (*(str(getattr(found, name)) for name in NAMES), found.shown, found.both_empty, found.one_empty)
