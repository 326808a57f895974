"""The Zarr arrays of a region store: created with zarr, rows of maps read straight from the shards.

``maps`` and ``maps_quarter`` are sharded, one row a chunk. Detections are ragged: four flat arrays and
offsets, because their number has no natural bound (padding would need a cap, and a cap would drop boxes);
they are small, so one process writes them when the store is finalised.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt16, UInt32

from shared.artifact import file_sha256
from shared.errors import CorruptError, IncompatibleError
from shared.region_layout import ABSENT, ARRAYS, RESTORE, Layout
from shared.region_shards import Shard, ShardDamage, check_tiling, decode_chunk

DETECTIONS = ("boxes", "scores", "box_regions", "box_offsets")
_METADATA_BYTES_MAX = 1 << 20
_FLAT_CHUNK = 1 << 16
_OPEN_MAX = 192
"""Shard files that an array keeps open; a process may open 1024 on most systems."""
_SLOW_S = 60e-6
"""Above it, a row was waited for; from the page cache it takes half of it."""
_SEPARATOR: dict[str, Any] = {"name": "default", "separator": "."}


def create_arrays(root: Path, layout: Layout) -> None:
    """Write the metadata of the group and of both arrays of maps; their shards come one by one."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    encoding = "floor(254 p + 0.5); 255 absent; maps_quarter: mean of cells of 4 map pixels a side, rounded half up"
    group = zarr.create_group(
        root, attributes={"mask-what-matters": {"version": 1, "regions": list(layout.regions), "encoding": encoding}}
    )
    blosc = BloscCodec(cname="lz4hc", clevel=5, shuffle="noshuffle")
    for name, shape, codecs in (
        ("maps", layout.maps_shape, [blosc, Crc32cCodec()]),
        ("maps_quarter", layout.quarter_shape, [Crc32cCodec()]),
    ):
        group.create_array(
            name,
            shape=(layout.samples, *shape),
            chunks=(1, *shape),
            shards=(layout.rows_per_shard, *shape),
            dtype="uint8",
            fill_value=ABSENT,
            compressors=codecs,
            chunk_key_encoding=_SEPARATOR,
            dimension_names=("sample", "region", *"dyx"[3 - len(layout.grid) :]),
        )


def create_detections(
    root: Path,
    boxes: Int32[np.ndarray, "M 4"],
    scores: UInt16[np.ndarray, "M"],
    box_regions: UInt16[np.ndarray, "M"],
    box_offsets: Int64[np.ndarray, "N1"],
) -> None:
    """Write the flat arrays; those of an interrupted attempt are replaced."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    group = zarr.open_group(root, mode="r+")
    for name, data in zip(DETECTIONS, (boxes, scores, box_regions, box_offsets), strict=True):
        shutil.rmtree(root / name, ignore_errors=True)
        array = group.create_array(
            name,
            shape=data.shape,
            chunks=(_FLAT_CHUNK, *data.shape[1:]),
            dtype=data.dtype,
            fill_value=0,
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle"), Crc32cCodec()],
            chunk_key_encoding=_SEPARATOR,
            config={"write_empty_chunks": True},
        )
        if len(data):
            array[:] = data


def read_detections(
    root: Path, samples: int, detections: int
) -> tuple[Int32[np.ndarray, "M 4"], UInt16[np.ndarray, "M"], UInt16[np.ndarray, "M"], Int64[np.ndarray, "N1"]]:
    """Boxes, scores, regions and offsets of all rows, checksums verified.

    Args:
        root: Folder of the arrays.
        samples: N, on the card.
        detections: M, on the card.

    Raises:
        CorruptError: A file is missing or damaged; names the array.
    """
    import zarr

    arrays = []
    for name, shape in zip(DETECTIONS, ([detections, 4], [detections], [detections], [samples + 1]), strict=True):
        found = read_metadata(root / name).get("shape")
        if found != shape:
            raise CorruptError(f"{root.name}/{name}: shape {str(found)[:40]}, expected {shape}", hint=RESTORE)
        missing = [path.name for path in expected_files(root / name) if not path.is_file()]
        if missing:
            raise CorruptError(f"{root.name}/{name}/{missing[0]}: missing", hint=RESTORE)
        try:
            array = zarr.open_array(root / name, mode="r")
            arrays.append(np.asarray(array[:]))
        except Exception as error:
            # What zarr raises depends on which byte was hit, AttributeError included; the array's name helps.
            reason = [*str(error).splitlines(), "unreadable"][0][:120]
            raise CorruptError(f"{root.name}/{name}: {reason}", hint=RESTORE) from None
    boxes, scores, box_regions, box_offsets = arrays
    if box_offsets[0] != 0 or box_offsets[-1] != detections or bool((np.diff(box_offsets) < 0).any()):
        raise CorruptError(f"{root.name}/box_offsets: do not cut {detections} detections into rows", hint=RESTORE)
    return boxes, scores, box_regions, box_offsets


class ShardedArray:
    """Rows of ``maps`` or ``maps_quarter``, read from the shard files with every checksum verified.

    Args:
        folder: The array's, with its ``zarr.json``.

    Attributes:
        shape: [N, K, *grid].
        rows_per_shard: Rows a shard file holds.

    Raises:
        CorruptError: Its metadata cannot be read.
        IncompatibleError: Stored in a way this release does not read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = read_metadata(folder)
        try:
            sharding = meta["codecs"][0]["configuration"]
            names = [codec["name"] for codec in sharding["codecs"]]
            self.shape = tuple(int(size) for size in meta["shape"])
            self.rows_per_shard = int(meta["chunk_grid"]["configuration"]["chunk_shape"][0])
            known = (
                meta["data_type"] == "uint8"
                and tuple(sharding["chunk_shape"]) == (1, *self.shape[1:])
                and tuple(meta["chunk_grid"]["configuration"]["chunk_shape"][1:]) == self.shape[1:]
                and names in (["bytes", "blosc", "crc32c"], ["bytes", "crc32c"])
                and [codec["name"] for codec in sharding["index_codecs"]] == ["bytes", "crc32c"]
                and meta["chunk_key_encoding"]["configuration"]["separator"] == "."
            )
        except (KeyError, IndexError, TypeError, ValueError):
            raise CorruptError(f"{folder.name}/zarr.json: not an array of maps", hint=RESTORE) from None
        if not known or self.rows_per_shard < 1:
            raise IncompatibleError(f"{folder.name}/zarr.json: stored in a way this release does not read")
        self._compressed = "blosc" in names
        self._shards: dict[int, Shard] = {}
        self._opened: OrderedDict[int, Shard] = OrderedDict()
        self._slow = False

    @property
    def shards(self) -> int:
        """Number of shard files."""
        return -(-self.shape[0] // self.rows_per_shard)

    def shard_of(self, row: int) -> Path:
        """The file that holds a row."""
        return shard_path(self.folder, row // self.rows_per_shard, len(self.shape) - 1)

    def read(
        self, rows: Sequence[int], out: np.ndarray[Any, Any], checksums: UInt32[np.ndarray, "n"] | None = None
    ) -> dict[int, ShardDamage]:
        """Fill ``out[i]`` with row ``rows[i]``; any order, repeats allowed.

        Args:
            rows: In 0..N-1.
            out: uint8 [len(rows), *shape[1:]], contiguous.
            checksums: Gets the crc32c of each chunk, which is right: by it a row is known again.

        Returns:
            What is the matter with each row that could not be read; its place in ``out`` is then undefined.
        """
        damaged: dict[int, ShardDamage] = {}
        began = time.perf_counter()
        order = sorted(range(len(rows)), key=rows.__getitem__)
        if self._slow:
            self._announce(sorted(rows))
        for number, places in groupby(order, key=lambda place: rows[place] // self.rows_per_shard):
            wanted = list(places)
            try:
                shard = self._shard(number)
            except ShardDamage as damage:
                damaged |= {rows[place]: damage for place in wanted}
                continue
            for place in wanted:
                try:
                    chunk = shard.chunk(rows[place] % self.rows_per_shard)
                    checksum = decode_chunk(chunk, out[place], compressed=self._compressed)
                except ShardDamage as damage:
                    damaged[rows[place]] = damage
                else:
                    if checksums is not None:
                        checksums[place] = checksum
        self._slow = len(rows) > 1 and time.perf_counter() - began > _SLOW_S * len(rows)
        return damaged

    def _announce(self, rows: Sequence[int]) -> None:
        """Let a disk, or a server, look for all rows at once, where the last ones had to be waited for."""
        for row in rows:
            with suppress(ShardDamage):
                self._shard(row // self.rows_per_shard).announce(row % self.rows_per_shard)

    def check_shard(self, number: int) -> ShardDamage | None:
        """Whether every byte of a shard's file belongs to one of its rows or to its index."""
        try:
            rows = min(self.rows_per_shard, self.shape[0] - number * self.rows_per_shard)
            check_tiling(self._shard(number), rows)
        except ShardDamage as damage:
            return damage
        return None

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            path = shard_path(self.folder, number, len(self.shape) - 1)
            shard = self._shards[number] = Shard(path, self.rows_per_shard)
        self._opened[number] = shard
        self._opened.move_to_end(number)
        if len(self._opened) > _OPEN_MAX:
            self._opened.popitem(last=False)[1].close()
        return shard


def shard_path(array: Path, shard: int, axes: int) -> Path:
    """File of a shard; ``axes`` counts those behind the rows, which are never cut."""
    return array / ".".join(["c", str(shard), *["0"] * axes])


def expected_files(array: Path) -> list[Path]:
    """Every file that an array of this store consists of, by its metadata.

    Raises:
        CorruptError: Its metadata cannot be read.
    """
    meta = read_metadata(array)
    try:
        shape, chunk = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        parts = -(-int(shape[0]) // int(chunk[0]))
        axes = len(shape) - 1
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        raise CorruptError(f"{array.name}/zarr.json: not an array of a region store", hint=RESTORE) from None
    return [array / "zarr.json", *(shard_path(array, part, axes) for part in range(parts))]


def read_metadata(array: Path) -> dict[str, Any]:
    """Content of an array's ``zarr.json``.

    Raises:
        CorruptError: Missing, oversized or not JSON.
    """
    path = array / "zarr.json"
    try:
        if path.stat().st_size > _METADATA_BYTES_MAX:
            raise ValueError("oversized")
        meta = json.loads(path.read_bytes())
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError):
        raise CorruptError(f"{array.name}/zarr.json: missing or not metadata of an array", hint=RESTORE) from None
    return meta


def check_metadata(store: Path, name: str, files: Mapping[str, str]) -> None:
    """Compare an array's ``zarr.json`` with the card before anything trusts its sizes.

    Args:
        store: The artifact's folder.
        name: The array.
        files: ``provenance.files`` of the card.

    Raises:
        CorruptError: Missing, or not what was published.
    """
    listed = f"{ARRAYS}/{name}/zarr.json"
    if not (store / listed).is_file() or file_sha256(store / listed) != files.get(listed):
        raise CorruptError(f"{listed}: missing, or changed since it was published", hint=RESTORE)
