"""Digests of arrays that survive recompressing and resharding: a Merkle tree over decoded rows (RFC 6962).

A leaf is ``sha256(0x00 || entry)``, a node ``sha256(0x01 || left || right)``, a list is split at the largest
power of two below its length. Values count, not their storage: little-endian, C order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shared.canonical import canonical_json


def row_digest(array: np.ndarray[Any, Any]) -> bytes:
    """sha256 (32 bytes) of a row's values; `array_root` adds dtype and shape.

    Args:
        array: Any shape; of a number or bool dtype.

    Raises:
        TypeError: An object or text array has no defined bytes.
    """
    return hashlib.sha256(_values(array)).digest()


class MerkleTree:
    """Merkle tree hash of a list of entries, RFC 6962 section 2.1, as they come: it keeps a digest a level.

    Args:
        entries: The first ones, in order; may be empty.

    Attributes:
        count: Entries so far.
    """

    def __init__(self, entries: Iterable[bytes] = ()) -> None:
        self.count = 0
        self._whole: list[tuple[int, bytes]] = []
        """Height and digest of the complete subtrees, from the left: each is higher than the next."""
        for entry in entries:
            self.add(entry)

    def add(self, entry: bytes) -> None:
        """Append an entry."""
        node, height = hashlib.sha256(b"\x00" + entry).digest(), 0
        while self._whole and self._whole[-1][0] == height:
            node, height = hashlib.sha256(b"\x01" + self._whole.pop()[1] + node).digest(), height + 1
        self._whole.append((height, node))
        self.count += 1

    def root(self) -> str:
        """The root (hex) over the entries so far; of none, the sha256 of nothing."""
        if not self._whole:
            return hashlib.sha256().hexdigest()
        root = self._whole[-1][1]
        for _, left in reversed(self._whole[:-1]):
            root = hashlib.sha256(b"\x01" + left + root).digest()
        return root.hex()


def merkle_root(entries: Iterable[bytes]) -> str:
    """Root (hex) of the tree of these entries.

    >>> merkle_root([])[:16]
    'e3b0c44298fc1c14'
    """
    return MerkleTree(entries).root()


def array_root(dtype: str, shape: Sequence[int], row_digests: Iterable[bytes] | MerkleTree) -> str:
    """Digest (hex) of an array: sha256 of the RFC 8785 JSON of its dtype, shape and Merkle root.

    Args:
        dtype: Name without byte order, e.g. ``"uint8"``.
        shape: The array's; the first axis has one digest a row.
        row_digests: `row_digest` of every row, or the tree of them.

    Raises:
        ValueError: The number of digests is not the number of rows.
    """
    tree = row_digests if isinstance(row_digests, MerkleTree) else MerkleTree(row_digests)
    if not shape or shape[0] != tree.count:
        raise ValueError(f"{tree.count} row digests for an array of shape {tuple(shape)}")
    body: dict[str, Any] = {"dtype": dtype, "shape": [int(size) for size in shape], "root": tree.root()}
    return hashlib.sha256(canonical_json(body)).hexdigest()


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
        head = canonical_json(about)
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
