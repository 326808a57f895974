"""From saliency of tokens to maps, and from maps to boxes: resampling, thresholds, connected parts."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Int
from scipy import ndimage

from stage1_localize.contracts import MAP_SIZE_PX

LEVELS = 255
"""Thresholds see whole numbers 0 to 255: the last bits of a saliency decide nothing."""


def to_map_frame(
    tokens: Float[np.ndarray, "g g"], size_px: int, height_px: int, width_px: int
) -> Float32[np.ndarray, "256 256"]:
    """Resample a token grid to the map frame, bilinear at half-pixel centres, then minimum to 0 and maximum to 1.

    Args:
        tokens: A value a token of the square input.
        size_px: Side of that input.
        height_px: Rows of it that the image fills, from the top; the rest is padding and left out.
        width_px: Columns, likewise.

    Returns:
        In [0, 1]; all 0 where the saliency is the same everywhere.
    """
    grid = len(tokens)
    rows, columns = (
        (np.arange(MAP_SIZE_PX) + 0.5) * filled / MAP_SIZE_PX * grid / size_px - 0.5 for filled in (height_px, width_px)
    )
    frame = ndimage.map_coordinates(
        tokens.astype(np.float64), np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest"
    )
    low, high = frame.min(), frame.max()
    if not high > low:
        return np.zeros(frame.shape, np.float32)
    return ((frame - low) / (high - low)).astype(np.float32)


def threshold(
    saliency: Float32[np.ndarray, "256 256"], how: Literal["fixed", "otsu", "kmeans"], level_milli: int
) -> int:
    """Highest level of 0 to 255 that still is background.

    ``otsu`` maximises the variance between the two classes, which is the best that k-means of two can reach in one
    dimension; ``kmeans`` is Lloyd's iteration from 0 and 255, which may stop before it. ``fixed`` reads no image.

    Source: Otsu, A threshold selection method from gray-level histograms (1979).
    """
    if how == "fixed":
        return LEVELS * level_milli // 1000
    counts = np.bincount(to_levels(saliency).ravel(), minlength=LEVELS + 1)
    below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(LEVELS + 1))
    whole, total = int(below[-1]), int(sums[-1])
    if how == "otsu":
        above = whole - below
        with np.errstate(divide="ignore", invalid="ignore"):
            between = (total * below - whole * sums).astype(np.float64) ** 2 / (below * above)
        return int(np.nanargmax(np.where((below > 0) & (above > 0), between, -1.0)))
    cut, seen = LEVELS // 2, set[int]()
    while cut not in seen:
        seen.add(cut)
        n, inside = int(below[cut]), int(sums[cut])
        if n in (0, whole):
            break
        cut = int((inside / n + (total - inside) / (whole - n)) // 2)
    return cut


def to_levels(saliency: Float32[np.ndarray, "256 256"]) -> Int[np.ndarray, "256 256"]:
    """Rounded to 0 .. 255."""
    return np.floor(saliency.astype(np.float64) * LEVELS + 0.5).astype(np.int64)


def parts(above: Bool[np.ndarray, "256 256"], area_min_px: int, most: int) -> list[Bool[np.ndarray, "256 256"]]:
    """Connected parts (corners do not connect), the largest first, of equal ones the upper, then the left."""
    labels, _ = ndimage.label(above)
    areas = np.bincount(labels.ravel())[1:]
    order = sorted(np.flatnonzero(areas >= area_min_px).tolist(), key=lambda i: (-int(areas[i]), i))
    return [labels == i + 1 for i in order[:most]]


def box_of(inside: Bool[np.ndarray, "256 256"], height: int, width: int) -> Float32[np.ndarray, "4"]:
    """Half-open box x0, y0, x1, y1 around the pixels of a map, in px of an image of this size."""
    ((rows, columns),) = ndimage.find_objects(inside.astype(np.int8))
    box = np.array([columns.start, rows.start, columns.stop, rows.stop], np.float64)
    return (box * np.array([width, height, width, height]) / MAP_SIZE_PX).astype(np.float32)
