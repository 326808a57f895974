"""COCO's scores of a detector, with intervals by group.

Average precision (Lin 2014, cocoeval.py): per class and threshold of intersection over union (IoU) from .50 to .95,
answers are matched to things greedily, most sure first; precision is made monotone and read at 101 recalls. Values come
from faster-coco-eval. A resample by groups needs no new matching: an image that is drawn w times counts w times in the
cumulated counts, which is what its w copies would give (equal scores in one image aside, whose order is arbitrary).

Sizes: small is below 32² px, large from 96² px; of the box for BoxAP, of the mask for MaskAP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_masks
from jaxtyping import Bool, Float64, Int64

from shared.page import Section, table
from stage3_finetune.annotations import HUNDREDTHS
from stage3_finetune.instances import Things
from stage3_finetune.intervals import RESAMPLES, Interval, bootstrap_many

IOU = np.linspace(0.5, 0.95, 10)
RECALL = np.linspace(0.0, 1.0, 101)
ANSWERS_MAX = 100
"""Of an image and class that are scored, the most sure ones."""
_MEASURED = ("ap", "ap50", "ap75", "ar")
_SIZES = ("small", "medium", "large")
_CHUNK = 1 << 22

Measure = Callable[[Int64[np.ndarray, "R N"]], Float64[np.ndarray, "R"]]
Pair = tuple[Things, Things]
"""Truth of an image, and what was found in it."""


@dataclass(frozen=True)
class Matches:
    """Answers of one class in all images, most sure first, and whether each is right.

    Attributes:
        image: Number of its image.
        hit: Whether it is matched, at each threshold of `IOU`.
        things: How many things each image has.
    """

    image: Int64[np.ndarray, "D"]
    hit: Bool[np.ndarray, "T D"]
    things: Int64[np.ndarray, "N"]


@dataclass(frozen=True)
class KindScores:
    """Scores by boxes, or by masks.

    Attributes:
        ap: Mean average precision over classes and IoU .50 to .95.
        ap50: At IoU .50.
        ap75: At IoU .75.
        ar: Mean recall over the same classes and thresholds.
        by_size: AP of small, medium and large things; None where there is none.
        by_class: AP of each class; None where it has no thing.
    """

    ap: Interval
    ap50: Interval
    ap75: Interval
    ar: Interval
    by_size: dict[str, float | None]
    by_class: dict[str, float | None]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        measured = {name: dict(vars(getattr(self, name))) for name in _MEASURED}
        return {**measured, "ap_by_size": self.by_size, "ap_by_class": self.by_class}


@dataclass(frozen=True)
class DetectScores:
    """Scores of one part.

    Attributes:
        box: By boxes.
        mask: By masks, or None.
        things: Of each class.
        samples: Images, negatives included.
        groups: The unit that was resampled.
        resamples: Resamples drawn.
        resamples_undefined: How many of them held no thing; intervals leave them out.
    """

    box: KindScores
    mask: KindScores | None
    things: dict[str, int]
    samples: int
    groups: int
    resamples: int
    resamples_undefined: int

    def _kinds(self) -> list[tuple[str, KindScores]]:
        """The one that models are chosen by first."""
        return [*([] if self.mask is None else [("Mask", self.mask)]), ("Box", self.box)]

    def named(self) -> dict[str, Interval]:
        """Scores by the name that the report gives them."""
        return {f"{kind}{name.upper()}": getattr(found, name) for kind, found in self._kinds() for name in _MEASURED}

    def sections(self) -> list[Section]:
        """AP by class and by size."""
        kinds = self._kinds()
        columns = [f"{kind}AP" for kind, _ in kinds]
        classes = [
            (name, count, *(_told(found.by_class[name]) for _, found in kinds)) for name, count in self.things.items()
        ]
        sizes = [(name, *(_told(found.by_size[name]) for _, found in kinds)) for name in _SIZES]
        body = table(("class", "things", *columns), classes) + "<br>" + table(("size", *columns), sizes)
        note = "Small: below 32² px, large: from 96² px, of the image as it was read. Without intervals."
        return [Section("Average precision by class and by size", body, note)]

    @property
    def note(self) -> str:
        """What the names mean."""
        shapes = "boxes and masks" if self.mask is not None else "boxes only: not every thing was outlined, or so asked"
        return f"AP: average precision as COCO has it, mean over IoU .50 to .95; AR: recall likewise; {shapes}."

    def lines(self) -> list[str]:
        """Text for a log."""
        base = f"{self.samples} samples in {self.groups} group{'s' if self.groups != 1 else ''}"
        base += f", {sum(self.things.values())} things"
        if absent := [name for name, count in self.things.items() if not count]:
            base += f"; without a thing: {', '.join(absent)}"
        told = [f"{kind}AP {found.ap}, at .50 {found.ap50}, recall {found.ar}" for kind, found in self._kinds()]
        return ["; ".join(told), f"95 % intervals by group: {base}" if self._spans() else f"no intervals: {base}"]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for a card's metrics."""
        return {
            "box": self.box.as_dict(),
            "mask": None if self.mask is None else self.mask.as_dict(),
            "things": self.things,
            "samples": self.samples,
            "groups": self.groups,
            "resamples": self.resamples,
            "resamples_undefined": self.resamples_undefined,
        }

    def _spans(self) -> bool:
        return self.box.ap.low is not None


def score(
    pairs: Sequence[Pair],
    group: Sequence[str],
    *,
    classes: Sequence[str],
    masks: bool,
    seed: int,
    resamples: int = RESAMPLES,
) -> DetectScores:
    """Score answers, with 95 % percentile bootstrap intervals over groups.

    Args:
        pairs: Truth and answers of each image.
        group: One group name an image.
        classes: Class names.
        masks: Whether truth and answers have masks.
        seed: Run seed; resamples are a function of it and of the number of groups alone.
        resamples: How many.

    Returns:
        The scores; undefined without any thing, without intervals with fewer than two groups. A class without a thing,
        in the part or in one resample, is left out of that mean over classes.

    Raises:
        ValueError: No image at all.
    """
    if not pairs:
        raise ValueError("no sample to score")
    kinds, undefined = {}, 0
    for kind in ("box", "mask") if masks else ("box",):
        matches = [match(pairs, label, kind) for label in range(len(classes))]
        measured = bootstrap_many(_measure(matches), group, seed=seed, resamples=resamples)
        undefined = measured[0][1]
        ap, ap50, ap75, ar = (interval for interval, _ in measured)
        by_size, by_class = coco_scores(pairs, classes, kind)
        kinds[kind] = KindScores(ap, ap50, ap75, ar, by_size, by_class)
    things = {name: int(sum((truth.labels == k).sum() for truth, _ in pairs)) for k, name in enumerate(classes)}
    return DetectScores(kinds["box"], kinds.get("mask"), things, len(pairs), len(set(group)), resamples, undefined)


def measures(pairs: Sequence[Pair], classes: int, *, masks: bool) -> dict[str, Measure]:
    """AP, at .50 and at .75, and recall, of weighted copies of the images; named as `DetectScores.named`."""
    found: dict[str, Measure] = {}
    for kind in ("mask", "box") if masks else ("box",):
        measure = _measure([match(pairs, label, kind) for label in range(classes)])
        for place, name in enumerate(_MEASURED):
            found[f"{kind.capitalize()}{name.upper()}"] = partial(_column, measure, place)
    return found


def _column(
    measure: Callable[[Int64[np.ndarray, "R N"]], Float64[np.ndarray, "R M"]],
    place: int,
    weight: Int64[np.ndarray, "R N"],
) -> Float64[np.ndarray, "R"]:
    return measure(weight)[:, place]


def at_a_glance(pairs: Sequence[Pair], classes: int, *, masks: bool) -> dict[str, float]:
    """AP and AP at .50 of boxes and, with masks, of masks; NaN without any thing."""
    found: dict[str, float] = {}
    for kind in ("mask", "box") if masks else ("box",):
        values = _measure([match(pairs, label, kind) for label in range(classes)])(np.ones((1, len(pairs)), np.int64))
        found |= {f"{kind}_{name}": float(value) for name, value in zip(_MEASURED[:2], values[0], strict=False)}
    return found


def match(pairs: Sequence[Pair], label: int, kind: str) -> Matches:
    """Match the answers of one class to its things, image by image.

    The most sure answer first; each takes the thing that it overlaps most of those that are left, the later of equals.
    """
    images, scores, hits, counts = [], [], [], []
    for image, (truth, found) in enumerate(pairs):
        assert found.scores is not None
        there = np.flatnonzero(truth.labels == label)
        said = np.flatnonzero(found.labels == label)
        said = said[np.argsort(-found.scores[said], kind="stable")][:ANSWERS_MAX]
        counts.append(len(there))
        images.append(np.full(len(said), image))
        scores.append(found.scores[said])
        hits.append(_take(overlaps(truth, there, found, said, kind)))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit = np.concatenate(hits, axis=1)[:, order]
    return Matches(np.concatenate(images)[order].astype(np.int64), hit, np.array(counts, np.int64))


def overlaps(
    truth: Things, there: Int64[np.ndarray, "G"], found: Things, said: Int64[np.ndarray, "D"], kind: str
) -> Float64[np.ndarray, "D G"]:
    """Intersection over union of chosen answers and things."""
    if not len(there) or not len(said):
        return np.zeros((len(said), len(there)))
    if kind == "box":
        sides: list[Any] = [_xywh(found.boxes[said]), _xywh(truth.boxes[there])]
    else:
        sides = [[_rle(things, index) for index in chosen] for things, chosen in ((found, said), (truth, there))]
    return np.asarray(coco_masks.iou(*sides, [0] * len(there)))


def average_precision(matches: Matches, weight: Int64[np.ndarray, "R N"]) -> Float64[np.ndarray, "R 2 T"]:
    """AP and recall at each threshold, of R weighted copies of N images; NaN where there is no thing."""
    out = np.full((len(weight), 2, len(IOU)), np.nan)
    step = max(1, _CHUNK // max(1, len(matches.image)))
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        out[rows] = _average_precision(matches, weight[rows])
    return out


def _average_precision(matches: Matches, weight: Int64[np.ndarray, "R N"]) -> Float64[np.ndarray, "R 2 T"]:
    out = np.zeros((len(weight), 2, len(IOU)))
    things = weight @ matches.things
    drawn = weight[:, matches.image]
    said = np.cumsum(drawn, axis=1)
    for place, hit in enumerate(matches.hit):
        right = np.flatnonzero(hit)
        if not len(right):
            continue
        taken = np.cumsum(drawn[:, right], axis=1)
        precision = taken / np.maximum(said[:, right], 1)
        best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = taken / np.maximum(things, 1)[:, None]
        # Precision only falls between right answers: the 101 recalls are reached at these alone.
        reached = np.searchsorted(RECALL, recall, side="right")
        newly = np.diff(reached, axis=1, prepend=0)
        out[:, 0, place] = (newly * best_from_here).sum(axis=1) / len(RECALL)
        out[:, 1, place] = recall[:, -1]
    out[things == 0] = np.nan
    return out


def _measure(
    matches: Sequence[Matches],
) -> Callable[[Int64[np.ndarray, "R N"]], Float64[np.ndarray, "R M"]]:
    """AP, AP at .50 and .75, and recall: means over the classes that have a thing."""

    def measure(weight: Int64[np.ndarray, "R N"]) -> Float64[np.ndarray, "R M"]:
        by_class = np.stack([average_precision(one, weight) for one in matches])
        known = np.isfinite(by_class[:, :, 0, 0])[:, :, None, None]
        total = np.where(known, by_class, 0).sum(axis=0)
        mean = np.divide(total, known.sum(axis=0), out=np.full(total.shape, np.nan), where=known.any(axis=0))
        ap, recall = mean[:, 0], mean[:, 1]
        return np.stack([ap.mean(axis=1), ap[:, 0], ap[:, 5], recall.mean(axis=1)], axis=1)

    return measure


def coco_scores(
    pairs: Sequence[Pair], classes: Sequence[str], kind: str
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """AP by size and by class, from faster-coco-eval; None where there is no such thing."""
    found = evaluate(pairs, classes, kind)
    precision = found.eval["precision"]  # [thresholds, recalls, classes, sizes, answers]
    sizes = {name: _mean(precision[:, :, :, place, -1]) for place, name in enumerate(_SIZES, 1)}
    return sizes, {name: _mean(precision[:, :, place, 0, -1]) for place, name in enumerate(classes)}


def evaluate(pairs: Sequence[Pair], classes: Sequence[str], kind: str) -> Any:
    """What faster-coco-eval makes of truth and answers; ``kind`` is ``box`` or ``mask``."""
    truth = {
        "info": {},
        "images": [
            {"id": number, "height": one.size_px[0], "width": one.size_px[1]}
            for number, (one, _) in enumerate(pairs, 1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
        "annotations": _rows([one for one, _ in pairs], kind),
    }
    known = COCO(truth)
    answers = known.loadRes(_rows([found for _, found in pairs], kind))
    evaluation = COCOeval_faster(known, answers, "bbox" if kind == "box" else "segm", rle_iou_max_workers=1)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _rows(images: Sequence[Things], kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, things in enumerate(images, 1):
        for index, box in enumerate(_xywh(things.boxes).tolist()):
            row: dict[str, Any] = {
                "id": len(rows) + 1,
                "image_id": number,
                "category_id": int(things.labels[index]) + 1,
                "iscrowd": 0,
            }
            if kind == "box":
                row |= {"bbox": box, "area": box[2] * box[3]}
            else:
                shape = _rle(things, index)
                row |= {"segmentation": shape, "area": float(coco_masks.area(shape))}
            if things.scores is not None:
                row["score"] = int(things.scores[index]) / 1_000_000
            rows.append(row)
    return rows


def _take(overlap: Float64[np.ndarray, "D G"]) -> Bool[np.ndarray, "T D"]:
    hit = np.zeros((len(IOU), len(overlap)), bool)
    free = np.ones((len(IOU), overlap.shape[1]), bool)
    least = np.minimum(IOU, 1 - 1e-10)
    for place, row in enumerate(overlap):
        if not len(row) or row.max() < least[0]:
            continue
        fits = np.where(free & (row >= least[:, None]), row, -1.0)
        best = fits.shape[1] - 1 - fits[:, ::-1].argmax(axis=1)
        taken = fits[np.arange(len(IOU)), best] >= 0
        hit[taken, place] = True
        free[taken, best[taken]] = False
    return hit


def _xywh(boxes: Int64[np.ndarray, "n 4"]) -> Float64[np.ndarray, "n 4"]:
    corners = boxes / HUNDREDTHS
    return np.ascontiguousarray(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1))


def _rle(things: Things, index: int) -> dict[str, Any]:
    assert things.masks is not None
    return {"size": list(things.size_px), "counts": things.masks[index].encode("ascii")}


def _mean(values: Float64[np.ndarray, "*S"]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _told(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.3f}"
