"""What the head of `lite` must beat: a fixed box where things usually are, and the best threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float32
from scipy import ndimage

from stage1_localize.contracts import MAP_SIZE_PX, Detections
from stage1_localize.evaluate import Answerer, Answers, Case, dice, mask_box

LEVELS = np.arange(5, 100, 5) / 100
AREA_MIN_PX = 24


def mean_box(train: Sequence[Case], concepts: Sequence[str]) -> Answerer:
    """Always the mean training box of the concept, in shares of the image's sides."""
    means = {}
    for concept in concepts:
        boxes = [_boxes(case, concept) / _sides(case) for case in train if _knows(case, concept)]
        means[concept] = np.concatenate(boxes).mean(axis=0)

    def answer(case: Case, texts: Mapping[str, str]) -> Answers:
        return {concept: _filled(case, means[concept][None]) for concept in texts}

    return answer


def best_threshold(train: Sequence[Case], concepts: Sequence[str]) -> Answerer:
    """The grey level, and side of it, with the best mean Dice on the training images; parts give boxes."""
    rules = {}
    for concept in concepts:
        known = [case for case in train if _knows(case, concept)]
        pairs = [(_grey(case), _truth(case, concept)) for case in known]
        scores = {
            (level, bright): np.mean([dice((grey > level) == bright, truth) for grey, truth in pairs])
            for level in LEVELS
            for bright in (True, False)
        }
        rules[concept] = max(scores, key=lambda rule: scores[rule])

    def answer(case: Case, texts: Mapping[str, str]) -> Answers:
        grey = _grey(case)
        return {concept: _parts(case, (grey > rules[concept][0]) == rules[concept][1]) for concept in texts}

    return answer


def _knows(case: Case, concept: str) -> bool:
    return concept in case.masks or concept in case.boxes


def _sides(case: Case) -> np.ndarray:
    return np.array([case.image.shape[2], case.image.shape[1]] * 2)


def _boxes(case: Case, concept: str) -> Float32[np.ndarray, "n 4"]:
    return case.boxes[concept] if concept in case.boxes else mask_box(case.masks[concept], case.image.shape[1:])


def _truth(case: Case, concept: str) -> Bool[np.ndarray, "256 256"]:
    if concept in case.masks:
        return case.masks[concept]
    return _filled(case, case.boxes[concept] / _sides(case))[1] > 0.5


def _grey(case: Case) -> Float32[np.ndarray, "256 256"]:
    """Mean of the channels in the map frame (nearest pixel), stretched to [0, 1]."""
    grey = case.image.mean(axis=0)
    rows, columns = (((np.arange(MAP_SIZE_PX) + 0.5) * side / MAP_SIZE_PX).astype(int) for side in grey.shape)
    grey = grey[np.ix_(rows, columns)]
    return (grey - grey.min()) / max(float(np.ptp(grey)), 1e-6)


def _filled(case: Case, shares: np.ndarray) -> tuple[Detections, Float32[np.ndarray, "256 256"]]:
    region_map = np.zeros((MAP_SIZE_PX, MAP_SIZE_PX), np.float32)
    for x0, y0, x1, y1 in np.rint(np.clip(shares, 0, 1) * MAP_SIZE_PX).astype(int):
        region_map[y0:y1, x0:x1] = 1
    return _detections(shares * _sides(case), np.ones(len(shares))), region_map


def _parts(case: Case, mask: Bool[np.ndarray, "256 256"]) -> tuple[Detections, Float32[np.ndarray, "256 256"]]:
    labels, count = ndimage.label(mask)
    areas = ndimage.sum_labels(mask, labels, np.arange(1, count + 1))
    found = ndimage.find_objects(labels)
    kept = [(found[i], areas[i]) for i in range(count) if areas[i] >= AREA_MIN_PX]
    boxes = np.array([[x.start, y.start, x.stop, y.stop] for (y, x), _ in kept], float).reshape(-1, 4) / MAP_SIZE_PX
    scores = np.array([area / mask.size for _, area in kept])
    return _detections(boxes * _sides(case), scores), mask.astype(np.float32)


def _detections(boxes: np.ndarray, scores: np.ndarray) -> Detections:
    zeros = np.zeros(len(boxes), np.int64)
    return Detections(boxes.astype(np.float32), scores.astype(np.float32), zeros, zeros, [None] * len(boxes))
