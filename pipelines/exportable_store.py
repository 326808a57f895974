"""A region store to be exported: rows in a stream, maps at an image's own size, file names that are safe."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from pydantic import Field

from pipelines.exporters import EXPORTERS
from shared.artifact import CARD, read_card
from shared.config import Strict
from shared.errors import DriftError, IncompatibleError, UsageError
from shared.images import Image, Source
from shared.region_images import find_images, flat_samples, read_localized
from shared.region_layout import SampleRow
from shared.regions import RegionStore, open_region_store

LEVELS = 254
"""A map's stored value at probability 1."""

_ROWS_AT_ONCE = 16
_NAME_MAX = 40

THRESHOLD = Field(0.5, gt=0, le=1, description="A pixel is in a region where its probability is at least this.")


@dataclass(frozen=True)
class ReadBack:
    """What was read from the finished files and found equal to what the store holds.

    Attributes:
        what: Plural noun.
        count: How many of them, every one that was written.
    """

    what: str
    count: int

    def __str__(self) -> str:
        return f"{self.count:,} {self.what} equal"


@dataclass(frozen=True)
class ExportableStore:
    """A published store of 2D images.

    Attributes:
        store: Open.
        samples: Its samples with maps, in row order; each is read from disk when asked for.
        left_out: Sample or volume id -> why it is not in the export; exporters add theirs.
        sources: Images by sample id, where ``--images`` was given.
    """

    store: RegionStore
    samples: Sequence[SampleRow]
    left_out: dict[str, str]
    sources: Mapping[str, Source] | None = None

    @property
    def regions(self) -> tuple[str, ...]:
        """Names in map order."""
        return self.store.regions

    def read_image(self, sample: SampleRow) -> Image:
        """The sample's image, if it is the file that was localized.

        Raises:
            UsageError: The images were not given.
            CorruptError, DecodeError: As `shared.region_images.read_localized`.
        """
        if self.sources is None:
            raise UsageError("the images are needed for this", hint="--images FOLDER, those the store was made from")
        return read_localized(sample, self.sources)

    def maps(self, samples: Sequence[SampleRow]) -> Iterator[tuple[SampleRow, UInt8[np.ndarray, "K h w"]]]:
        """Samples with their maps as stored, a few in memory at a time."""
        for start in range(0, len(samples), _ROWS_AT_ONCE):
            part = samples[start : start + _ROWS_AT_ONCE]
            yield from zip(part, self.store.maps([sample.row for sample in part]), strict=True)


class StoreExporter(Protocol):
    """What `pipelines.exporters.STORE_EXPORTERS` names; built with its own ``Options``."""

    Options: type[Strict]
    needs_images: bool

    def __init__(self, options: Any) -> None: ...

    def write(self, source: ExportableStore, folder: Path) -> list[ReadBack]:
        """Fill an empty folder, read the files back, and compare.

        Raises:
            DriftError: What was read is not what the store holds.
            UsageError: The store has nothing that this format can hold.
        """
        ...

    def notes(self, source: ExportableStore) -> str:
        """Markdown for the folder's README: what lies where, and how it is opened."""
        ...


@dataclass(frozen=True)
class Names:
    """File names of samples and regions: their place comes first, so no two are equal on any file system."""

    regions: Sequence[str]

    def sample(self, row: int, sample_id: str) -> str:
        """Stem for a sample, or a volume by its first row.

        >>> Names([]).sample(7, "a/b.png"), Names([]).sample(8, "../Ä")
        ('000007_a-b-png', '000008')
        """
        return f"{row:06d}_{plain(sample_id)}".rstrip("_")

    def region(self, index: int) -> str:
        """Name for a region."""
        return f"{index}_{plain(self.regions[index])}".rstrip("_")


def plain(text: str) -> str:
    """The ASCII letters and digits of a text, what is between them as one ``-``; at most 40 characters."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:_NAME_MAX].rstrip("-")


def open_exportable_store(reference: str, images: Path | None) -> ExportableStore:
    """Open ``PATH[@sha256:...]`` and find its images.

    Raises:
        UsageError: It holds no maps of 2D images.
        InputMissingError: The images lack a sample of the store.
        IncompatibleError, LockedError, CorruptError: As `shared.regions.open_region_store`.
    """
    path = Path(reference.partition("@sha256:")[0])
    if (path / CARD).is_file() and (kind := read_card(path).identity.kind) != "region-store":
        fitting = f"for {kind}s: --to {', '.join(EXPORTERS)}" if kind in ("encoder", "model") else None
        raise IncompatibleError(f"{path}: found kind '{kind}', expected kind 'region-store'", hint=fitting)
    store = open_region_store(reference)
    samples = flat_samples(store.samples, store.grid)
    left_out = {name: f"quarantined: {reason}" for name, reason in store.why_quarantined().items()}
    return ExportableStore(store, samples, left_out, None if images is None else find_images(samples, images))


def image_size(sample: SampleRow) -> tuple[int, int]:
    """Rows and columns of a sample's image."""
    height, width = (sample.shape or (1, 1, 1))[-2:]
    return height, width


def resample(maps: UInt8[np.ndarray, "K h w"], size: tuple[int, int]) -> Float32[np.ndarray, "K H W"]:
    """Maps in the frame of an image of some size: bilinear with half-pixel centres, 0 to `LEVELS`.

    What lies between two equal values is that value to the bit, so that a cut at a stored value does not flicker.

    >>> resample(np.array([[[0, 100]]], np.uint8), (1, 4)).tolist()
    [[[0.0, 25.0, 75.0, 100.0]]]
    """
    values = maps.astype(np.float32)
    for axis in (1, 2):
        if values.shape[axis] != size[axis - 1]:
            index, following, share = _taps(values.shape[axis], size[axis - 1])
            low = values.take(index, axis)
            high = values.take(following, axis)
            values = low + (high - low) * (share[:, None] if axis == 1 else share)
    return values


def cut(levels: Float32[np.ndarray, "*n"], threshold: float) -> Bool[np.ndarray, "*n"]:
    """Where resampled maps reach a probability."""
    return np.asarray(levels >= np.float32(LEVELS * threshold))


def ordered_labels(levels: Float32[np.ndarray, "K *n"], threshold: float) -> UInt8[np.ndarray, "*n"]:
    """One number a pixel: 0 for none, region k as k + 1; where regions overlap, the later one."""
    labels = np.zeros(levels.shape[1:], np.uint8)
    for number, region in enumerate(levels, 1):
        labels[cut(region, threshold)] = number
    return labels


def refuse_difference(same: bool, file: Path) -> None:
    """Raise DriftError for a file that reads back as something else."""
    if not same:
        raise DriftError(
            f"{file.name}: read back, it is not what was written",
            hint="nothing was kept; mwm doctor shows the versions of what wrote and read it",
        )


@contextmanager
def table(path: Path, *columns: str) -> Iterator[Any]:
    """A CSV being written: call it with the cells of a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        yield lambda *cells: writer.writerow(cells)


def make_durable(folder: Path) -> None:
    """Bring every file below a folder, and the folders, to disk."""
    for path in _all(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _all(folder: Path) -> Iterable[Path]:
    for here, _, names in os.walk(folder, topdown=False):
        yield from (Path(here, name) for name in names)
        yield Path(here)


def _taps(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = np.clip((np.arange(target, dtype=np.float64) + 0.5) * size / target - 0.5, 0, size - 1)
    index = np.floor(position).astype(np.int64)
    return index, np.minimum(index + 1, size - 1), (position - index).astype(np.float32)
