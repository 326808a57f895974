"""Digests of arrays that survive recompressing and resharding: a Merkle tree over decoded rows (RFC 6962).

A leaf is ``sha256(0x00 || entry)``, a node ``sha256(0x01 || left || right)``, a list is split at the largest
power of two below its length. Values count, not their storage: little-endian, C order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rfc8785


def row_digest(array: np.ndarray[Any, Any]) -> bytes:
    """sha256 (32 bytes) of a row's values; `array_root` adds dtype and shape.

    Args:
        array: Any shape; of a number or bool dtype.

    Raises:
        TypeError: An object or text array has no defined bytes.
    """
    return hashlib.sha256(_values(array)).digest()


def merkle_root(entries: Sequence[bytes]) -> str:
    """Merkle tree hash (hex) of a list of entries, RFC 6962 section 2.1.

    Args:
        entries: In order; may be empty.

    Returns:
        The root; of no entries, the sha256 of nothing.

    >>> merkle_root([])[:16]
    'e3b0c44298fc1c14'
    """
    level = [hashlib.sha256(b"\x00" + entry).digest() for entry in entries]
    if not level:
        return hashlib.sha256().hexdigest()
    while len(level) > 1:
        # Pairing neighbours and carrying an odd last one up builds the tree of the RFC's recursive split.
        paired = [hashlib.sha256(b"\x01" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0].hex()


def array_root(dtype: str, shape: Sequence[int], row_digests: Sequence[bytes]) -> str:
    """Digest (hex) of an array: sha256 of the RFC 8785 JSON of its dtype, shape and Merkle root.

    Args:
        dtype: Name without byte order, e.g. ``"uint8"``.
        shape: The array's; the first axis has one digest a row.
        row_digests: `row_digest` of every row.

    Raises:
        ValueError: The number of digests is not the number of rows.
    """
    if not shape or shape[0] != len(row_digests):
        raise ValueError(f"{len(row_digests)} row digests for an array of shape {tuple(shape)}")
    body: dict[str, Any] = {"dtype": dtype, "shape": [int(size) for size in shape], "root": merkle_root(row_digests)}
    return hashlib.sha256(rfc8785.dumps(body)).hexdigest()


def tensor_digest(tensors: Mapping[str, Any]) -> str:
    """sha256 (hex) of named arrays: names sorted, each with dtype, shape and values.

    Args:
        tensors: Name -> NumPy array or what ``numpy.asarray`` takes (bfloat16: give its uint16 view).

    >>> tensor_digest({"a": np.zeros(2)}) == tensor_digest({"a": np.zeros((2, 1))})
    False
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        about: dict[str, Any] = {"name": name, "dtype": array.dtype.name, "shape": [int(size) for size in array.shape]}
        head = rfc8785.dumps(about)
        values = _values(array)
        total.update(len(head).to_bytes(8, "little") + head)
        total.update(values)
    return total.hexdigest()


def _values(array: np.ndarray[Any, Any]) -> memoryview | bytes:
    array = np.asarray(array)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"no digest is defined for dtype {array.dtype}")
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return little.data.cast("B") if little.size else b""
