"""A classifier's predictions: made once a part, kept as a table, read back by a run that is continued."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Int64

from shared.artifact import write_atomic
from shared.config import digest
from shared.errors import CorruptError
from shared.report import Section
from stage3_finetune.contracts import Example
from stage3_finetune.metrics import Measure, Scores, balanced_accuracy, class_measures, macro_auroc, score

_FIXED = ("sample_id", "group", "split", "label", "predicted")


@dataclass(frozen=True)
class ClassPredictions:
    """Class probabilities of some rows of the labels table."""

    examples: tuple[Example, ...]
    classes: tuple[str, ...]
    probability: Float32[np.ndarray, "N K"]

    suffix: ClassVar[str] = ".csv"

    @classmethod
    def join(cls, parts: Sequence[ClassPredictions]) -> ClassPredictions:
        """One table of several."""
        rows = tuple(example for part in parts for example in part.examples)
        return ClassPredictions(rows, parts[0].classes, np.concatenate([part.probability for part in parts]))

    def part(self, split: str) -> ClassPredictions:
        """Those of one part."""
        chosen = [index for index, example in enumerate(self.examples) if example.split == split]
        return ClassPredictions(tuple(self.examples[i] for i in chosen), self.classes, self.probability[chosen])

    @property
    def label(self) -> Int64[np.ndarray, "N"]:
        """True classes, as indices."""
        return np.array([self.classes.index(example.label) for example in self.examples], np.int64)

    @property
    def group(self) -> list[str]:
        """Group of each row."""
        return [example.group for example in self.examples]

    @property
    def sha256(self) -> str:
        """Digest of ids and probabilities in millionths: an id holds no float."""
        millionths = np.floor(self.probability.astype(np.float64) * 1e6 + 0.5).astype(np.int64).tolist()
        ids = [example.sample_id for example in self.examples]
        return digest(
            {"classes": self.classes, "rows": [[name, *row] for name, row in zip(ids, millionths, strict=True)]}
        )

    @property
    def truth_sha256(self) -> str:
        """Digest of what the predictions are scored against: id, group, part and label of every row."""
        return digest([[row.sample_id, row.group, row.split, row.label] for row in self.examples])

    def scores(self, *, seed: int, resamples: int) -> Scores:
        """Scores with intervals by group."""
        return score(self.probability, self.label, self.group, classes=self.classes, seed=seed, resamples=resamples)

    def measures(self) -> dict[str, Measure]:
        """Accuracy, balanced accuracy and AUROC of weighted copies."""
        return class_measures(self.probability, self.label)

    def glance(self) -> tuple[tuple[float, ...], dict[str, float]]:
        """Best is the highest balanced accuracy, among equals the lowest cross-entropy."""
        probability, label = self.probability, self.label
        once = np.ones((1, len(label)), np.int64)
        one_hot = label[:, None] == np.arange(probability.shape[1])
        balanced = float(balanced_accuracy(probability.argmax(axis=1) == label, one_hot, once)[0])
        picked = probability[np.arange(len(label)), label].astype(np.float64)
        loss = float(-np.log(np.maximum(picked, 1e-12)).mean())
        auroc = float(macro_auroc(probability, one_hot, once)[0])
        return (balanced, -loss), {"loss": loss, "balanced_accuracy": balanced, "auroc": auroc}

    def pictures(self, read: Callable[[str], Float32[np.ndarray, "C H W"]]) -> list[Section]:
        """None."""
        return []

    def write(self, path: Path) -> None:
        """Write the table in one piece; nine digits bring every float32 back to the bit."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*_FIXED, *(f"p {name}" for name in self.classes)])
        for example, row in zip(self.examples, self.probability, strict=True):
            predicted = self.classes[int(row.argmax())]
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
            found = cls(examples, classes, probability.reshape(len(rows), len(classes)))
            for number, (row, values) in enumerate(zip(rows, found.probability, strict=True), 2):
                if row[4] != classes[int(values.argmax())] or row[3] not in classes:
                    raise CorruptError(f"{path.name} line {number}: its classes do not follow from its numbers")
        except (FileNotFoundError, ValueError, IndexError, csv.Error):
            raise CorruptError(f"{path.name}: not a table of predictions") from None
        return found
