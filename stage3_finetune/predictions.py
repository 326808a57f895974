"""A classifier's predictions: made once a part, kept as a table, read back by a run that is continued."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Int64

from shared.artifact import write_atomic
from shared.config import digest
from shared.errors import CorruptError
from shared.gallery import Case, cases
from shared.report import Section
from stage3_finetune.class_scores import Scores
from stage3_finetune.class_targets import BETWEEN, names_in
from stage3_finetune.contracts import Example
from stage3_finetune.metrics import (
    THRESHOLD,
    Measure,
    balanced_accuracy,
    class_measures,
    macro_auroc,
    score,
    score_several,
    several_measures,
)

_FIXED = ("sample_id", "group", "split", "label", "predicted")
_WORST = 8
"""Cases that a report shows."""
_SEVERAL = "labels"
"""Heads the column of truths instead of ``label`` where an image may have several."""


@dataclass(frozen=True)
class ClassPredictions:
    """Class probabilities of some rows of the labels table.

    Attributes:
        examples: The rows.
        classes: Class names.
        probability: Of each class; each row sums to 1 unless an image may have several.
        multi_label: Whether it may.
    """

    examples: tuple[Example, ...]
    classes: tuple[str, ...]
    probability: Float32[np.ndarray, "N K"]
    multi_label: bool = False

    suffix: ClassVar[str] = ".csv"

    @classmethod
    def join(cls, parts: Sequence[ClassPredictions]) -> ClassPredictions:
        """One table of several."""
        rows = tuple(example for part in parts for example in part.examples)
        probability = np.concatenate([part.probability for part in parts])
        return ClassPredictions(rows, parts[0].classes, probability, parts[0].multi_label)

    def part(self, split: str) -> ClassPredictions:
        """Those of one part."""
        chosen = [index for index, example in enumerate(self.examples) if example.split == split]
        rows = tuple(self.examples[i] for i in chosen)
        return ClassPredictions(rows, self.classes, self.probability[chosen], self.multi_label)

    @property
    def label(self) -> Int64[np.ndarray, "N"]:
        """True classes, as indices; of one class an image."""
        return np.array([self.classes.index(example.label) for example in self.examples], np.int64)

    @property
    def truth(self) -> Bool[np.ndarray, "N K"]:
        """Which classes each image has."""
        if not self.multi_label:
            return self.label[:, None] == np.arange(len(self.classes))
        rows = [names_in(example.label) for example in self.examples]
        return np.array([[name in row for name in self.classes] for row in rows], bool).reshape(-1, len(self.classes))

    @property
    def predicted(self) -> list[str]:
        """What is said of each image: the most probable class, or every one at .5 or above, as a table has them."""
        if not self.multi_label:
            return [self.classes[int(row.argmax())] for row in self.probability]
        return [
            BETWEEN.join(name for name, value in zip(self.classes, row, strict=True) if value >= THRESHOLD)
            for row in self.probability
        ]

    @property
    def group(self) -> list[str]:
        """Group of each row."""
        return [example.group for example in self.examples]

    @property
    def sha256(self) -> str:
        """Digest of ids and probabilities in millionths: an id holds no float."""
        millionths = np.floor(self.probability.astype(np.float64) * 1e6 + 0.5).astype(np.int64).tolist()
        ids = [example.sample_id for example in self.examples]
        rows = [[name, *row] for name, row in zip(ids, millionths, strict=True)]
        several = {"multi_label": True} if self.multi_label else {}  # it decides what is scored
        return digest({"classes": self.classes, "rows": rows, **several})

    @property
    def truth_sha256(self) -> str:
        """Digest of what the predictions are scored against: id, group, part and label of every row."""
        return digest([[row.sample_id, row.group, row.split, row.label] for row in self.examples])

    def scores(self, *, seed: int, resamples: int) -> Scores:
        """Scores with intervals by group."""
        how: dict[str, Any] = {"classes": self.classes, "seed": seed, "resamples": resamples}
        if self.multi_label:
            return score_several(self.probability, self.truth, self.group, **how)
        return score(self.probability, self.label, self.group, **how)

    def measures(self) -> dict[str, Measure]:
        """Every score, of weighted copies."""
        if self.multi_label:
            return several_measures(self.probability, self.truth)
        return class_measures(self.probability, self.label)

    def pictures(self, read: Callable[[str], Float32[np.ndarray, "C H W"]]) -> list[Section]:
        """Images where the model was most sure and wrong."""
        worst = [
            Case(self.examples[row].sample_id, read(self.examples[row].sample_id), truth, said, probability)
            for row, truth, said, probability in self.worst(_WORST)
        ]
        return [Section("Most sure and wrong", cases(worst))] if worst else []

    def glance(self) -> tuple[tuple[float, ...], dict[str, float]]:
        """Best is the highest balanced accuracy (of several classes: AUROC), among equals the lowest cross-entropy."""
        if self.multi_label:
            return self._glance_at_several()
        probability, label, one_hot = self.probability, self.label, self.truth
        once = np.ones((1, len(label)), np.int64)
        balanced = float(balanced_accuracy(probability.argmax(axis=1) == label, one_hot, once)[0])
        picked = probability[np.arange(len(label)), label].astype(np.float64)
        loss = float(-np.log(np.maximum(picked, 1e-12)).mean())
        auroc = float(macro_auroc(probability, one_hot, once)[0])
        return (balanced, -loss), {"loss": loss, "balanced_accuracy": balanced, "auroc": auroc}

    def _glance_at_several(self) -> tuple[tuple[float, ...], dict[str, float]]:
        once, truth = np.ones((1, len(self.examples)), np.int64), self.truth
        picked = np.where(truth, self.probability, 1 - self.probability).astype(np.float64)
        loss = float(-np.log(np.maximum(picked, 1e-12)).mean())
        auroc = float(macro_auroc(self.probability, truth, once)[0])
        return (0.0 if np.isnan(auroc) else auroc, -loss), {"loss": loss, "auroc": auroc}

    def worst(self, count: int) -> list[tuple[int, str, str, float]]:
        """Rows that are wrong, the surest first: row, truth, what was said, its probability.

        Of several classes an image, its worst one decides, and the probability is that of what was said of it.
        """
        truth = self.truth
        if self.multi_label:
            said = self.probability >= THRESHOLD
            sure = np.where(said != truth, np.where(said, self.probability, 1 - self.probability), -1.0).max(axis=1)
        else:
            wrong = self.probability.argmax(axis=1) != self.label
            sure = np.where(wrong, self.probability.max(axis=1, initial=0.0), -1.0)
        rows = [int(row) for row in np.argsort(-sure, kind="stable")[:count] if sure[row] >= 0]
        labels, predicted = [example.label or "none" for example in self.examples], self.predicted
        return [(row, labels[row], predicted[row] or "none", float(sure[row])) for row in rows]

    def write(self, path: Path) -> None:
        """Write the table in one piece; nine digits bring every float32 back to the bit."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        fixed = [_SEVERAL if self.multi_label and name == "label" else name for name in _FIXED]
        writer.writerow([*fixed, *(f"p {name}" for name in self.classes)])
        for example, row, predicted in zip(self.examples, self.probability, self.predicted, strict=True):
            numbers = [f"{float(value):.9g}" for value in row]
            writer.writerow([example.sample_id, example.group, example.split, example.label, predicted, *numbers])
        write_atomic(path, text.getvalue().encode())

    @classmethod
    def load(cls, path: Path) -> ClassPredictions:
        """A table as it stands on disk.

        Raises:
            CorruptError: Not such a table, or a row's predicted class is not its most probable one.
        """
        try:
            header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
            examples = tuple(Example(row[0], row[3], row[1], row[2]) for row in rows)
            probability = np.array([[float(cell) for cell in row[len(_FIXED) :]] for row in rows], np.float32)
            classes = tuple(name.removeprefix("p ") for name in header[len(_FIXED) :])
            several = header[3] == _SEVERAL
            found = cls(examples, classes, probability.reshape(len(rows), len(classes)), several)
            for number, (row, predicted) in enumerate(zip(rows, found.predicted, strict=True), 2):
                known = set(names_in(row[3]) if several else (row[3],)) <= set(classes)
                if row[4] != predicted or not known:
                    raise CorruptError(f"{path.name} line {number}: its classes do not follow from its numbers")
        except (FileNotFoundError, ValueError, IndexError, csv.Error):
            raise CorruptError(f"{path.name}: not a table of predictions") from None
        return found
