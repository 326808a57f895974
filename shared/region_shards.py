"""Zarr v3 shards of one row a chunk, written whole and read row by row with every checksum verified.

What is written is what zarr itself writes for ``sharding_indexed`` (chunks, then the index and its crc32c),
so any Zarr v3 reader opens it. Writing it here lets a worker copy finished chunks from its journal without
decoding them; reading it here tells which row is broken instead of which call failed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc

_NO_CHUNK = 2**64 - 1
_CRC = struct.Struct("<I")
_BLOSC_SIZES = struct.Struct("<4xIII")


class ShardDamage(ValueError):
    """Bytes of a shard that are not what was written; says what, and the caller knows which row."""


class IndexDamage(ShardDamage):
    """The shard is missing or its index is damaged: none of its rows can be read."""


def encode_chunk(row: np.ndarray[Any, Any], *, compressed: bool) -> bytes:
    """A row as a chunk: its bytes, blosc-lz4 without shuffle if ``compressed``, then crc32c."""
    data = np.ascontiguousarray(row).tobytes()
    if compressed:
        data = blosc.compress(data, b"lz4", 5, blosc.NOSHUFFLE)
    return data + crc32c(data)


def decode_chunk(chunk: bytes, out: np.ndarray[Any, Any], *, compressed: bool) -> None:
    """Decode a chunk into ``out`` (uint8, contiguous) once its checksum is right.

    Raises:
        ShardDamage: Checksum or size differ.
    """
    data = chunk[: -_CRC.size]
    if len(chunk) < _CRC.size or crc32c(data) != chunk[-_CRC.size :]:
        raise ShardDamage("checksum of its chunk differs")
    if not compressed:
        if len(data) != out.nbytes:
            raise ShardDamage(f"its chunk holds {len(data)} bytes, expected {out.nbytes}")
        out.reshape(-1)[:] = np.frombuffer(data, np.uint8)
        return
    # Sizes are checked before decompressing: a checksum can be forged, a buffer must not overflow.
    if len(data) < 16 or (sizes := _BLOSC_SIZES.unpack_from(data))[0] != out.nbytes or sizes[2] != len(data):
        raise ShardDamage("its chunk has another size than its map")
    try:
        blosc.decompress(data, out)
    except (RuntimeError, ValueError) as error:
        raise ShardDamage(f"its chunk does not decompress: {error}") from None


def write_shard(path: Path, chunks: Iterable[bytes], rows_per_shard: int) -> None:
    """Write a whole shard beside its place, sync it, rename it in: torn shards never carry the name.

    Args:
        path: The shard's file; its folder exists.
        chunks: From `encode_chunk`, in row order; fewer than ``rows_per_shard`` only in the last shard.
        rows_per_shard: Length of the index.
    """
    index = np.full((rows_per_shard, 2), _NO_CHUNK, "<u8")
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        offset = 0
        for number, chunk in enumerate(chunks):
            index[number] = offset, len(chunk)
            offset += file.write(chunk)
        data = index.tobytes()
        file.write(data + crc32c(data))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_index(path: Path, rows_per_shard: int) -> np.ndarray[Any, Any]:
    """Offsets and lengths, uint64 [rows_per_shard, 2]; rows without a chunk hold the largest uint64.

    Raises:
        IndexDamage: Missing, short, or its checksum differs.
    """
    size = rows_per_shard * 16 + _CRC.size
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            if file.tell() < size:
                raise IndexDamage("shard is shorter than its index")
            file.seek(-size, os.SEEK_END)
            data = file.read(size)
    except (FileNotFoundError, IsADirectoryError):
        raise IndexDamage("missing") from None
    if crc32c(data[: -_CRC.size]) != data[-_CRC.size :]:
        raise IndexDamage("checksum of the shard's index differs")
    return np.frombuffer(data, "<u8", rows_per_shard * 2).reshape(rows_per_shard, 2)


def check_tiling(path: Path, index: np.ndarray[Any, Any], rows: int) -> None:
    """Every byte of the file belongs to a chunk of one of the first ``rows`` rows, in order, or to the index.

    Raises:
        ShardDamage: Otherwise: a chunk is missing, shared or surplus, or bytes lie between.
    """
    spans = index.astype(object)
    ends = [0, *(int(offset) + int(length) for offset, length in spans[:rows])]
    starts = [int(offset) for offset, _ in spans[:rows]]
    surplus = bool((index[rows:] != _NO_CHUNK).any())
    if starts != ends[:-1] or surplus or ends[-1] + index.nbytes + _CRC.size != path.stat().st_size:
        raise ShardDamage("chunks do not fill the shard in row order")


def read_chunks(path: Path, index: np.ndarray[Any, Any], places: Sequence[int]) -> Iterable[bytes | ShardDamage]:
    """Chunks at places of a shard, in the order asked; a damaged one is given as what is the matter with it."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for place in places:
            offset, length = (int(value) for value in index[place])
            if offset == _NO_CHUNK:
                yield ShardDamage("its chunk is missing")
            elif offset + length > size:
                yield ShardDamage("its chunk lies outside of the shard")
            else:
                yield os.pread(file.fileno(), length, offset)


def crc32c(data: bytes) -> bytes:
    """CRC-32C, little-endian, as Zarr v3 appends it."""
    return _CRC.pack(google_crc32c.value(data))
