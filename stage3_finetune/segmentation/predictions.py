"""What a segmentation model said of some images, with the truth: one JSON line an image, gzipped.

A file is scored by itself: truth, ignored pixels and answer stand in it as run lengths, in the frame of each image as
it was read, and a row's label is the digest of the truth beside it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32

from shared.artifact import write_atomic
from shared.config import digest
from shared.errors import CorruptError
from shared.gallery import Outlined, outlined
from shared.report import Section
from stage3_finetune.contracts import Example
from stage3_finetune.segmentation.drawn import Drawn
from stage3_finetune.segmentation.scores import (
    Measure,
    Pair,
    SegmentScores,
    dice_of,
    mean_over_classes,
    measures,
    overlaps,
    score,
)

_FORMAT = "mwm-segmentation-1"
_WORST = 6
_LEVEL = 6


@dataclass(frozen=True)
class Row:
    """Of one image: truth, answer, and spacing of its rows and columns where it is known."""

    truth: Drawn
    answer: Drawn
    spacing_mm: tuple[float, float] | None = None


@dataclass(frozen=True)
class SegmentPredictions:
    """Answers for some rows of the labels table."""

    examples: tuple[Example, ...]
    classes: tuple[str, ...]
    rows: tuple[Row, ...]

    suffix: ClassVar[str] = ".jsonl.gz"

    @classmethod
    def join(cls, parts: Sequence[SegmentPredictions]) -> SegmentPredictions:
        """One table of several."""
        return cls(
            tuple(example for part in parts for example in part.examples),
            parts[0].classes,
            tuple(row for part in parts for row in part.rows),
        )

    def part(self, split: str) -> SegmentPredictions:
        """Those of one part."""
        kept = [place for place, example in enumerate(self.examples) if example.split == split]
        return SegmentPredictions(
            tuple(self.examples[place] for place in kept), self.classes, tuple(self.rows[place] for place in kept)
        )

    @property
    def sha256(self) -> str:
        """Digest of ids and answers, run lengths all."""
        rows = [
            [example.sample_id, row.answer.as_dict()] for example, row in zip(self.examples, self.rows, strict=True)
        ]
        return digest({"classes": self.classes, "rows": rows})

    @property
    def truth_sha256(self) -> str:
        """Digest of id, group, part, the truth's own digest, and spacing in nanometres."""
        rows = []
        for example, row in zip(self.examples, self.rows, strict=True):
            nanometres = None if row.spacing_mm is None else [round(value * 1e6) for value in row.spacing_mm]
            rows.append([example.sample_id, example.group, example.split, example.label, nanometres])
        return digest({"classes": self.classes, "rows": rows})

    def scores(self, *, seed: int, resamples: int) -> SegmentScores:
        """Scores with intervals by group."""
        return score(
            self._pairs(),
            [row.spacing_mm for row in self.rows],
            [example.group for example in self.examples],
            classes=self.classes,
            seed=seed,
            resamples=resamples,
        )

    def measures(self) -> dict[str, Measure]:
        """Mean Dice and IoU, of weighted copies."""
        return measures(overlaps(self._pairs(), len(self.classes)))

    def glance(self) -> tuple[tuple[float, ...], dict[str, float]]:
        """Best is the highest Dice, the mean over images, then over classes; 0 where no class is anywhere."""
        known = self._dice()
        by_class = np.array([[_mean(known[:, k]) for k in range(len(self.classes))]])
        dice = float(np.nan_to_num(mean_over_classes(by_class)[0]))
        return (dice,), {"dice": dice}

    def pictures(self, read: Callable[[str], Float32[np.ndarray, "C H W"]]) -> list[Section]:
        """The images with the lowest Dice, truth and answer as lines on them."""
        dice = mean_over_classes(self._dice())
        worst = sorted(np.flatnonzero(np.isfinite(dice)).tolist(), key=lambda place: (dice[place], place))[:_WORST]
        shown = []
        for place in worst:
            row, sample_id = self.rows[place], self.examples[place].sample_id
            truth, found = (self._fields(drawn) for drawn in (row.truth, row.answer))
            shown.append(Outlined(sample_id, read(sample_id), truth, found, f"Dice {dice[place]:.3f}"))
        if not shown:
            return []
        note = "Light line: truth. Orange line: answer. Mean Dice over the classes that truth or answer has there."
        return [Section("Lowest Dice of the test part", outlined(shown), note)]

    def write(self, path: Path) -> None:
        """Write the file in one piece."""
        lines: list[dict[str, Any]] = [{"format": _FORMAT, "classes": list(self.classes)}]
        for example, row in zip(self.examples, self.rows, strict=True):
            spacing = None if row.spacing_mm is None else list(row.spacing_mm)
            lines.append(
                {**vars(example), "spacing_mm": spacing, "truth": row.truth.as_dict(), "answer": row.answer.as_dict()}
            )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(path, gzip.compress(text.encode(), _LEVEL, mtime=0))

    @classmethod
    def load(cls, path: Path) -> SegmentPredictions:
        """A file as it stands on disk.

        Raises:
            CorruptError: Not such a file, run lengths that do not fit together, or a truth other than its label.
        """
        try:
            head, *lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
            if head["format"] != _FORMAT:
                raise ValueError(head["format"])
            classes = tuple(map(str, head["classes"]))
            read = [_read(line, classes) for line in lines]
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CorruptError(f"{path.name}: not a file of segmentations: {type(error).__name__}: {error}") from None
        return cls(tuple(example for example, _ in read), classes, tuple(row for _, row in read))

    def _pairs(self) -> Iterator[Pair]:
        for row in self.rows:
            yield row.truth.label(self.classes), row.answer.label(self.classes)

    def _dice(self) -> np.ndarray:
        return dice_of(overlaps(self._pairs(), len(self.classes)))

    def _fields(self, drawn: Drawn) -> list[Float32[np.ndarray, "H W"]]:
        label = drawn.label(self.classes)
        return [(label == k + 1).astype(np.float32) for k, name in enumerate(self.classes) if name in drawn.runs]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _read(line: dict[str, Any], classes: Sequence[str]) -> tuple[Example, Row]:
    example = Example(*(line[name] for name in ("sample_id", "label", "group", "split")))
    spacing = line["spacing_mm"]
    row = Row(
        _drawn(line["truth"]),
        _drawn(line["answer"]),
        None if spacing is None else (float(spacing[0]), float(spacing[1])),
    )
    for drawn in (row.truth, row.answer):
        drawn.label(classes)
    if row.truth.sha256 != example.label or row.answer.size_px != row.truth.size_px or row.answer.ignore is not None:
        raise ValueError(f"sample {example.sample_id!a}: its truth is not its label's, or its answer of another frame")
    return example, row


def _drawn(told: dict[str, Any]) -> Drawn:
    height, width = map(int, told["size"])
    ignore = told.get("ignore")
    runs = {str(name): str(text) for name, text in told["runs"].items()}
    return Drawn((height, width), runs, None if ignore is None else str(ignore))
