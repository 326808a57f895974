"""Scores of a classifier, with intervals by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from shared.charts import confusion_matrix
from shared.report import Section
from stage3_finetune.intervals import RESAMPLES, Interval, bootstrap

Measure = Callable[[Int64[np.ndarray, "R N"]], Float[np.ndarray, "R"]]
"""A score of R weighted copies of N samples; NaN where undefined."""


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

    def named(self) -> dict[str, Interval]:
        """Scores by the name that the report gives them."""
        return {"accuracy": self.accuracy, "balanced accuracy": self.balanced_accuracy, "AUROC": self.auroc}

    def sections(self) -> list[Section]:
        """The confusion matrix."""
        matrix = confusion_matrix(self.classes, self.confusion.tolist())
        return [Section("Which class was taken for which", matrix, "Counts; shade: share of the row.")]

    @property
    def note(self) -> str:
        """How AUROC is meant."""
        return "AUROC: mean of one class versus the rest, ties count half."

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
    measures = class_measures(probability, label)
    both = partial(bootstrap, group=group, seed=seed, resamples=resamples)
    (accuracy, _), (balanced, _), (auroc, undefined) = map(both, measures.values())
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (label, probability.argmax(axis=1)), 1)
    return Scores(
        accuracy, balanced, auroc, confusion, tuple(classes), len(label), len(set(group)), resamples, undefined
    )


def class_measures(probability: Float[np.ndarray, "N K"], label: Int64[np.ndarray, "N"]) -> dict[str, Measure]:
    """Accuracy, balanced accuracy and AUROC of weighted copies of N samples, by the names of `Scores.named`."""
    hit = probability.argmax(axis=1) == label
    one_hot = label[:, None] == np.arange(probability.shape[1])
    return {
        "accuracy": lambda weight: (weight @ hit) / weight.sum(axis=1),
        "balanced accuracy": lambda weight: balanced_accuracy(hit, one_hot, weight),
        "AUROC": lambda weight: macro_auroc(probability, one_hot, weight),
    }


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
