"""One finished row as bytes: what the journal appends, and what an assembled shard leaves for `finalise`."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt16

from shared.canonical import canonical_json
from shared.merkle import tensor_digest
from shared.region_layout import Layout, SampleRow
from shared.region_shards import crc32c

_LENGTH = struct.Struct("<I")
_SIZES_BYTES = 16
FRAME_BYTES = 8
"""Length and crc32c in front of a payload."""


@dataclass(frozen=True)
class Sample:
    """What is known of one input; of a quarantined one perhaps only its id.

    Attributes:
        sample_id: Its id.
        source_sha256: Of the file's bytes.
        pixel_sha256: Of the decoded pixels.
        shape: [C, H, W] or [C, D, H, W] of the decoded image.
        spacing_mm: Along its spatial axes.
        orientation: Of a volume's axes, e.g. ``"RAS"``.
        group: What must stay on one side of a split.
    """

    sample_id: str
    source_sha256: str | None = None
    pixel_sha256: str | None = None
    shape: tuple[int, ...] | None = None
    spacing_mm: tuple[float, ...] | None = None
    orientation: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Entry:
    """One finished row as the journal keeps it: ready to be copied into a shard."""

    line: SampleRow
    quarantine: dict[str, str] | None
    maps: bytes
    quarter: bytes
    detections: bytes

    def boxes(self) -> tuple[Int32[np.ndarray, "m 4"], UInt16[np.ndarray, "m"], UInt16[np.ndarray, "m"]]:
        """Boxes in 1/16 px, scores and regions."""
        count = len(self.detections) // 20
        return (
            np.frombuffer(self.detections, "<i4", count * 4).reshape(count, 4),
            np.frombuffer(self.detections, "<u2", count, count * 16),
            np.frombuffer(self.detections, "<u2", count, count * 18),
        )

    def pack(self, *, with_maps: bool) -> bytes:
        """As a payload; `unpack` inverts it."""
        parts = [
            canonical_json({"line": self.line.to_line().decode(), "quarantine": self.quarantine}),
            self.maps if with_maps else b"",
            self.quarter if with_maps else b"",
            self.detections,
        ]
        return b"".join(_LENGTH.pack(len(part)) for part in parts) + b"".join(parts)

    @staticmethod
    def unpack(payload: bytes) -> Entry:
        """Inverse of `pack`."""
        head, maps, quarter_, detections = split(payload)
        body = json.loads(head)
        return Entry(SampleRow.from_line(body["line"].encode()), body["quarantine"], maps, quarter_, detections)


def split(payload: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """The parts of a packed entry, unparsed: line and quarantine, maps, quarter level, detections."""
    sizes = struct.unpack_from("<4I", payload)
    first, second, third, fourth = (_SIZES_BYTES + end for end in accumulate(sizes))
    return payload[_SIZES_BYTES:first], payload[first:second], payload[second:third], payload[third:fourth]


def without_maps(payload: bytes) -> bytes:
    """A packed entry as ``pack(with_maps=False)`` gives it."""
    head, _, _, detections = split(payload)
    return struct.pack("<4I", len(head), 0, 0, len(detections)) + head + detections


def detections_digest(
    boxes: Int32[np.ndarray, "m 4"], scores: UInt16[np.ndarray, "m"], box_regions: UInt16[np.ndarray, "m"]
) -> str:
    """Digest (hex) of one row's detections."""
    return tensor_digest({"boxes": boxes, "scores": scores, "regions": box_regions})


def frame(payload: bytes) -> bytes:
    """A payload with its length and the crc32c of both in front."""
    length = _LENGTH.pack(len(payload))
    return length + crc32c(length + payload) + payload


def unframe(file: FileIO) -> Iterator[tuple[int, bytes]]:
    """Payloads and where they start, up to the first torn or damaged one."""
    size = os.fstat(file.fileno()).st_size
    start = file.tell()
    while True:
        head = file.read(FRAME_BYTES)
        start += FRAME_BYTES
        # A torn length may claim gigabytes: it is held against the file before anything is read.
        if len(head) < FRAME_BYTES or _LENGTH.unpack_from(head)[0] > size - start:
            return
        payload = file.read(_LENGTH.unpack_from(head)[0])
        if crc32c(head[:4] + payload) != head[4:]:
            return
        yield start, payload
        start += len(payload)


def describe_frame(layout: Layout, sample: Sample) -> dict[str, Any]:
    """Frame of a sample's maps; its spacing is that of map pixels, as decimal strings."""
    spacing_mm = None
    if sample.shape is not None and sample.spacing_mm is not None:
        sizes = zip(sample.spacing_mm, sample.shape[1:], layout.grid, strict=True)
        spacing_mm = [repr(float(mm) * size / cells) for mm, size, cells in sizes]
    return {
        "kind": f"{len(layout.grid)}d",
        "grid": list(layout.grid),
        "spacing_mm": spacing_mm,
        "orientation": sample.orientation,
    }
