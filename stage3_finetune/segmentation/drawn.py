"""Which pixels of an image are of which class, as COCO's packed run lengths: small, plain text, opened by others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from shared.config import digest
from shared.outlines import unpack_runs
from shared.run_lengths import pack_runs, runs_of

IGNORE = 255
"""In a label map: a pixel that counts neither way."""
CLASSES_MAX = 254


@dataclass(frozen=True)
class Drawn:
    """A label map of an image.

    Attributes:
        size_px: Height and width.
        runs: Class -> its pixels as packed run lengths, column by column; a class without a pixel is not there.
        ignore: Pixels that count neither way, likewise, or None.
    """

    size_px: tuple[int, int]
    runs: Mapping[str, str]
    ignore: str | None = None

    @property
    def sha256(self) -> str:
        """Digest of what is drawn; the order of the classes does not matter."""
        return digest(self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        told: dict[str, Any] = {"size": list(self.size_px), "runs": dict(self.runs)}
        return told if self.ignore is None else {**told, "ignore": self.ignore}

    def label(self, classes: Sequence[str]) -> UInt8[np.ndarray, "H W"]:
        """0 for background, k + 1 for class k, `IGNORE`.

        Raises:
            ValueError: Run lengths that are none, of another size, or of two classes in one pixel; an unknown class.
        """
        height, width = self.size_px
        flat = np.zeros(height * width, np.uint8)
        pieces = [(classes.index(name) + 1, text) for name, text in self.runs.items()]
        for number, text in [*pieces, *([] if self.ignore is None else [(IGNORE, self.ignore)])]:
            runs = np.array(unpack_runs(text), np.int64)
            if runs.min() < 0 or runs.sum() != flat.size:
                raise ValueError(f"run lengths of {runs.sum()} pixels, expected {flat.size}")
            inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
            if flat[inside].any():
                raise ValueError("two classes in one pixel")
            flat[inside] = number
        return np.ascontiguousarray(flat.reshape(width, height).T)


def draw(label: UInt8[np.ndarray, "H W"], classes: Sequence[str]) -> Drawn:
    """Undo `Drawn.label`.

    >>> draw(np.array([[0, 1], [255, 1]], np.uint8), ["lung"]).as_dict()
    {'size': [2, 2], 'runs': {'lung': '22'}, 'ignore': '112'}
    """
    height, width = label.shape
    present = np.flatnonzero(np.bincount(label.ravel(), minlength=IGNORE + 1)).tolist()
    runs = {classes[number - 1]: _packed(label == number) for number in present if 0 < number < IGNORE}
    return Drawn((height, width), runs, _packed(label == IGNORE) if IGNORE in present else None)


def _packed(inside: Any) -> str:
    return pack_runs(runs_of(inside))
