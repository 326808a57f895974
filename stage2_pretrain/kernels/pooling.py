"""`stage2_pretrain.masking.coverage.pool` as fast host code: the same numbers, a hundred times as fast.

A band of map rows is added up column by column, in loops that the compiler turns into vector instructions; the band's
sums over its cells are differences of running sums. A map is read twice, the first time for a value that may not be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8
from numba import int64, njit, uint8, uint16, uint32

from shared.region_layout import ABSENT
from stage2_pretrain.masking.coverage import pool as pool_reference

_NUMBA: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_ABSENT = uint8(ABSENT)
_ROWS_MAX = (1 << 16) // ABSENT


def pool(
    maps: UInt8[np.ndarray, "B K H W"], windows: Int32[np.ndarray, "B 8"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "B K L"]:
    """Pool as `stage2_pretrain.masking.coverage.pool`, which says what the arguments mean and what is refused."""
    if maps.shape[2] * maps.shape[3] >= 1 << 24 or maps.shape[2] > _ROWS_MAX * min(grid):
        return pool_reference(maps, windows, grid)  # sums are kept in 32 bits, those of a column of a cell in 16
    out = np.empty((*maps.shape[:2], grid[0] * grid[1]), np.uint8)
    wrong = _compiled()(np.ascontiguousarray(maps), np.ascontiguousarray(windows, np.int32), grid[0], grid[1], out)
    if wrong >= 0:
        pool_reference(maps[: wrong + 1], windows[: wrong + 1], grid)
    return out


@cache
def _compiled() -> Callable[..., int]:
    """The machine code, kept on disk where there is a place for it: compiling takes a second or two."""
    signature = "int64(uint8[:,:,:,::1], int32[:,::1], int64, int64, uint8[:,:,::1])"
    compiled: Callable[..., int]
    with contextlib.suppress(RuntimeError):  # numba's, where neither this folder nor the user's cache is writable
        compiled = njit(signature, cache=True, **_NUMBA)(_pool)
        return compiled
    compiled = njit(signature, **_NUMBA)(_pool)
    return compiled


def _pool(maps: Any, windows: Any, grid_rows: Any, grid_columns: Any, out: Any) -> int:
    """Fill ``out``; the first sample that the reference refuses, or -1."""
    batch, regions, height, width = maps.shape
    row_edges, column_edges = np.empty(height + width + 1, np.int64), np.empty(height + width + 1, np.int64)
    band, sums = np.empty(width, np.uint16), np.zeros(width + 1, np.uint32)
    for b in range(batch):
        flip, turns = windows[b, 6], windows[b, 7]
        rows, columns = (grid_columns, grid_rows) if turns % 2 else (grid_rows, grid_columns)
        if not _edges(row_edges, windows[b, 0], windows[b, 2], windows[b, 4], height, rows):
            return b
        if not _edges(column_edges, windows[b, 1], windows[b, 3], windows[b, 5], width, columns):
            return b
        for k in range(regions):
            if _largest(maps[b, k].reshape(-1)) == _ABSENT:
                return b
            for i in range(rows):
                top, bottom = row_edges[i], row_edges[i + 1]
                _add_rows(maps[b, k], top, bottom, band)
                for x in range(column_edges[0], column_edges[columns]):
                    sums[x + 1] = uint32(sums[x] + uint32(band[x]))
                for j in range(columns):
                    total = uint32(sums[column_edges[j + 1]] - sums[column_edges[j]])
                    size = uint32((bottom - top) * (column_edges[j + 1] - column_edges[j]))
                    place = _turned(i, j, rows, columns, flip, turns)
                    out[b, k, place] = (total + size // uint32(2)) // size
    return -1


@njit(**_NUMBA)
def _edges(edges: Any, start: Any, length: Any, image_px: Any, map_px: Any, cells: Any) -> bool:
    """`stage2_pretrain.masking.coverage.cell_edges`; False where a cell is smaller than one map pixel."""
    n = int64(image_px)
    first = (2 * int64(start) * map_px + n) // (2 * n)
    last = (2 * (int64(start) + int64(length)) * map_px + n) // (2 * n)
    if last - first < cells:
        return False
    for j in range(cells + 1):
        edges[j] = first + (j * (last - first) + cells // 2) // cells
    return True


@njit(**_NUMBA)
def _largest(values: Any) -> Any:
    largest = uint8(0)
    for i in range(len(values)):
        value = values[i]
        largest = value if value > largest else largest
    return largest


@njit(**_NUMBA)
def _add_rows(part: Any, top: Any, bottom: Any, band: Any) -> None:
    """Sums of the columns of some rows of a map; four rows at a time, or it would wait for its own sums."""
    band[:] = 0
    y = top
    while y + 4 <= bottom:
        first, second, third, fourth = part[y], part[y + 1], part[y + 2], part[y + 3]
        for x in range(len(band)):
            upper = uint16(uint16(first[x]) + uint16(second[x]))
            lower = uint16(uint16(third[x]) + uint16(fourth[x]))
            band[x] = uint16(band[x] + uint16(upper + lower))
        y += 4
    while y < bottom:
        row = part[y]
        for x in range(len(band)):
            band[x] = uint16(band[x] + uint16(row[x]))
        y += 1


@njit(**_NUMBA)
def _turned(i: Any, j: Any, rows: Any, columns: Any, flip: Any, turns: Any) -> Any:
    """Where cell (i, j) lies once mirrored and turned, row by row; `stage2_pretrain.masking.coverage.orient`."""
    if flip:
        j = columns - 1 - j
    for _ in range(turns):
        i, j = columns - 1 - j, i
        rows, columns = columns, rows
    return i * columns + j
