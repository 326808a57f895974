"""What a region store looks like: its rows, its encodings, and how rows are cut into shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8, UInt16

from shared.canonical import canonical_json
from shared.errors import UsageError

ARRAYS = "regions.zarr"
SAMPLES = "samples.jsonl"
QUARANTINE = "quarantine.jsonl"
ABSENT = 255
"""Value of a map that does not exist. Probabilities end at 254, so a lost chunk can't pass for data."""

HALF = 127
"""A probability of 0.5 as it is stored."""

QUARTER = 4
"""Side, in map pixels, of the cells that the quarter level averages."""

RESTORE = "restore the store from a copy, or make it again"
LINE_BYTES_MAX = 64 << 10
SHARD_BYTES_MAX = 256 << 20
SHARD_ROWS_MAX = 1024
SHARDS_MIN = 8


@dataclass(frozen=True)
class SampleRow:
    """One line of ``samples.jsonl``: an input image and what became of it.

    Attributes:
        row: Its index in every array.
        sample_id: Its id.
        status: ``quarantined`` rows hold `ABSENT` everywhere.
        source_sha256: Of the file, or None where it could not be read.
        pixel_sha256: Of the decoded pixels, or None.
        frame: Frame of the maps: ``{kind, grid, spacing_mm, orientation}``; its spacing is that of map pixels.
        shape: [C, H, W] or [C, D, H, W] of the decoded image, or None.
        spacing_mm: Spacing of the image's own pixels along its spatial axes, or None.
        group: What must stay on one side of a split, or None.
        maps_digest: Hex `row_digest` of the row's maps.
        detections_digest: Hex digest of the row's boxes, scores and their regions.
    """

    row: int
    sample_id: str
    status: Literal["ok", "quarantined"]
    source_sha256: str | None
    pixel_sha256: str | None
    frame: Mapping[str, Any]
    shape: tuple[int, ...] | None
    spacing_mm: tuple[float, ...] | None
    group: str | None
    maps_digest: str
    detections_digest: str

    def to_line(self) -> bytes:
        """RFC 8785 JSON; lengths become decimal strings, since digests of these lines enter ids."""
        body = dict(vars(self))
        body["shape"] = None if self.shape is None else list(self.shape)
        body["spacing_mm"] = None if self.spacing_mm is None else [repr(float(value)) for value in self.spacing_mm]
        return canonical_json(body)

    @staticmethod
    def from_line(line: bytes) -> SampleRow:
        """Parse one line.

        Raises:
            ValueError: Not such a line.
        """
        try:
            body = json.loads(line) if len(line) <= LINE_BYTES_MAX else None
        except RecursionError:
            body = None
        if not isinstance(body, dict) or set(body) != set(SampleRow.__dataclass_fields__):
            raise ValueError("not a line of a region store's samples")
        if body["status"] not in ("ok", "quarantined") or type(body["row"]) is not int:
            raise ValueError("not a line of a region store's samples: bad row or status")
        shape, spacing_mm = body.pop("shape"), body.pop("spacing_mm")
        return SampleRow(
            **body,
            shape=None if shape is None else tuple(int(size) for size in shape),
            spacing_mm=None if spacing_mm is None else tuple(float(value) for value in spacing_mm),
        )


@dataclass(frozen=True)
class Layout:
    """What fixes every array of a store before anything is computed.

    Attributes:
        samples: N, the number of rows.
        regions: The K region names, in map order.
        grid: Size of a map in map pixels, (H, W) or (D, H, W).
        rows_per_shard: From `plan_rows_per_shard`.
        ids_sha256: Digest of the sample ids in row order.
    """

    samples: int
    regions: tuple[str, ...]
    grid: tuple[int, ...]
    rows_per_shard: int
    ids_sha256: str

    @property
    def shards(self) -> int:
        """Number of shards of every array of maps."""
        return -(-self.samples // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Rows of a shard; the last one may be short."""
        if not 0 <= shard < self.shards:
            raise UsageError(f"shard {shard}: the store has shards 0 to {self.shards - 1}")
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.samples))

    @property
    def maps_shape(self) -> tuple[int, ...]:
        """[K, *grid] of one row."""
        return (len(self.regions), *self.grid)

    @property
    def quarter_shape(self) -> tuple[int, ...]:
        """[K, *grid / 4] of one row."""
        return (len(self.regions), *(size // QUARTER for size in self.grid))

    @property
    def bytes_max(self) -> int:
        """Room that arrays and journal need at most, in bytes: as if nothing could be compressed.

        The journals of unfinished shards are counted for two at a time, one a core of a small machine.
        """
        row = math.prod(self.maps_shape) + math.prod(self.quarter_shape) + 4096
        return row * (self.samples + 2 * self.rows_per_shard)

    def digest(self) -> str:
        """sha256 (hex): a journal belongs to one layout."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """RFC 8785 JSON."""
        return canonical_json({**vars(self), "regions": list(self.regions), "grid": list(self.grid)})

    @staticmethod
    def from_json(data: bytes) -> Layout:
        """Inverse of `to_json`."""
        body = json.loads(data)
        return Layout(**{**body, "regions": tuple(body["regions"]), "grid": tuple(body["grid"])})


def plan_rows_per_shard(samples: int, regions: int, grid: tuple[int, ...]) -> int:
    """Rows a shard: at most 256 MiB raw and 1024 rows, at least 8 shards where there are 8 rows.

    A function of what is stored, never of workers or machines: a store is cut the same way everywhere.
    A single row above 256 MiB is a shard of its own.
    """
    if samples < 1 or regions < 1 or len(grid) not in (2, 3) or any(size < QUARTER or size % QUARTER for size in grid):
        raise UsageError(
            f"a store of {samples} samples, {regions} regions, grid {grid}: expected at least one of each, "
            f"and two or three grid sizes that are multiples of {QUARTER}"
        )
    row_bytes = regions * math.prod(grid)
    return max(1, min(SHARD_ROWS_MAX, SHARD_BYTES_MAX // row_bytes, samples // SHARDS_MIN))


def sample_ids_sha256(sample_ids: Iterable[str]) -> str:
    """Digest (hex) of the ids in row order, as one RFC 8785 list."""
    digest = hashlib.sha256(b"[")
    for number, sample_id in enumerate(sample_ids):
        digest.update((b"," if number else b"") + canonical_json(sample_id))
    digest.update(b"]")
    return digest.hexdigest()


def encode_probability(probability: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Probability in [0, 1] -> 0..254, ``floor(254 p + 0.5)`` in float32.

    Raises:
        UsageError: A value that is no probability.

    >>> encode_probability(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 127, 254]
    """
    single = np.asarray(probability, np.float32)
    if not bool(np.all((single >= 0) & (single <= 1))):
        raise UsageError("a region map holds values outside [0, 1], or NaN")
    return np.floor(np.float32(254) * single + np.float32(0.5)).astype(np.uint8)


def decode_probability(maps: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """0..254 -> probability in float32; `ABSENT` becomes NaN.

    >>> decode_probability(np.array([0, 127, 254, 255], np.uint8)).tolist()
    [0.0, 0.5, 1.0, nan]
    """
    return np.where(maps == ABSENT, np.float32("nan"), maps.astype(np.float32) / np.float32(254))


def encode_boxes(box_xyxy_px: Float[np.ndarray, "n 4"]) -> Int32[np.ndarray, "n 4"]:
    """Boxes in pixels of the original image -> int32 in 1/16 px, rounded half up.

    >>> encode_boxes(np.array([[0.0, 0.5, 10.03, 20.0]])).tolist()
    [[0, 8, 160, 320]]
    """
    return np.floor(np.asarray(box_xyxy_px, np.float64).reshape(-1, 4) * 16 + 0.5).astype(np.int32)


def decode_boxes(boxes: Int32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
    """int32 in 1/16 px -> float32 pixels."""
    return boxes.astype(np.float32) / np.float32(16)


def encode_scores(score: Float[np.ndarray, "n"]) -> UInt16[np.ndarray, "n"]:
    """Confidence in [0, 1] -> 0..65535, ``floor(65535 s + 0.5)``.

    Raises:
        UsageError: A value that is no confidence.

    >>> encode_scores(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 32768, 65535]
    """
    double = np.asarray(score, np.float64)
    if not bool(np.all((double >= 0) & (double <= 1))):
        raise UsageError("a detection's score is outside [0, 1], or NaN")
    return np.floor(65535 * double + 0.5).astype(np.uint16)


def quarter(maps: UInt8[np.ndarray, "K *grid"]) -> UInt8[np.ndarray, "K *cells"]:
    """Means of the cells of four map pixels a side, rounded half up; an absent map stays absent.

    >>> quarter(np.full((1, 4, 4), 255, np.uint8)).tolist(), quarter(np.full((1, 4, 8), 7, np.uint8)).tolist()
    ([[[255]]], [[[7, 7]]])
    """
    cells = QUARTER ** (maps.ndim - 1)
    split = maps.reshape(maps.shape[0], *(part for size in maps.shape[1:] for part in (size // QUARTER, QUARTER)))
    total = split.sum(axis=tuple(range(2, split.ndim, 2)), dtype=np.uint32)
    return ((total + cells // 2) // cells).astype(np.uint8)
