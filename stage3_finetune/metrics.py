"""Scores of a classifier, with bootstrap intervals that resample groups, never files.

Samples of one group (a patient, a run of neighbouring slices) are not independent: an interval that
resamples files is too narrow. Here a resample draws as many groups as there are, with replacement, and every
sample counts as often as its group was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from shared.rng import below, uniform_u32

RESAMPLES = 2000
_CHUNK = 1 << 22
"""Weights held at once while bootstrapping: bounds memory at some hundred megabytes, whatever N is."""


@dataclass(frozen=True)
class Interval:
    """A score in [0, 1] and its 95 % percentile interval; None where it is undefined.

    Attributes:
        value: The score of the samples as they are.
        low: 2.5th percentile over the resamples, or None with fewer than two groups.
        high: 97.5th percentile, likewise.
    """

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        span = "no interval" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({span})"


@dataclass(frozen=True)
class Scores:
    """Scores of one part.

    Attributes:
        accuracy: Share of samples whose most probable class is their label.
        balanced_accuracy: Mean recall of the classes that occur.
        auroc: Mean one-versus-rest area under the ROC curve of the classes that occur (ties count half).
        confusion: Counts; rows are labels, columns predictions, in the order of ``classes``.
        classes: Class names.
        samples: Number of samples.
        groups: Number of groups, the unit that was resampled.
        resamples: Resamples drawn.
        resamples_one_class: How many of them held one class only; they have no AUROC and its interval
            leaves them out.
    """

    accuracy: Interval
    balanced_accuracy: Interval
    auroc: Interval
    confusion: Int64[np.ndarray, "K K"]
    classes: tuple[str, ...]
    samples: int
    groups: int
    resamples: int
    resamples_one_class: int

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes without a sample here; means over classes leave them out."""
        return tuple(name for name, row in zip(self.classes, self.confusion, strict=True) if not row.any())

    def lines(self) -> list[str]:
        """Text for a log or a closing line; every interval says what it stands on."""
        base = f"{self.samples} samples in {self.groups} group{'s' if self.groups != 1 else ''}"
        if self.absent:
            base += f"; without a sample: {', '.join(self.absent)}"
        return [
            f"accuracy {self.accuracy}, balanced {self.balanced_accuracy}, AUROC {self.auroc}",
            f"95 % intervals by group: {base}" if self.accuracy.low is not None else f"no intervals: {base}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for a card's metrics."""
        scores = {name: vars(getattr(self, name)) for name in ("accuracy", "balanced_accuracy", "auroc")}
        return {
            **{name: dict(score) for name, score in scores.items()},
            "confusion": self.confusion.tolist(),
            "classes": list(self.classes),
            "classes_absent": list(self.absent),
            "samples": self.samples,
            "groups": self.groups,
            "resamples": self.resamples,
            "resamples_one_class": self.resamples_one_class,
        }


def score(
    probability: Float[np.ndarray, "N K"],
    label: Int64[np.ndarray, "N"],
    group: Sequence[str],
    *,
    classes: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Scores:
    """Score predictions, with 95 % percentile bootstrap intervals over groups.

    A class without a sample, in the part or in one resample, is left out of that mean over classes. The
    predicted class is the first of the most probable ones. Few groups make rough intervals: the number of
    groups is part of the answer.

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
    if len(label) == 0:
        raise ValueError("no sample to score")
    names, membership = np.unique(np.asarray(group, dtype=np.str_), return_inverse=True)
    hit = probability.argmax(axis=1) == label
    drawn = _draw(len(names), resamples, seed)
    everything = np.ones((1, len(names)), np.int64)

    def both(measure: Any) -> tuple[Interval, int]:
        value = measure(everything[:, membership])[0]
        step = max(1, _CHUNK // len(label))
        parts = [measure(drawn[i : i + step][:, membership]) for i in range(0, len(drawn), step)]
        return _interval(value, np.concatenate(parts) if len(names) > 1 else np.empty(0))

    one_hot = label[:, None] == np.arange(len(classes))
    accuracy, _ = both(lambda weight: (weight @ hit) / weight.sum(axis=1))
    balanced, _ = both(lambda weight: balanced_accuracy(hit, one_hot, weight))
    auroc, undefined = both(lambda weight: macro_auroc(probability, one_hot, weight))
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (label, probability.argmax(axis=1)), 1)
    return Scores(accuracy, balanced, auroc, confusion, tuple(classes), len(label), len(names), resamples, undefined)


def balanced_accuracy(
    hit: Bool[np.ndarray, "N"], one_hot: Bool[np.ndarray, "N K"], weight: Int64[np.ndarray, "R N"]
) -> Float[np.ndarray, "R"]:
    """Mean recall over the classes that occur, of R weighted copies of N samples."""
    total = weight @ one_hot.astype(np.int64)
    right = weight @ (one_hot & hit[:, None]).astype(np.int64)
    recall = np.divide(right, total, out=np.zeros(total.shape), where=total > 0)
    return recall.sum(axis=1) / (total > 0).sum(axis=1)


def macro_auroc(
    probability: Float[np.ndarray, "N K"], one_hot: Bool[np.ndarray, "N K"], weight: Int64[np.ndarray, "R N"]
) -> Float[np.ndarray, "R"]:
    """Mean one-versus-rest AUROC over the classes with samples on both sides, of R weighted copies.

    Exact: the Mann-Whitney count in integers, a tied pair counts half. NaN where one class only occurs.
    """
    total, defined = np.zeros(len(weight)), np.zeros(len(weight), np.int64)
    for column, positive in zip(probability.T, one_hot.T, strict=True):
        order = np.argsort(column, kind="stable")
        starts = np.flatnonzero(np.diff(column[order], prepend=np.nan) != 0)
        ordered = weight[:, order]
        above = np.add.reduceat(ordered * positive[order], starts, axis=1)
        below = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
        twice_wins = (above * (2 * np.cumsum(below, axis=1) - below)).sum(axis=1)
        pairs = above.sum(axis=1) * below.sum(axis=1)
        total += np.divide(twice_wins, 2 * pairs, out=np.zeros(len(weight)), where=pairs > 0)
        defined += pairs > 0
    return np.divide(total, defined, out=np.full(len(weight), np.nan), where=defined > 0)


def _draw(groups: int, resamples: int, seed: int) -> Int64[np.ndarray, "R G"]:
    """How often each group is drawn in each resample; every row sums to the number of groups."""
    words = uniform_u32("finetune/bootstrap", seed, str(groups), 0, resamples * groups)
    flat = below(words, groups).reshape(resamples, groups) + groups * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * groups).reshape(resamples, groups)


def _interval(value: float, resampled: Float[np.ndarray, "R"]) -> tuple[Interval, int]:
    """The interval, and how many resamples had no value."""
    usable = resampled[np.isfinite(resampled)]
    dropped = len(resampled) - len(usable)
    if not np.isfinite(value):
        return Interval(None, None, None), dropped
    if len(usable) == 0:
        return Interval(float(value), None, None), dropped
    low, high = np.percentile(usable, (2.5, 97.5))
    return Interval(float(value), float(low), float(high)), dropped
