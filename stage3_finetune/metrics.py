"""Scores of a classifier, with intervals by group.

Every score is a function of R weighted copies of the N samples, so that a bootstrap computes all its resamples at once.
``truth`` and ``predicted`` are bool [N, K]: of one class an image, one is set in each row; of several, any number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int64

from stage3_finetune.class_scores import Calibration, Scores
from stage3_finetune.intervals import RESAMPLES, bootstrap

BINS = 15
"""Of calibration: of equal width, as Guo et al. (ICML 2017)."""
THRESHOLD = 0.5
"""Of several classes, those at it or above are predicted."""

Weight = Int64[np.ndarray, "R N"]
Found = Float[np.ndarray, "R"]
Measure = Callable[[Weight], Found]
"""A score of R weighted copies of N samples; NaN where undefined."""


def score(
    probability: Float[np.ndarray, "N K"],
    label: Int64[np.ndarray, "N"],
    group: Sequence[str],
    *,
    classes: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Scores:
    """Score predictions of one class an image, with 95 % percentile bootstrap intervals over groups.

    A class without a sample, in the part or in one resample, is left out of a mean over classes. The predicted class
    is the first of the most probable ones. Few groups make rough intervals: the number of groups is part of the answer.

    Args:
        probability: Of each class, [0, 1].
        label: True class, 0 <= label < K.
        group: One group name a sample.
        classes: The K names.
        seed: Run seed; resamples are a function of it and of the number of groups alone.
        resamples: How many.

    Returns:
        The scores; intervals are None with fewer than two groups, AUROC is None with fewer than two classes.

    Raises:
        ValueError: No sample at all.
    """
    chosen = probability.argmax(axis=1)
    truth = label[:, None] == np.arange(len(classes))
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (label, chosen), 1)
    surest = probability.max(axis=1, initial=0.0)[:, None]
    return _scores(
        class_measures(probability, label), truth, group, seed, resamples,
        classes=tuple(classes), calibration=calibrate(surest, (chosen == label)[:, None]), confusion=confusion,
        per_class=(),
    )  # fmt: skip


def class_measures(probability: Float[np.ndarray, "N K"], label: Int64[np.ndarray, "N"]) -> dict[str, Measure]:
    """Every score of `score`, of weighted copies."""
    chosen, columns = probability.argmax(axis=1), np.arange(probability.shape[1])
    truth, predicted = label[:, None] == columns, chosen[:, None] == columns
    hit = chosen == label
    surest = probability.max(axis=1, initial=0.0)[:, None]
    return {
        "accuracy": partial(weighted_mean, hit.astype(np.int64)),
        "balanced_accuracy": partial(balanced_accuracy, hit, truth),
        "brier": partial(weighted_mean, squared_error(probability, truth).sum(axis=1) / 2),
        "ece": partial(calibration_error, surest, hit[:, None]),
        **_by_class(probability, truth, predicted),
    }


def score_several(
    probability: Float[np.ndarray, "N K"],
    truth: Bool[np.ndarray, "N K"],
    group: Sequence[str],
    *,
    classes: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Scores:
    """`score` where an image may have any number of classes: each is a question of its own, scores are means over them.

    Accuracy is the share of samples with every class right; balanced accuracy and calibration are means over classes.
    """
    return _scores(
        several_measures(probability, truth), truth, group, seed, resamples,
        classes=tuple(classes), calibration=calibrate(probability, truth), confusion=None,
        per_class=_per_class(probability, truth, probability >= THRESHOLD),
    )  # fmt: skip


def several_measures(probability: Float[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"]) -> dict[str, Measure]:
    """Every score of `score_several`, of weighted copies."""
    predicted = probability >= THRESHOLD
    return {
        "accuracy": partial(weighted_mean, (predicted == truth).all(axis=1).astype(np.int64)),
        "balanced_accuracy": partial(balanced_of_several, predicted, truth),
        "brier": partial(weighted_mean, squared_error(probability, truth).mean(axis=1)),
        "ece": partial(calibration_error, probability, truth),
        **_by_class(probability, truth, predicted),
    }


def _by_class(
    probability: Float[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], predicted: Bool[np.ndarray, "N K"]
) -> dict[str, Measure]:
    return {
        "f1": partial(macro_f1, predicted, truth),
        "auroc": partial(macro_auroc, probability, truth),
        "auprc": partial(macro_auprc, probability, truth),
    }


def _scores(
    measures: dict[str, Measure],
    truth: Bool[np.ndarray, "N K"],
    group: Sequence[str],
    seed: int,
    resamples: int,
    *,
    classes: tuple[str, ...],
    calibration: Calibration,
    confusion: Int64[np.ndarray, "K K"] | None,
    per_class: tuple[dict[str, float | None], ...],
) -> Scores:
    if len(truth) == 0:
        raise ValueError("no sample to score")
    found = {name: bootstrap(measure, group, seed=seed, resamples=resamples) for name, measure in measures.items()}
    return Scores(
        intervals={name: interval for name, (interval, _) in found.items()},
        classes=classes,
        calibration=calibration,
        confusion=confusion,
        per_class=per_class,
        positives=tuple(truth.sum(axis=0).tolist()),
        samples=len(truth),
        groups=len(set(group)),
        resamples=resamples,
        resamples_one_class=found["auroc"][1],
    )


def _per_class(
    probability: Float[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], predicted: Bool[np.ndarray, "N K"]
) -> tuple[dict[str, float | None], ...]:
    once = np.ones((1, len(truth)), np.int64)
    rows = []
    for column in range(truth.shape[1]):
        one = slice(column, column + 1)
        arrays = probability[:, one], truth[:, one], predicted[:, one]
        row = {
            "auroc": macro_auroc(arrays[0], arrays[1], once)[0],
            "auprc": macro_auprc(arrays[0], arrays[1], once)[0],
            "f1": macro_f1(arrays[2], arrays[1], once)[0],
            "recall": _ratio(truth[:, one] & predicted[:, one], truth[:, one]),
            "precision": _ratio(truth[:, one] & predicted[:, one], predicted[:, one]),
        }
        rows.append({name: float(value) if np.isfinite(value) else None for name, value in row.items()})
    return tuple(rows)


def _ratio(of: Bool[np.ndarray, "N 1"], among: Bool[np.ndarray, "N 1"]) -> float:
    return float(of.sum() / among.sum()) if among.any() else np.nan


def weighted_mean(values: Float[np.ndarray, "N"] | Int64[np.ndarray, "N"], weight: Weight) -> Found:
    """Mean of a value a sample."""
    mean: Found = (weight @ values) / weight.sum(axis=1)
    return mean


def squared_error(probability: Float[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Of the Brier score. Source: Brier, Verification of forecasts expressed in terms of probability (1950)."""
    return (probability.astype(np.float64) - truth) ** 2


def balanced_accuracy(hit: Bool[np.ndarray, "N"], one_hot: Bool[np.ndarray, "N K"], weight: Weight) -> Found:
    """Mean recall over the classes that occur."""
    total = weight @ one_hot.astype(np.int64)
    right = weight @ (one_hot & hit[:, None]).astype(np.int64)
    return _mean_defined(right, total)


def balanced_of_several(predicted: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], weight: Weight) -> Found:
    """Mean over classes with samples on both sides of (recall + specificity) / 2; NaN where there is none."""
    sides = [
        (weight @ (side & right).astype(np.int64), weight @ side.astype(np.int64))
        for side, right in ((truth, predicted), (~truth, ~predicted))
    ]
    (found, of), (spared, others) = sides
    whole = (of > 0) & (others > 0)
    halves = np.where(whole, found / np.maximum(of, 1) + spared / np.maximum(others, 1), 0.0) / 2
    return _mean_over(halves, whole)


def macro_f1(predicted: Bool[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], weight: Weight) -> Found:
    """Mean F1 over the classes that a sample has or is said to have; NaN where there is none."""
    both = weight @ (predicted & truth).astype(np.int64)
    either = weight @ (predicted.astype(np.int64) + truth)
    return _mean_defined(2 * both, either)


def macro_auroc(probability: Float[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], weight: Weight) -> Found:
    """Mean area under the ROC curve over the classes with samples on both sides.

    Exact: the Mann-Whitney count in integers, a tied pair counts half. NaN where one class only occurs.
    """
    areas, defined = [], []
    for column, positive in zip(probability.T, truth.T, strict=True):
        above, below = _tied(column, positive, weight)
        twice_wins = (above * (2 * np.cumsum(below, axis=1) - below)).sum(axis=1)
        pairs = above.sum(axis=1) * below.sum(axis=1)
        areas.append(np.divide(twice_wins, 2 * pairs, out=np.zeros(len(weight)), where=pairs > 0))
        defined.append(pairs > 0)
    return _mean_over(np.stack(areas, axis=1), np.stack(defined, axis=1))


def macro_auprc(probability: Float[np.ndarray, "N K"], truth: Bool[np.ndarray, "N K"], weight: Weight) -> Found:
    """Mean average precision over the classes with a sample: no interpolation, ties are one threshold.

    NaN where no class has a sample.
    """
    areas, defined = [], []
    for column, positive in zip(probability.T, truth.T, strict=True):
        above, below = (side[:, ::-1] for side in _tied(column, positive, weight))
        right = np.cumsum(above, axis=1)
        precision = right / np.maximum(right + np.cumsum(below, axis=1), 1)
        total = right[:, -1]
        areas.append((above * precision).sum(axis=1) / np.maximum(total, 1))
        defined.append(total > 0)
    return _mean_over(np.stack(areas, axis=1), np.stack(defined, axis=1))


def _tied(
    column: Float[np.ndarray, "N"], positive: Bool[np.ndarray, "N"], weight: Weight
) -> tuple[Int64[np.ndarray, "R T"], Int64[np.ndarray, "R T"]]:
    """Weight of positives and of negatives at each distinct probability, ascending."""
    order = np.argsort(column, kind="stable")
    starts = np.flatnonzero(np.diff(column[order], prepend=np.nan) != 0)
    ordered = weight[:, order]
    above = np.add.reduceat(ordered * positive[order], starts, axis=1)
    below = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    return above, below


def calibration_error(probability: Float[np.ndarray, "N K"], right: Bool[np.ndarray, "N K"], weight: Weight) -> Found:
    """Expected calibration error over `BINS` bins of equal width, mean over the columns.

    A bin's error is the distance between its mean probability and its share of right answers, and counts by its weight.

    Args:
        probability: Of an answer.
        right: Whether the answer is right.
        weight: Of the samples.
    """
    places = _bin(probability)
    errors = np.zeros(len(weight))
    for column in range(probability.shape[1]):
        gap = probability[:, column].astype(np.float64) - right[:, column]
        sums = weight @ (gap[:, None] * (places[:, column, None] == np.arange(BINS)))
        errors += np.abs(sums).sum(axis=1) / weight.sum(axis=1)
    return errors / probability.shape[1]


def calibrate(probability: Float[np.ndarray, "N K"], right: Bool[np.ndarray, "N K"]) -> Calibration:
    """Mean probability, share of right answers and number of answers of each bin that has any."""
    place, given, true = _bin(probability).ravel(), probability.astype(np.float64).ravel(), right.ravel()
    count = np.bincount(place, minlength=BINS)
    kept = count > 0
    said, found = (np.bincount(place, values, BINS)[kept] / count[kept] for values in (given, true))
    return Calibration(tuple(said.tolist()), tuple(found.tolist()), tuple(count[kept].tolist()))


def _bin(probability: Float[np.ndarray, "N K"]) -> Int64[np.ndarray, "N K"]:
    """Bins hold their upper edge, as scikit-learn's ``calibration_curve``."""
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], probability).astype(np.int64)


def _mean_defined(parts: Int64[np.ndarray, "R K"], wholes: Int64[np.ndarray, "R K"]) -> Found:
    """Mean over the columns that have a whole of part by whole."""
    return _mean_over(np.divide(parts, wholes, out=np.zeros(wholes.shape), where=wholes > 0), wholes > 0)


def _mean_over(values: Float[np.ndarray, "R K"], defined: Bool[np.ndarray, "R K"]) -> Found:
    count = defined.sum(axis=1)
    return np.divide(values.sum(axis=1), count, out=np.full(len(values), np.nan), where=count > 0)
