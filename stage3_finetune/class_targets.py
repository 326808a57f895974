"""The labels of a classifier: the column ``label`` (one class an image) or ``labels`` (any number of them)."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from shared.errors import ConfigError
from shared.images import Source
from stage3_finetune.contracts import Example, View
from stage3_finetune.labels import listed, read_table

BETWEEN = ";"
"""Between the names of a cell of the column ``labels``."""


def names_in(label: str) -> tuple[str, ...]:
    """Class names of a row of a table with the column ``labels``.

    >>> names_in("a;b"), names_in("")
    (('a', 'b'), ())
    """
    return tuple(label.split(BETWEEN)) if label else ()


class ClassTargets:
    """Classes of images.

    Args:
        path: The CSV.
        options: Not needed.
        sources: Not needed.

    Attributes:
        multi_label: Whether an image may have any number of classes: the table has ``labels``. Known once it is read.
    """

    def __init__(self, path: Path, *, options: Any = None, sources: Mapping[str, Source] | None = None) -> None:
        self._path = path
        self.multi_label = False
        self._rows: Counter[str] = Counter()

    def read(
        self, known: Mapping[str, str | None], names: Mapping[str, str] | None = None
    ) -> tuple[list[Example], bool]:
        """The table's rows; of several classes in the order of their names."""
        self.multi_label = self._has_labels()
        if not self.multi_label:
            return read_table(self._path, known, names)
        examples, grouped = read_table(self._path, known, names, column="labels", empty=True)
        problems, kept = [], []
        for row, example in enumerate(examples, 1):
            found = [name.strip() for name in example.label.split(BETWEEN)] if example.label else []
            if not all(found) or len(set(found)) < len(found):
                problems.append(f"row {row}: {example.label!a}")
            kept.append(Example(example.sample_id, BETWEEN.join(sorted(found)), example.group, example.split))
            self._rows.update(found)
        if problems:
            raise ConfigError(
                f"labels {self._path}: empty names, or one twice: {listed(problems, quote=False)}",
                hint=f"names are separated by '{BETWEEN}'; an empty cell: none of the classes",
            )
        return kept, grouped

    def classes(self, examples: Sequence[Example], asked: Sequence[str] | None) -> tuple[str, ...]:
        """Every label, sorted, or what is asked for if the labels are the same."""
        present = {name for example in examples for name in self._names(example)}
        classes = sorted(present) if asked is None else asked
        if unknown := sorted(present - set(classes)):
            raise ConfigError(
                f"labels {self._path}: labels that 'classes' does not name: {listed(unknown)}",
                hint=f"classes: {', '.join(classes)}; drop those rows or name the labels",
            )
        if absent := [name for name in classes if name not in present]:
            raise ConfigError(f"labels {self._path}: no row has the classes {listed(absent)}")
        if not classes:
            raise ConfigError(f"labels {self._path}: no row has a class: every cell of 'labels' is empty")
        if len(classes) < 2:
            hint = "for present or absent, write two names into a column 'label'" if self.multi_label else None
            raise ConfigError(f"labels {self._path}: one class only, {classes[0]!a}; a classifier needs two", hint=hint)
        return tuple(classes)

    def check(self, examples: Sequence[Example], classes: Sequence[str]) -> None:
        """Refuse a class that no training row has or, of several classes, that every one has."""
        train = [set(self._names(example)) for example in examples if example.split == "train"]
        if unseen := [name for name in classes if not any(name in found for found in train)]:
            raise ConfigError(f"labels {self._path}: classes without a training sample: {listed(unseen)}")
        if self.multi_label and (always := [name for name in classes if all(name in found for found in train)]):
            raise ConfigError(f"labels {self._path}: classes that every training sample has: {listed(always)}")

    def strata(self, example: Example) -> str:
        """The class; of several the rarest in the table, so that it gets into every part."""
        return min(self._names(example), key=lambda name: (self._rows[name], name), default="")

    def load(self, example: Example, classes: Sequence[str], size_px: tuple[int, int]) -> int | tuple[bool, ...]:
        """The class's number; of several, whether the image has each."""
        if not self.multi_label:
            return classes.index(example.label)
        found = names_in(example.label)
        return tuple(name in found for name in classes)

    def place(self, truth: int | tuple[bool, ...], view: View, side_px: int) -> int | tuple[bool, ...]:
        """The same, whatever is seen."""
        return truth

    def collate(self, placed: Sequence[int | tuple[bool, ...]]) -> Int64[Tensor, "B"] | Float32[Tensor, "B K"]:
        """Numbers of the classes, or ones and zeros."""
        return torch.tensor(placed, dtype=torch.float32 if self.multi_label else torch.int64)

    def _names(self, example: Example) -> tuple[str, ...]:
        return names_in(example.label) if self.multi_label else (example.label,)

    def _has_labels(self) -> bool:
        """By the header alone; what else is wrong with the file, `read_table` says."""
        try:
            with self._path.open(encoding="utf-8-sig", newline="") as file:
                header = next(csv.reader(file), [])
        except (OSError, UnicodeDecodeError, csv.Error):
            return False
        return "labels" in header and "label" not in header
