"""What a classifier's scores say: to a log, to a card, to a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from shared.charts import confusion_matrix, line_chart
from shared.report import Section, table
from stage3_finetune.intervals import Interval

_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier",
    "ece": "ECE",
}


@dataclass(frozen=True)
class Calibration:
    """Bins of answers by their probability, ascending; bins without any are left out.

    Attributes:
        said: Mean probability.
        found: Share of right answers.
        count: Answers.
    """

    said: tuple[float, ...]
    found: tuple[float, ...]
    count: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """Scores of one part.

    Attributes:
        intervals: By name, in [0, 1]. ``accuracy``: share of samples that are wholly right. ``balanced_accuracy``:
            mean recall of the classes that occur; of several classes an image, mean of recall and specificity.
            ``f1``, ``auroc`` (ties count half), ``auprc`` (average precision): mean over the classes that occur, each
            versus the rest. ``brier``: mean squared error of the probabilities, half of its sum over classes, or of
            several classes an image its mean. ``ece``: expected calibration error of the most probable class, or of
            several the mean over classes, in 15 bins of equal width.
        classes: Class names.
        calibration: Of the most probable class, or of several of every class.
        confusion: Counts; rows are labels, columns predictions, in the order of ``classes``. None of several.
        per_class: Of several: a class's own scores, None where undefined.
        positives: Samples that have each class.
        samples: Number of samples.
        groups: Number of groups, the unit that was resampled.
        resamples: Resamples drawn.
        resamples_one_class: How many of them held one class only; they have no AUROC and its interval leaves them out.
    """

    intervals: Mapping[str, Interval]
    classes: tuple[str, ...]
    calibration: Calibration
    confusion: Int64[np.ndarray, "K K"] | None
    per_class: tuple[dict[str, float | None], ...]
    positives: tuple[int, ...]
    samples: int
    groups: int
    resamples: int
    resamples_one_class: int

    @property
    def accuracy(self) -> Interval:
        """Share of samples that are wholly right."""
        return self.intervals["accuracy"]

    @property
    def balanced_accuracy(self) -> Interval:
        """Mean recall of the classes that occur."""
        return self.intervals["balanced_accuracy"]

    @property
    def auroc(self) -> Interval:
        """Mean area under the ROC curve."""
        return self.intervals["auroc"]

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes without a sample here; means over classes leave them out."""
        return tuple(name for name, count in zip(self.classes, self.positives, strict=True) if not count)

    @property
    def _main(self) -> tuple[str, ...]:
        """What is named first: of several classes an image, accuracy (all of them right) says little."""
        return ("accuracy", "balanced_accuracy", "auroc") if self.confusion is not None else ("auroc", "auprc", "f1")

    def named(self) -> dict[str, Interval]:
        """Scores by the name that the report gives them."""
        order = [*self._main, *(name for name in _NAMES if name not in self._main)]
        told = {**_NAMES, "accuracy": "all classes right"} if self.confusion is None else _NAMES
        return {told[name]: self.intervals[name] for name in order}

    def sections(self) -> list[Section]:
        """Confusion matrix or a table by class, and the calibration curve."""
        if self.confusion is not None:
            matrix = confusion_matrix(self.classes, self.confusion.tolist())
            first = Section("Which class was taken for which", matrix, "Counts; shade: share of the row.")
        else:
            columns = ("auroc", "auprc", "f1", "recall", "precision")
            rows = [
                (name, count, *("undefined" if found[key] is None else f"{found[key]:.3f}" for key in columns))
                for name, count, found in zip(self.classes, self.positives, self.per_class, strict=True)
            ]
            body = table(("class", "samples", "AUROC", "AUPRC", "F1", "recall", "precision"), rows)
            first = Section("Class by class", body, "Predicted: at a probability of 0.5 or more.")
        said, found, count = self.calibration.said, self.calibration.found, self.calibration.count
        lines = {"this model": (said, found), "as sure as right": ((0.0, 1.0), (0.0, 1.0))}
        chart = line_chart(lines, x_label="probability that it gave", y_label="share that was right", zero=True)
        note = (
            f"{sum(count)} answers in 15 bins of equal width, {min(count)} to {max(count)} a bin that has any. "
            "Below the diagonal: surer than right."
        )
        return [first, Section("Is it as sure as it is right", chart, note)]

    @property
    def note(self) -> str:
        """How the scores are meant."""
        means = (
            "F1, AUROC and AUPRC: mean of one class versus the rest, ties count half in AUROC. Brier and ECE (15 bins "
            "of equal width): the lower the better."
        )
        if self.confusion is None:
            means += " An image may have several classes: every score but the share with all right is a mean over them."
        return means

    def lines(self) -> list[str]:
        """Text for a log or a closing line; every interval says what it stands on."""
        base = f"{self.samples} samples in {self.groups} group{'s' if self.groups != 1 else ''}"
        if self.absent:
            base += f"; without a sample: {', '.join(self.absent)}"
        told = {**_NAMES, "balanced_accuracy": "balanced"}
        if self.confusion is None:
            told["accuracy"] = "all right"
        rest = [name for name in _NAMES if name not in self._main]
        main = ", ".join(f"{told[name]} {self.intervals[name]}" for name in self._main)
        more = ", ".join(f"{told[name]} {_short(self.intervals[name])}" for name in rest)
        return [
            f"{main}; {more}",
            f"95 % intervals by group: {base}" if self.accuracy.low is not None else f"no intervals: {base}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for a card's metrics."""
        shape = (
            {"per_class": list(self.per_class)} if self.confusion is None else {"confusion": self.confusion.tolist()}
        )
        return {
            **{name: dict(vars(self.intervals[name])) for name in _NAMES},
            **shape,
            "calibration": {name: list(values) for name, values in vars(self.calibration).items()},
            "positives": list(self.positives),
            "classes": list(self.classes),
            "classes_absent": list(self.absent),
            "samples": self.samples,
            "groups": self.groups,
            "resamples": self.resamples,
            "resamples_one_class": self.resamples_one_class,
        }


def _short(interval: Interval) -> str:
    return "undefined" if interval.value is None else f"{interval.value:.3f}"
