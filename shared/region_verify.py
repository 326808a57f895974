"""Is a region store, to the last bit, what was published? Every difference is a finding, never an exception."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from shared.artifact import Card, Finding, file_sha256
from shared.errors import CorruptError, IncompatibleError
from shared.merkle import array_root, merkle_root, row_digest
from shared.region_arrays import DETECTIONS, ShardedArray, check_metadata, expected_files, read_detections
from shared.region_layout import ARRAYS, QUARANTINE, QUARTER, SAMPLES, SampleRow, quarter
from shared.region_record import detections_digest
from shared.region_samples import SampleTable
from shared.region_shards import IndexDamage, ShardDamage

_MAPS = ("maps", "maps_quarter")
_BATCH_BYTES = 16 << 20


def verify_store(path: Path, card: Card, rows: int | Sequence[int] | None = None) -> list[Finding]:
    """Compare arrays and lines of a store with its card; `shared.artifact.verify` compares its other files.

    Always checked: lines, roots, which files there are, the index of every shard, all detections. Checked for
    the rows asked: their checksums, digests and quarter level. Nothing is believed because a checksum is
    right: digests of the decoded values decide.

    Args:
        path: The artifact's folder.
        card: Its card, from `shared.artifact.read_card`.
        rows: None for all; a number to draw that many at random, anew each time; or the rows.

    Returns:
        Findings that name file, and row and sample where one is concerned; empty when all is as published.
    """
    outputs = card.identity.outputs
    try:
        count, regions, grid = int(outputs["samples"]), len(outputs["regions"]), [int(size) for size in outputs["grid"]]
        detections = int(outputs["detections"])
        roots = str(outputs["maps_root"]), str(outputs["detections_root"])
        lines_sha256, quarantine_sha256 = str(outputs["samples_sha256"]), str(outputs["quarantine_sha256"])
    except (KeyError, TypeError, ValueError):
        return [Finding("artifact.json", "its outputs are not those of a region store")]
    found = []
    broken = set()
    for name in (*_MAPS, *DETECTIONS):
        try:
            check_metadata(path, name, card.provenance.files)
        except CorruptError as error:
            broken.add(name)
            found.append(Finding(f"{ARRAYS}/{name}/zarr.json", _without_name(error)))
    found += _files(path, broken)
    if not (path / QUARANTINE).is_file() or file_sha256(path / QUARANTINE) != quarantine_sha256:
        found.append(Finding(QUARANTINE, "missing, or changed since it was published"))
    try:
        samples = SampleTable(path / SAMPLES, count, lines_sha256)
        digests = [bytes.fromhex(sample.maps_digest) for sample in samples]
        boxes = [bytes.fromhex(sample.detections_digest) for sample in samples]
    except (CorruptError, ValueError, TypeError) as error:
        return [*found, Finding(SAMPLES, f"{error}; rows were not compared")]
    if array_root("uint8", (count, regions, *grid), digests) != roots[0] or merkle_root(boxes) != roots[1]:
        found.append(Finding(SAMPLES, "its digests do not add up to the roots on the card"))
    wanted = _wanted(rows, count)
    if not broken & set(_MAPS):
        found += _maps(path, samples, wanted)
    if not broken & set(DETECTIONS):
        found += _detections(path, samples, detections)
    return found


def _wanted(rows: int | Sequence[int] | None, count: int) -> list[int]:
    if rows is None:
        return list(range(count))
    if isinstance(rows, int):
        # From the system's own source: who made the store must not be able to foresee what is looked at.
        return sorted(random.SystemRandom().sample(range(count), min(rows, count)))
    return sorted({row for row in rows if 0 <= row < count})


def _files(path: Path, broken: set[str]) -> Iterator[Finding]:
    """Files below the arrays' folder that should not be there, and those that should."""
    root = path / ARRAYS
    if root.is_symlink():
        yield Finding(ARRAYS, "does not belong to the store")
    expected = {root / "zarr.json"}
    for name in (*_MAPS, *DETECTIONS):
        if name in broken:  # its sizes are not to be trusted, so neither is a list of its chunks
            expected |= {file for file in (root / name).glob("*") if not file.is_symlink()}
            continue
        try:
            expected |= set(expected_files(root / name))
        except CorruptError as error:
            yield Finding(f"{ARRAYS}/{name}/zarr.json", _without_name(error))
    present = {file for file in root.rglob("*") if file.is_symlink() or not file.is_dir()}
    for file in sorted(expected | present):
        name = file.relative_to(path).as_posix()
        if file not in present:
            yield Finding(name, "missing")
        elif file not in expected or file.is_symlink():
            yield Finding(name, "does not belong to the store")


def _maps(path: Path, samples: Sequence[SampleRow], wanted: Sequence[int]) -> Iterator[Finding]:
    try:
        maps, small = (ShardedArray(path / ARRAYS / name) for name in _MAPS)
        cells = tuple(size // QUARTER for size in maps.shape[2:])
        if maps.shape[0] != len(samples) or small.shape != (*maps.shape[:2], *cells):
            raise CorruptError(f"shapes {maps.shape} and {small.shape} do not fit {len(samples)} samples")
    except (CorruptError, IncompatibleError) as error:
        yield Finding(ARRAYS, error.message)
        return
    unreadable: dict[str, set[int]] = {}
    for array in (maps, small):
        for shard in range(array.shards):
            damage = array.check_shard(shard)
            file = array.shard_of(shard * array.rows_per_shard)
            if damage is None:
                continue
            if isinstance(damage, IndexDamage):
                unreadable.setdefault(array.folder.name, set()).add(shard)
            if file.is_file():  # a missing one is among the missing files already
                rows = shard * array.rows_per_shard, min((shard + 1) * array.rows_per_shard, len(samples)) - 1
                yield Finding(file.relative_to(path).as_posix(), f"rows {rows[0]} to {rows[1]}: {damage}")
    for shard, group in groupby(wanted, key=lambda row: row // maps.rows_per_shard):
        rows_ = list(group)
        step = max(1, _BATCH_BYTES // int(np.prod(maps.shape[1:])))
        lost = {name for name, shards in unreadable.items() if shard in shards}
        for start in range(0, len(rows_), step):
            yield from _batch(path, maps, small, samples, rows_[start : start + step], lost)


def _batch(
    path: Path,
    maps: ShardedArray,
    small: ShardedArray,
    samples: Sequence[SampleRow],
    rows: Sequence[int],
    lost: set[str],
) -> Iterator[Finding]:
    values: dict[str, np.ndarray[Any, Any]] = {}
    damaged: dict[str, dict[int, ShardDamage | None]] = {}
    for array in (maps, small):
        name = array.folder.name
        values[name] = np.empty((len(rows), *array.shape[1:]), np.uint8)
        damaged[name] = dict.fromkeys(rows) if name in lost else {**array.read(rows, values[name])}
        for row, damage in damaged[name].items():
            if damage is not None:
                yield _row_finding(path, array, samples[row], str(damage))
    for place, row in enumerate(rows):
        if row in damaged["maps"]:
            continue
        if row_digest(values["maps"][place]).hex() != samples[row].maps_digest:
            yield _row_finding(path, maps, samples[row], "its maps are not those that were published")
        if row not in damaged["maps_quarter"] and not np.array_equal(
            quarter(values["maps"][place]), values["maps_quarter"][place]
        ):
            yield _row_finding(path, small, samples[row], "its quarter level does not follow from its maps")


def _row_finding(path: Path, array: ShardedArray, sample: SampleRow, problem: str) -> Finding:
    file = array.shard_of(sample.row).relative_to(path).as_posix()
    return Finding(file, f"row {sample.row} ({sample.sample_id}): {problem}")


def _detections(path: Path, samples: Sequence[SampleRow], detections: int) -> Iterator[Finding]:
    try:
        boxes, scores, regions, offsets = read_detections(path / ARRAYS, len(samples), detections)
    except CorruptError as error:
        yield Finding(ARRAYS, error.message)
        return
    for sample, start, stop in zip(samples, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        part = slice(start, stop)
        if detections_digest(boxes[part], scores[part], regions[part]) != sample.detections_digest:
            problem = f"row {sample.row} ({sample.sample_id}): its detections are not those that were published"
            yield Finding(f"{ARRAYS}/boxes", problem)


def _without_name(error: CorruptError) -> str:
    return error.message.partition(": ")[2]
