"""Making a region store: create it, fill shards from journals, finalise it in one process.

A worker's whole task, safe to run twice or to kill anywhere::

    with ShardJournal(folder, shard) as journal:
        for row in journal.missing:
            journal.append_maps(row, ...)  # or append_quarantined
        assemble_shard(journal)

The job's: `create_store`, a task for each of `pending_shards`, ``outputs = finalise(folder)``,
`drop_journal`, then `shared.artifact.publish`.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import rfc8785

from shared.artifact import file_sha256, fsync_folder, full_disk_is_named, write_atomic
from shared.canonical import canonical_json
from shared.errors import CorruptError, SpecMismatchError, UsageError
from shared.merkle import MerkleTree, array_root, row_digest
from shared.region_arrays import ShardedArray, create_arrays, create_detections, shard_path
from shared.region_journal import (
    JOURNAL,
    LAYOUT,
    ShardJournal,
    done_path,
    open_layout,
    read_done,
)
from shared.region_layout import ARRAYS, QUARANTINE, SAMPLES, Layout, plan_rows_per_shard, sample_ids_sha256
from shared.region_record import Entry, Sample, frame, split, without_maps
from shared.region_shards import write_shard

__all__ = [
    "Sample",
    "ShardDone",
    "ShardJournal",
    "assemble_shard",
    "create_store",
    "drop_journal",
    "finalise",
    "open_layout",
    "pending_shards",
]

FINISHED = "run/regions.json"
"""Layout and outputs: the last thing `finalise` writes, and what stands between journal and card."""


@dataclass(frozen=True)
class ShardDone:
    """What a task returns about its shard: no arrays."""

    shard: int
    rows: int
    quarantined: int
    digest: str


def create_store(folder: Path, *, sample_ids: Sequence[str], regions: Sequence[str], grid: Sequence[int]) -> Layout:
    """Create the arrays of a store, or find those of the same store that an earlier run has begun.

    Args:
        folder: Leased by the caller.
        sample_ids: Of every row, ascending, no two equal.
        regions: Names, in map order.
        grid: Size of a map in map pixels, (H, W) or (D, H, W), multiples of 4.

    Raises:
        UsageError: Ids or regions that are empty, repeated or unsorted.
        SpecMismatchError: Another store was begun here.
    """
    if any(left >= right for left, right in pairwise(sample_ids)):
        raise UsageError("sample ids of a store: expected ascending, no two equal")
    if len(set(regions)) != len(regions) or not all(regions):
        raise UsageError(f"regions {list(regions)}: expected names, no two equal")
    rows = plan_rows_per_shard(len(sample_ids), len(regions), tuple(grid))
    grid = tuple(int(size) for size in grid)
    layout = Layout(len(sample_ids), tuple(regions), grid, rows, sample_ids_sha256(sample_ids))
    finished = _read_finished(folder)
    found = finished[0] if finished else open_layout(folder) if (folder / LAYOUT).exists() else None
    if found is not None:
        if found != layout:
            raise SpecMismatchError(
                f"{folder}: holds {found.samples} samples, regions {list(found.regions)}, grid {found.grid}; "
                f"asked: {layout.samples}, {list(layout.regions)}, {layout.grid} (or other sample ids)",
                hint="name another folder with --out",
            )
        return layout
    with full_disk_is_named(folder, 1 << 20):
        shutil.rmtree(folder / ARRAYS, ignore_errors=True)
        (folder / JOURNAL).mkdir(parents=True, exist_ok=True)
        create_arrays(folder / ARRAYS, layout)
        _sync_tree(folder / ARRAYS)
        fsync_folder(folder)
        write_atomic(folder / LAYOUT, layout.to_json())
    return layout


def pending_shards(folder: Path) -> list[int]:
    """Shards that are not assembled yet; empty once finalised."""
    if _read_finished(folder) and not (folder / LAYOUT).exists():
        return []
    layout = open_layout(folder)
    return [shard for shard in range(layout.shards) if not done_path(folder, shard).exists()]


def assemble_shard(journal: ShardJournal) -> ShardDone:
    """Write a shard of every array from its complete journal; done twice, it does nothing.

    The arrays' shards are renamed in and synced before the shard is marked as done, and only then is the
    journal's room given back: a kill anywhere leaves either all rows in the journal or a marked shard.

    Raises:
        UsageError: Rows are missing.
        DiskFullError: Nothing is lost; the same call continues.
    """
    if not journal.assembled:
        if journal.missing:
            raise UsageError(
                f"shard {journal.shard}: {len(journal.missing)} rows are missing, e.g. {journal.missing[0]}"
            )
        arrays, per_shard = journal.folder / ARRAYS, journal.layout.rows_per_shard
        with full_disk_is_named(journal.folder, journal.path.stat().st_size):
            for name, part in (("maps", 1), ("maps_quarter", 2)):
                path = shard_path(arrays / name, journal.shard, len(journal.layout.maps_shape))
                write_shard(path, (split(payload)[part] for payload in journal.payloads()), per_shard)
                fsync_folder(path.parent)
            records = b"".join(frame(without_maps(payload)) for payload in journal.payloads())
            write_atomic(journal.done_path, records)
    journal.discard()
    entries = read_done(journal.done_path, journal.layout, journal.shard)
    quarantined = sum(entry.quarantine is not None for entry in entries)
    return ShardDone(journal.shard, len(entries), quarantined, file_sha256(journal.done_path))


def finalise(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Read every row once, digest it, and write what makes the arrays a store; done twice, it gives the same.

    Args:
        folder: Every shard assembled.
        progress: Called with rows done and rows in all.

    Returns:
        Float-free ``outputs`` for the card: ``samples ok quarantined`` counts, ``quarantine_reasons``,
        ``regions`` (name and number of empty maps each), ``grid``, ``detections`` (count), ``maps_root``,
        ``detections_root``, ``samples_sha256``, ``quarantine_sha256``.

    Raises:
        UsageError: Shards are missing.
        CorruptError: A row is not what the worker wrote; names it.
        DiskFullError: The same call continues.
    """
    finished = _read_finished(folder)
    if finished and not (folder / LAYOUT).exists():
        return finished[1]
    layout = open_layout(folder)
    pending = pending_shards(folder)
    if pending:
        raise UsageError(f"{folder}: {len(pending)} of {layout.shards} shards are not assembled, e.g. {pending[0]}")
    with full_disk_is_named(folder, layout.samples * 1024):
        outputs = _write_tables(folder, layout, _digested(folder, layout, progress or (lambda done, total: None)))
        for leftover in (folder / ARRAYS).rglob("*.partial"):  # a kill in zarr's own writing, done anew since
            leftover.unlink()
        (folder / "run").mkdir(exist_ok=True)
        body = {"layout": json.loads(layout.to_json()), "outputs": outputs}
        write_atomic(folder / FINISHED, rfc8785.dumps(body))
    return outputs


def drop_journal(folder: Path) -> None:
    """Remove the journal of a finalised store; safe to repeat.

    Raises:
        UsageError: Not finalised: the journal is the only record of finished rows.
    """
    if _read_finished(folder) is None:
        raise UsageError(f"{folder}: not finalised; its journal is still needed")
    trash = folder / "run" / "dropped-journal"
    shutil.rmtree(trash, ignore_errors=True)
    if (folder / JOURNAL).exists():
        # Renamed first: a journal removed in part would look like a store with nothing done.
        os.rename(folder / JOURNAL, trash)
        fsync_folder(folder)
        shutil.rmtree(trash)


def _digested(
    folder: Path, layout: Layout, progress: Callable[[int, int], None]
) -> Iterator[tuple[Entry, np.ndarray[Any, Any]]]:
    """Every row's entry, and which of its maps are empty, after comparing its digest with the worker's."""
    stored = ShardedArray(folder / ARRAYS / "maps")
    out = np.empty((1, *layout.maps_shape), np.uint8)
    for shard in range(layout.shards):
        done = done_path(folder, shard)
        for entry in read_done(done, layout, shard):
            row = entry.line.row
            damaged = stored.read([row], out)
            if damaged or row_digest(out).hex() != entry.line.maps_digest:
                raise CorruptError(
                    f"row {row} ({entry.line.sample_id}): {damaged.get(row, 'stored maps differ from those computed')}",
                    hint=f"delete {JOURNAL}/{done.name}: the same command computes its shard again",
                )
            yield entry, out.reshape(len(layout.regions), -1).max(axis=1) == 0
        progress(layout.rows(shard).stop, layout.samples)


def _write_tables(folder: Path, layout: Layout, rows: Iterator[tuple[Entry, np.ndarray[Any, Any]]]) -> dict[str, Any]:
    """Lines, detections and roots from one pass over all rows."""
    # Of every row a number and its detections' 20 bytes each stay in memory, digests only as roots.
    offsets, found = array("q", [0]), (bytearray(), bytearray(), bytearray())
    maps_tree, detections_tree = MerkleTree(), MerkleTree()
    empty = np.zeros(len(layout.regions), np.int64)
    reasons: Counter[str] = Counter()
    samples, quarantine = folder / SAMPLES, folder / QUARANTINE
    with _replacing(samples) as sample_lines, _replacing(quarantine) as quarantine_lines:

        def written() -> Iterator[str]:
            for entry, is_empty in rows:
                sample_lines.write(entry.line.to_line() + b"\n")
                if entry.quarantine is not None:
                    reasons[entry.quarantine["reason"]] += 1
                    body = {"sample_id": entry.line.sample_id, **entry.quarantine}
                    quarantine_lines.write(canonical_json(body) + b"\n")
                np.add(empty, is_empty, out=empty)
                maps_tree.add(bytes.fromhex(entry.line.maps_digest))
                detections_tree.add(bytes.fromhex(entry.line.detections_digest))
                for kept, part in zip(found, entry.boxes(), strict=True):
                    kept += part.tobytes()
                offsets.append(len(found[1]) // 2)
                yield entry.line.sample_id

        ids_sha256 = sample_ids_sha256(written())
    if ids_sha256 != layout.ids_sha256:
        raise CorruptError(f"{folder}: rows carry other sample ids than the store was created for")
    boxes, scores, regions = (
        np.frombuffer(kept, kind) for kept, kind in zip(found, ("<i4", "<u2", "<u2"), strict=True)
    )
    create_detections(folder / ARRAYS, boxes.reshape(-1, 4), scores, regions, np.frombuffer(offsets, np.int64))
    _sync_tree(folder / ARRAYS)
    fsync_folder(folder)
    return {
        "samples": layout.samples,
        "ok": layout.samples - reasons.total(),
        "quarantined": reasons.total(),
        "quarantine_reasons": dict(sorted(reasons.items())),
        "regions": [{"name": name, "empty": int(count)} for name, count in zip(layout.regions, empty, strict=True)],
        "grid": list(layout.grid),
        "detections": len(scores),
        "maps_root": array_root("uint8", (layout.samples, *layout.maps_shape), maps_tree),
        "detections_root": detections_tree.root(),
        "samples_sha256": file_sha256(samples),
        "quarantine_sha256": file_sha256(quarantine),
    }


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is whole and synced."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_folder(Path(folder))


def _read_finished(folder: Path) -> tuple[Layout, dict[str, Any]] | None:
    path = folder / FINISHED
    if not path.exists():
        return None
    body = json.loads(path.read_bytes())
    return Layout.from_json(rfc8785.dumps(body["layout"])), body["outputs"]
