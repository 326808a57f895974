"""What a worker has finished, row by row: an append-only file that survives ``kill -9`` and power cuts.

One file a shard, ``journal/shard-K.rows``. A record is ``length, crc32c, payload``; the first names layout and
shard. A torn tail is cut off when the file is opened again, so what it holds is always a prefix of what was
appended. A kernel lock on the file keeps an orphan of a killed run from writing beside a new worker.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import rfc8785
from jaxtyping import Int32, UInt8, UInt16

from shared.artifact import fsync_folder, full_disk_is_named
from shared.errors import CorruptError, InputMissingError, LockedError, SpecMismatchError, UsageError
from shared.merkle import row_digest
from shared.region_layout import ABSENT, Layout, SampleRow, quarter
from shared.region_record import FRAME_BYTES, Entry, Sample, describe_frame, detections_digest, frame, unframe
from shared.region_shards import encode_chunk

JOURNAL = "journal"
LAYOUT = "journal/layout.json"
_SYNC_ROWS = 32
_SYNC_S = 30.0
_MESSAGE_MAX = 500


class ShardJournal:
    """One shard's finished rows, open for appending, as a context manager; cannot be pickled.

    Args:
        folder: The store, made by `create_store`.
        shard: Number of the shard.

    Attributes:
        layout: The store's.
        missing: Rows of the shard that are not finished, ascending; empty once the shard is assembled.
        cut_bytes: Torn tail that was cut off on opening.

    Raises:
        InputMissingError: No store in the making.
        LockedError: Another live process has this shard open.
        SpecMismatchError: The file belongs to another layout.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        self.folder = folder
        self.layout = open_layout(folder)
        self.shard = shard
        self.rows = self.layout.rows(shard)
        self.path = folder / JOURNAL / f"shard-{shard:05d}.rows"
        self.done_path = done_path(folder, shard)
        self.cut_bytes = 0
        self._places: dict[int, tuple[int, int]] = {}
        self._unsynced = 0
        self._synced_at = time.monotonic()
        # Unbuffered: after a failed write no buffer may hold bytes that a later flush would bring back.
        self._file = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._recover()
        except BlockingIOError:
            self._file.close()
            raise LockedError(
                f"shard {shard} of {folder.name}: another process is writing it",
                hint="a worker of an earlier run may still live; it ends with its row",
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ShardJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"shard {self.shard}: a journal open for writing cannot be pickled",
            hint="send folder and shard number to the worker, and open it there",
        )

    @property
    def assembled(self) -> bool:
        """The shard's arrays are in place."""
        return self.done_path.exists()

    @property
    def missing(self) -> list[int]:
        """Rows still to be computed."""
        return [] if self.assembled else [row for row in self.rows if row not in self._places]

    def append_maps(
        self,
        row: int,
        sample: Sample,
        maps: UInt8[np.ndarray, "K *grid"],
        boxes: Int32[np.ndarray, "m 4"],
        scores: UInt16[np.ndarray, "m"],
        box_regions: UInt16[np.ndarray, "m"],
    ) -> None:
        """Keep one finished row.

        Args:
            row: One of `missing`.
            sample: What was read.
            maps: Encoded probabilities, 0..254.
            boxes: In 1/16 px of the original image.
            scores: 0..65535.
            box_regions: Index of each box's region.

        Raises:
            UsageError: Not what this shard lacks, or not of the layout's shape and types.
            DiskFullError: The row was not kept.
        """
        if maps.dtype != np.uint8 or maps.shape != self.layout.maps_shape or bool((maps == ABSENT).any()):
            raise UsageError(
                f"row {row}: maps are {maps.dtype} {maps.shape} up to {maps.max(initial=0)}, "
                f"expected uint8 {self.layout.maps_shape} up to 254"
            )
        count, regions = len(boxes), len(self.layout.regions)
        wanted = (("boxes", boxes, np.int32, (count, 4)), ("scores", scores, np.uint16, (count,)))
        for name, array, dtype, shape in (*wanted, ("box_regions", box_regions, np.uint16, (count,))):
            if array.dtype != dtype or array.shape != shape:
                raise UsageError(f"row {row}: {name} is {array.dtype} {array.shape}, expected {dtype.__name__} {shape}")
        if count and int(box_regions.max()) >= regions:
            raise UsageError(f"row {row}: a box of region {int(box_regions.max())}; the store has {regions} regions")
        self._append(row, sample, maps, boxes, scores, box_regions, None)

    def append_quarantined(self, row: int, sample: Sample, *, reason: str, stage: str, message: str) -> None:
        """Keep a row that could not be computed; its maps are absent.

        Args:
            row: One of `missing`.
            sample: What is known of it.
            reason: Stable code, e.g. ``decode_failed``.
            stage: Where it happened, e.g. ``read``, ``ground``, ``segment``, ``worker``.
            message: Without patient data or absolute paths; cut at 500 characters.

        Raises:
            UsageError: Not a row that this shard lacks.
            DiskFullError: The row was not kept.
        """
        none = np.zeros(0, np.uint16)
        quarantine = {"reason": reason, "stage": stage, "message": message[:_MESSAGE_MAX]}
        maps = np.full(self.layout.maps_shape, ABSENT, np.uint8)
        self._append(row, sample, maps, np.zeros((0, 4), np.int32), none, none, quarantine)

    def entries(self) -> Iterator[Entry]:
        """Finished rows in row order, read back from the file."""
        return map(Entry.unpack, self.payloads())

    def payloads(self) -> Iterator[bytes]:
        """Finished rows in row order, each a packed `Entry`, read back from the file."""
        for row in sorted(self._places):
            start, length = self._places[row]
            yield os.pread(self._file.fileno(), length, start)

    def sync(self) -> None:
        """Make what was appended durable."""
        os.fsync(self._file.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def discard(self) -> None:
        """Give back the room of an assembled shard's rows; the file stays, it carries the lock."""
        self._file.truncate(0)
        self._places.clear()

    def close(self) -> None:
        """Sync and let go of the lock."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _append(
        self,
        row: int,
        sample: Sample,
        maps: np.ndarray[Any, Any],
        boxes: np.ndarray[Any, Any],
        scores: np.ndarray[Any, Any],
        box_regions: np.ndarray[Any, Any],
        quarantine: dict[str, str] | None,
    ) -> None:
        if row not in self.rows or row in self._places or self.assembled:
            raise UsageError(
                f"row {row}: not missing from shard {self.shard} ({self.rows.start} to {self.rows.stop - 1})"
            )
        line = SampleRow(
            row=row,
            sample_id=sample.sample_id,
            status="ok" if quarantine is None else "quarantined",
            source_sha256=sample.source_sha256,
            pixel_sha256=sample.pixel_sha256,
            frame=describe_frame(self.layout, sample),
            shape=sample.shape,
            spacing_mm=sample.spacing_mm,
            group=sample.group,
            maps_digest=row_digest(maps).hex(),
            detections_digest=detections_digest(boxes, scores, box_regions),
        )
        detections = b"".join(
            np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
            for array in (boxes, scores, box_regions)
        )
        entry = Entry(
            line,
            quarantine,
            encode_chunk(maps, compressed=True),
            encode_chunk(quarter(maps), compressed=False),
            detections,
        )
        self._write(row, entry.pack(with_maps=True))
        self._unsynced += 1
        if self._unsynced >= _SYNC_ROWS or time.monotonic() - self._synced_at >= _SYNC_S:
            self.sync()

    def _write(self, row: int | None, payload: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            with full_disk_is_named(self.folder, len(payload)):
                rest = memoryview(frame(payload))
                while rest:
                    rest = rest[self._file.write(rest) :]
        except BaseException:
            self._file.truncate(end)  # a later append must not come to lie behind a torn one
            raise
        if row is not None:
            self._places[row] = end + FRAME_BYTES, len(payload)

    def _recover(self) -> None:
        head: dict[str, Any] = {"layout": self.layout.digest(), "shard": self.shard}
        self._file.seek(0)
        end = 0
        for start, payload in unframe(self._file):
            if end == 0:
                if payload != rfc8785.dumps(head):
                    raise SpecMismatchError(
                        f"{self.path}: belongs to another store", hint="name another folder with --out"
                    )
            else:
                line = Entry.unpack(payload).line
                self._places[line.row] = start, len(payload)
            end = start + len(payload)
        self.cut_bytes = self._file.seek(0, os.SEEK_END) - end
        self._file.truncate(end)
        if end == 0:
            self._write(None, rfc8785.dumps(head))
            fsync_folder(self.path.parent)


def open_layout(folder: Path) -> Layout:
    """The layout of a store in the making.

    Raises:
        InputMissingError: `create_store` has not finished here, or the store is past its journal.
    """
    try:
        return Layout.from_json((folder / LAYOUT).read_bytes())
    except FileNotFoundError:
        raise InputMissingError(f"{folder}: no region store in the making", hint=f"it has no {LAYOUT}") from None


def done_path(folder: Path, shard: int) -> Path:
    """The file that marks a shard as assembled and keeps its rows' entries, without maps."""
    return folder / JOURNAL / f"shard-{shard:05d}.done"


def read_done(path: Path, layout: Layout, shard: int) -> list[Entry]:
    """Entries, without maps, of an assembled shard.

    Raises:
        CorruptError: The file is not what was written.
    """
    rows = layout.rows(shard)
    with path.open("rb", buffering=0) as file:
        payloads = [payload for _, payload in unframe(file)]
        whole = file.seek(0, os.SEEK_END) == sum(len(payload) + FRAME_BYTES for payload in payloads)
    entries = [Entry.unpack(payload) for payload in payloads]
    if not whole or [entry.line.row for entry in entries] != list(rows):
        raise CorruptError(f"{path}: damaged", hint="delete it: the same command computes its shard again")
    return entries
