"""A detector's predictions: a line of JSON a sample, with the truth they are scored against, read back to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

from shared.artifact import write_atomic
from shared.config import digest
from shared.errors import CorruptError
from shared.outlines import unpack_runs
from shared.page import Section
from stage3_finetune.annotations import HUNDREDTHS
from stage3_finetune.average_precision import DetectScores, Measure, at_a_glance, measures, score
from stage3_finetune.contracts import Example
from stage3_finetune.instances import Things
from stage3_finetune.misses import worst_images

MILLIONTHS = 1_000_000


@dataclass(frozen=True)
class Answer:
    """What a model found in an image, beside the truth.

    Attributes:
        found: Most sure first.
        truth: Nothing, where it is not known.
    """

    found: Things
    truth: Things

    @property
    def box_xyxy_px(self) -> Float64[np.ndarray, "n 4"]:
        """Boxes found, half-open, in px of the image as it was read."""
        return self.found.boxes / HUNDREDTHS

    @property
    def score(self) -> Float64[np.ndarray, "n"]:
        """How sure each is, in [0, 1]."""
        assert self.found.scores is not None
        return self.found.scores / MILLIONTHS

    @property
    def label(self) -> Int64[np.ndarray, "n"]:
        """Number of each one's class, from 0."""
        return self.found.labels

    @property
    def runs(self) -> list[list[int]] | None:
        """COCO run lengths of each one's mask in the image's frame; None: boxes only."""
        return None if self.found.masks is None else [unpack_runs(mask) for mask in self.found.masks]


@dataclass(frozen=True)
class DetectPredictions:
    """Things found in some rows' images, and those that are there."""

    examples: tuple[Example, ...]
    classes: tuple[str, ...]
    answers: tuple[Answer, ...]
    masks: bool

    suffix: ClassVar[str] = ".jsonl"

    @classmethod
    def join(cls, parts: Sequence[DetectPredictions]) -> DetectPredictions:
        """One table of several."""
        return cls(
            tuple(example for part in parts for example in part.examples),
            parts[0].classes,
            tuple(answer for part in parts for answer in part.answers),
            parts[0].masks,
        )

    def part(self, split: str) -> DetectPredictions:
        """Those of one part."""
        chosen = [index for index, example in enumerate(self.examples) if example.split == split]
        return DetectPredictions(
            tuple(self.examples[i] for i in chosen), self.classes, tuple(self.answers[i] for i in chosen), self.masks
        )

    @property
    def sha256(self) -> str:
        """Digest of ids and answers: boxes in 1/100 px, scores in millionths, packed run lengths."""
        rows = [
            [example.sample_id, _plain(answer.found)]
            for example, answer in zip(self.examples, self.answers, strict=True)
        ]
        return digest({"classes": self.classes, "masks": self.masks, "rows": rows})

    @property
    def truth_sha256(self) -> str:
        """Digest of what the predictions are scored against: id, group, part, size and things of every row."""
        return digest(
            [
                [row.sample_id, row.group, row.split, row.label, list(answer.truth.size_px), _plain(answer.truth)]
                for row, answer in zip(self.examples, self.answers, strict=True)
            ]
        )

    def scores(self, *, seed: int, resamples: int) -> DetectScores:
        """COCO's scores with intervals by group."""
        return score(
            [(answer.truth, answer.found) for answer in self.answers],
            [example.group for example in self.examples],
            classes=self.classes,
            masks=self.masks,
            seed=seed,
            resamples=resamples,
        )

    def measures(self) -> dict[str, Measure]:
        """COCO's scores, of weighted copies."""
        pairs = [(answer.truth, answer.found) for answer in self.answers]
        return measures(pairs, len(self.classes), masks=self.masks)

    def glance(self) -> tuple[tuple[float, ...], dict[str, float]]:
        """Best is the highest MaskAP, or BoxAP without masks; among equals the highest AP at 0.5."""
        scalars = at_a_glance(
            [(answer.truth, answer.found) for answer in self.answers], len(self.classes), masks=self.masks
        )
        kind = "mask" if self.masks else "box"
        return (_known(scalars[f"{kind}_ap"]), _known(scalars[f"{kind}_ap50"])), scalars

    def pictures(self, read: Callable[[str], Float32[np.ndarray, "C H W"]]) -> list[Section]:
        """The images with most errors, truth and answers drawn."""
        pairs = [(answer.truth, answer.found) for answer in self.answers]
        return worst_images([example.sample_id for example in self.examples], pairs, self.classes, read)

    def write(self, path: Path) -> None:
        """A line that names the classes, then one a sample; numbers are decimal and short."""
        lines = [json.dumps({"classes": list(self.classes), "masks": self.masks})]
        for example, answer in zip(self.examples, self.answers, strict=True):
            row = {
                "sample_id": example.sample_id,
                "group": example.group,
                "split": example.split,
                "label": example.label,
                "size_px": list(answer.truth.size_px),
                "truth": self._rows(answer.truth),
                "answers": self._rows(answer.found),
            }
            lines.append(json.dumps(row))
        write_atomic(path, ("\n".join(lines) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> DetectPredictions:
        """A file as it stands on disk.

        Raises:
            CorruptError: Not such a file.
        """
        number = 1  # of the line, for the message
        try:
            head, *lines = path.read_text(encoding="utf-8").splitlines()
            classes, masks = tuple(map(str, json.loads(head)["classes"])), bool(json.loads(head)["masks"])
            examples, answers = [], []
            for line in lines:
                number += 1
                row = json.loads(line)
                named = [row[key] for key in ("sample_id", "label", "group", "split")]
                if not all(isinstance(value, str) for value in named):
                    raise ValueError("text expected")
                height, width = map(int, row["size_px"])
                examples.append(Example(*named))
                truth, found = (
                    _things(row[key], (height, width), classes, masks, scored=key == "answers")
                    for key in ("truth", "answers")
                )
                answers.append(Answer(found, truth))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise CorruptError(f"{path.name} line {number}: not predictions of a detector") from None
        return cls(tuple(examples), classes, tuple(answers), masks)

    def _rows(self, things: Things) -> list[dict[str, Any]]:
        rows = []
        for index, (box, label) in enumerate(zip(things.boxes.tolist(), things.labels.tolist(), strict=True)):
            row: dict[str, Any] = {"class": self.classes[label]}
            if things.scores is not None:
                row["score"] = int(things.scores[index]) / MILLIONTHS
            row["box_xyxy_px"] = [side / HUNDREDTHS for side in box]
            if things.masks is not None:
                row["mask"] = things.masks[index]
            rows.append(row)
        return rows


def _things(
    rows: Sequence[Any], size_px: tuple[int, int], classes: Sequence[str], masks: bool, *, scored: bool
) -> Things:
    boxes = [[_whole(side, HUNDREDTHS) for side in row["box_xyxy_px"]] for row in rows]
    outlines = [row["mask"] for row in rows] if masks else []
    for outline in outlines:
        if sum(unpack_runs(outline)) != size_px[0] * size_px[1]:
            raise ValueError("run lengths of another size")
    return Things(
        size_px,
        np.array(boxes, np.int64).reshape(len(rows), 4),
        np.array([classes.index(row["class"]) for row in rows], np.int64),
        tuple(outlines) if masks else None,
        np.array([_whole(row["score"], MILLIONTHS) for row in rows], np.int64) if scored else None,
    )


def _whole(value: float, unit: int) -> int:
    """A decimal in units; ValueError where it is no whole number of them."""
    whole = math.floor(value * unit + 0.5)
    if whole / unit != value:
        raise ValueError(f"{value} is not a whole number of 1/{unit}")
    return whole


def _plain(things: Things) -> list[Any]:
    scores = None if things.scores is None else things.scores.tolist()
    return [things.boxes.tolist(), things.labels.tolist(), things.masks, scores]


def _known(value: float) -> float:
    return value if math.isfinite(value) else -1.0
