"""COCO outlines -> pixels: polygons, and run lengths plain or packed into text.

Run lengths count pixels column by column, zeros first. The packed form is COCO's own: each number in groups of five
bits, low first, 32 marking that more follow and the last group's 16 a negative number, each digit as a character
from 48; from the fourth number on, the difference to the one two before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

_LINES = 4


@dataclass(frozen=True)
class Outline:
    """The outline of one thing: polygons of x, y in px, or run lengths; never both."""

    polygons: tuple[tuple[float, ...], ...] = ()
    runs: tuple[int, ...] = ()


def unpack_runs(text: str) -> list[int]:
    """Run lengths of COCO's packed text.

    Raises:
        ValueError: Not such a text.

    >>> unpack_runs("522000OO2")
    [5, 2, 2, 2, 2, 2, 1, 1, 3]
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError("not packed run lengths")
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("packed run lengths end within a number")
    return runs


def extent(outline: Outline, height: int) -> tuple[float, float, float, float] | None:
    """x0, y0, x1, y1 around an outline, half-open px; None where it holds nothing."""
    if outline.polygons:
        x = [value for polygon in outline.polygons for value in polygon[::2]]
        y = [value for polygon in outline.polygons for value in polygon[1::2]]
        return min(x), min(y), max(x), max(y)
    first, last = _ones(outline.runs)
    if not len(first):
        return None
    columns, to_columns = first // height, (last - 1) // height
    whole = columns != to_columns  # a run over a column's end touches the first and the last row
    top = np.where(whole, 0, first % height).min()
    bottom = np.where(whole, height, (last - 1) % height + 1).max()
    return float(columns.min()), float(top), float(to_columns.max()) + 1, float(bottom)


def draw(outline: Outline, height: int, width: int) -> Float32[np.ndarray, "H W"]:
    """Share of each pixel inside an outline, [0, 1]; run lengths give 0 or 1."""
    if outline.polygons:
        return _draw_polygons(outline, height, width)
    flat = np.zeros(height * width, np.float32)
    for first, last in zip(*_ones(outline.runs), strict=True):
        flat[first:last] = 1
    return np.ascontiguousarray(flat.reshape(width, height).T)


def area(outline: Outline) -> float:
    """In px2; polygons by the shoelace rule, as if they did not overlap."""
    if outline.runs:
        return float(sum(outline.runs[1::2]))
    total = 0.0
    for polygon in outline.polygons:
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        total += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return total


def _ones(runs: tuple[int, ...]) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Start and end of each run of ones that is not empty."""
    ends = np.cumsum(np.array(runs, np.int64))
    first, last = ends[0::2][: len(runs) // 2], ends[1::2]
    kept = last > first
    return first[kept], last[kept]


def _draw_polygons(outline: Outline, height: int, width: int) -> Float32[np.ndarray, "H W"]:
    """Polygons unite. Along x exact, along y at four lines a pixel; inside is what an odd number of edges precedes."""
    share = np.zeros((height, width), np.float32)
    left = np.arange(width)
    for polygon in outline.polygons:
        own = np.zeros_like(share)
        x, y = np.array(polygon[::2]), np.array(polygon[1::2])
        to_x, to_y = np.roll(x, -1), np.roll(y, -1)
        first, last = max(0, int(y.min()) * _LINES), min(height, int(np.ceil(y.max()))) * _LINES
        for line in range(first, last):
            at = (line + 0.5) / _LINES
            crossed = (y <= at) != (to_y <= at)
            places = np.sort((x + (at - y) * (to_x - x) / np.where(crossed, to_y - y, 1))[crossed])
            for start, end in zip(places[::2], places[1::2], strict=True):
                inside = np.minimum(end, left + 1) - np.maximum(start, left)
                own[line // _LINES] += np.clip(inside, 0, 1).astype(np.float32) / _LINES
        share = np.maximum(share, own)
    return share
