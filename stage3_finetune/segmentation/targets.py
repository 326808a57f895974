"""Labels of every pixel: PNG files of class values, read and checked once, kept as run lengths."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from shared.decode import check_png, read_bytes
from shared.errors import ConfigError, DecodeError
from shared.images import Source
from stage3_finetune.contracts import Example, View
from stage3_finetune.data import image_size
from stage3_finetune.labels import listed, read_table
from stage3_finetune.segmentation.drawn import CLASSES_MAX, IGNORE, Drawn, draw
from stage3_finetune.segmentation.options import SegmentOptions

_SMALL_GREY = {2: 85, 4: 17}
"""Bits of a grey PNG -> what Pillow multiplies its values by."""


class MaskTargets:
    """A label for each pixel: the column ``target`` of a table names a PNG beside it, of the image's size.

    An example's ``label`` is the digest of what its file draws, whatever its compression.

    Args:
        path: The CSV.
        options: Which value is which class.
        sources: The images, whose sizes are compared; empty: they are not.
    """

    def __init__(
        self, path: Path, *, options: SegmentOptions | None = None, sources: Mapping[str, Source] | None = None
    ) -> None:
        self._path, self._options = path, options or SegmentOptions()
        self._sources = dict(sources or {})
        self._drawn: dict[str, Drawn] = {}
        self._count: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        """Loader processes need what is drawn, not where it was read."""
        return {**vars(self), "_sources": {}}

    def read(
        self, known: Mapping[str, str | None], names: Mapping[str, str] | None = None
    ) -> tuple[list[Example], bool]:
        """The table's rows, every target opened and checked.

        Raises:
            InputMissingError, ConfigError: As `stage3_finetune.labels.read_table`; every fault of the targets at once.
        """
        rows, grouped = read_table(self._path, known, names, column="target")
        faults: dict[str, list[str]] = defaultdict(list)
        unnamed: dict[int, list[str]] = defaultdict(list)
        for number, row in enumerate(rows, 1):
            who = f"row {number}" if names else ascii(row.sample_id)
            found = self._open(row, who, faults)
            if found is not None:
                self._draw(row.sample_id, found, who, unnamed)
        told = [f"{len(who)} {fault}: {listed(who, quote=False)}" for fault, who in faults.items()]
        told += [
            f"value {value} in {len(who)} targets, which 'values' does not name: {listed(who, quote=False)}"
            for value, who in sorted(unnamed.items())
        ]
        if told:
            named = ", ".join(f"{name} {value}" for name, value in self._options.values.items())
            hint = f"named: {named}; others can be named in 'values' or 'ignore'" if unnamed else None
            raise ConfigError(f"labels {self._path}: {'; '.join(told)}", hint=hint)
        return [replace(row, label=self._drawn[row.sample_id].sha256) for row in rows], grouped

    def classes(self, examples: Sequence[Example], asked: Sequence[str] | None) -> tuple[str, ...]:
        """As the settings name them, else by value; ``asked`` may put them into another order.

        Raises:
            ConfigError: Other names are asked for, a class is in no target, or there is none or too many.
        """
        found = sorted(self._count, key=lambda name: int(name.split()[-1])) if not self._options.values else []
        classes = list(self._options.values) or found
        if asked is not None and sorted(asked) != sorted(classes):
            raise ConfigError(
                f"classes: {', '.join(asked)}, but the targets have {', '.join(classes) or 'background only'}",
                hint="'options.values' names values; 'classes' may only put the names into another order",
            )
        if absent := [name for name in classes if not self._count[name]]:
            raise ConfigError(f"labels {self._path}: no target has the classes {listed(absent)}")
        if not 1 <= len(classes) <= CLASSES_MAX:
            few = "every target is background" if not classes else f"{len(classes)} values in the targets"
            raise ConfigError(f"labels {self._path}: {few}, expected 1 to {CLASSES_MAX} classes beside background 0")
        return tuple(classes if asked is None else asked)

    def check(self, examples: Sequence[Example], classes: Sequence[str]) -> None:
        """Refuse a class that no training image shows."""
        shown = {name for row in examples if row.split == "train" for name in self._drawn[row.sample_id].runs}
        if unseen := [name for name in classes if name not in shown]:
            raise ConfigError(f"labels {self._path}: classes that no training image shows: {listed(unseen)}")

    def strata(self, example: Example) -> str:
        """Of an image's classes the one that the fewest images have."""
        shown = self._drawn[example.sample_id].runs
        return min(shown, key=lambda name: (self._count[name], name), default="background")

    def load(self, example: Example, classes: Sequence[str], size_px: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
        """0 for background, k + 1 for class k, `IGNORE` for what counts neither way.

        Raises:
            ConfigError: The image has another size.
        """
        drawn = self._drawn[example.sample_id]
        if drawn.size_px != size_px:
            raise ConfigError(f"sample {example.sample_id!a}: {_sizes(drawn.size_px, size_px)}")
        return drawn.label(classes)

    def place(self, truth: UInt8[np.ndarray, "H W"], view: View, side_px: int) -> UInt8[np.ndarray, "S S"]:
        """The nearest pixel of the window at each pixel's centre; pixel i covers i to i + 1, its centre is i + 0.5."""
        rows = _nearest(view.top, view.bottom, truth.shape[0], side_px)
        columns = _nearest(view.left, view.right, truth.shape[1], side_px)
        return np.ascontiguousarray(truth[rows[:, None], columns[::-1] if view.flip else columns])

    def collate(self, placed: Sequence[UInt8[np.ndarray, "S S"]]) -> Int64[Tensor, "B S S"]:
        """Label maps of a batch."""
        return torch.from_numpy(np.stack(placed).astype(np.int64))

    def _open(self, row: Example, who: str, faults: dict[str, list[str]]) -> Shaped[np.ndarray, "H W"] | None:
        path = self._path.parent / row.label
        if not path.is_file():
            faults["targets do not exist"].append(who)
            return None
        try:
            values = read_values(path)
        except DecodeError as error:
            faults["targets cannot be read"].append(f"{who} ({error.message})")
            return None
        source = self._sources.get(row.sample_id)
        try:
            size_px = values.shape if source is None else image_size(source)
        except DecodeError as error:
            faults["images cannot be read"].append(f"{who} ({error.reason})")
            return None
        if size_px != values.shape:
            faults["targets have another size than their image"].append(f"{who} ({_sizes(values.shape, size_px)})")
            return None
        return values

    def _draw(self, sample_id: str, values: Shaped[np.ndarray, "H W"], who: str, unnamed: dict[int, list[str]]) -> None:
        named = {value: name for name, wanted in self._options.named().items() for value in wanted}
        label, names = np.zeros(values.shape, np.uint8), list(self._options.values)
        for value in np.unique(values).tolist():
            if value in self._options.ignore:
                label[values == value] = IGNORE
            elif value and not named:
                names.append(f"value {value}")  # of too many classes none is learnt, whatever their numbers
                label[values == value] = min(len(names), CLASSES_MAX)
            elif value in named:
                label[values == value] = names.index(named[value]) + 1
            elif value:
                unnamed[value].append(who)
        self._drawn[sample_id] = draw(label, names)
        self._count.update(list(self._drawn[sample_id].runs) if named else names)


def read_values(path: Path) -> Shaped[np.ndarray, "H W"]:
    """Values of a PNG of one channel as they are stored: grey levels, or a palette's indices.

    Raises:
        DecodeError: Not a PNG, damaged, or of several channels.
    """
    data = read_bytes(path, "the file")
    try:
        image: Any = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            raise DecodeError(f"{image.mode} colours, expected one channel of class values")
        check_png(data, "the file")
        image.load()
    except DecodeError:
        raise
    except Exception as error:  # whatever bytes that nobody vouches for make of the decoder
        raise DecodeError(f"not a PNG ({type(error).__name__})") from None
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    return values // _SMALL_GREY.get(data[24], 1) if data[25] == 0 else values


def _nearest(first: float, last: float, size: int, side_px: int) -> Int64[np.ndarray, "S"]:
    centres = first * size + (np.arange(side_px) + 0.5) * (last - first) * size / side_px
    # Edges are quotients of whole numbers: a centre that falls between two pixels must not depend on their rounding.
    return np.clip(np.floor(centres + 1e-6).astype(np.int64), 0, size - 1)


def _sizes(target: tuple[int, ...], image: tuple[int, ...]) -> str:
    return f"target {target[1]} x {target[0]} px, image {image[1]} x {image[0]} px"
