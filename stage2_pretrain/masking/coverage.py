"""Coverage: the mean of the region maps over each patch of what the encoder sees, in integers.

A sample's window (`stage2_pretrain.window`) cuts the image; its edges are carried into the map, the cells of
the grid are cut from that, and the pooled cells are flipped and turned as the image is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64, Integer, Shaped, UInt8
from pydantic import Field, NonNegativeInt

from shared.config import Strict
from shared.errors import ConfigError, CorruptError
from shared.region_layout import ABSENT

COVERAGE_MAX = 254
"""Probability 1 in a region map, and full coverage of a patch."""
WEIGHTS_MAX = 1 << 55
"""Of the sum of weights: times the largest coverage, it still is a number of 64 bits."""


class CoverageOptions(Strict):
    """How several regions become one coverage."""

    combine: Literal["max", "weighted"] = Field(
        "max", description="max: the largest coverage of any region. weighted: their mean by 'weights'."
    )
    weights: dict[str, NonNegativeInt] = Field(
        default_factory=dict,
        description="weighted only: region name -> whole-number weight; regions left out weigh 0.",
    )


def region_weights(options: CoverageOptions, regions: Sequence[str]) -> Int64[np.ndarray, "K"] | None:
    """Weights in the order of a store's regions, or None for ``max``.

    Raises:
        ConfigError: A weight for a region that the store lacks, weights without 'weighted', or a sum that is 0 or too
            large.
    """
    unknown = sorted(set(options.weights) - set(regions))
    if unknown:
        raise ConfigError(f"coverage.weights.{unknown[0]}: no such region; the store has {', '.join(regions)}")
    if options.combine == "max":
        if options.weights:
            raise ConfigError("coverage.weights: given, but coverage.combine is 'max'; expected 'weighted'")
        return None
    weights = [options.weights.get(name, 0) for name in regions]
    if sum(weights) == 0:
        raise ConfigError(f"coverage.weights: sum is 0; give a weight to one of {', '.join(regions)}")
    if sum(weights) >= WEIGHTS_MAX:
        raise ConfigError(f"coverage.weights: sum is {sum(weights)}; expected below 2^55")
    return np.array(weights, np.int64)


def pool(
    maps: UInt8[np.ndarray, "B K H W"], windows: Int32[np.ndarray, "B 8"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "B K L"]:
    """Mean of the maps over each patch, rounded half up: ``(sum + n // 2) // n``, 0 .. 254.

    Args:
        maps: Region maps of the whole images.
        windows: From `stage2_pretrain.window.draw_windows`.
        grid: Rows and columns of patches of what the encoder sees; L is their product, row by row.

    Raises:
        ConfigError: A patch is smaller than one map pixel.
        CorruptError: Map value 255: an absent sample came in.
    """
    out = np.empty((*maps.shape[:2], grid[0] * grid[1]), np.uint8)
    for number, (regions, window) in enumerate(zip(maps, windows.tolist(), strict=True)):
        if (regions == ABSENT).any():
            raise CorruptError(f"region maps of batch item {number}: value 255 (absent) cannot be pooled")
        top, left, height, width, image_height, image_width, flip, turns = window
        rows, columns = grid[::-1] if turns % 2 else grid
        row_edges = cell_edges(top, height, image_height, regions.shape[1], rows)
        column_edges = cell_edges(left, width, image_width, regions.shape[2], columns)
        part = regions[:, row_edges[0] : row_edges[-1], column_edges[0] : column_edges[-1]].astype(np.uint32)
        total = np.add.reduceat(part, row_edges[:-1] - row_edges[0], axis=1)
        total = np.add.reduceat(total, column_edges[:-1] - column_edges[0], axis=2).astype(np.int64)
        size = np.diff(row_edges)[:, None] * np.diff(column_edges)
        out[number] = orient((total + size // 2) // size, flip, turns).reshape(len(regions), -1)
    return out


def cell_edges(start: int, length: int, image_px: int, map_px: int, cells: int) -> Int64[np.ndarray, "cells+1"]:
    """Edges of the cells along one axis, in map pixels.

    Image pixel a of n lies at map pixel ``(2 * a * S + n) // (2 * n)``; inside the window from e0, h long, edge
    j of g is ``e0 + (j * h + g // 2) // g``.

    Args:
        start: First image pixel of the window.
        length: Image pixels in it.
        image_px: Image pixels along the axis, n.
        map_px: Map pixels along the axis, S.
        cells: Patches along the axis, g.

    Raises:
        ConfigError: A cell is smaller than one map pixel.

    >>> cell_edges(0, 512, 512, 256, 3).tolist()
    [0, 85, 171, 256]
    """
    first, last = (map_edge(edge, image_px, map_px) for edge in (start, start + length))
    if last - first < cells:
        raise ConfigError(
            f"grid: {cells} patches along {last - first} pixels of the region map; a patch needs one or more",
            hint="use a coarser grid, a larger crop_scale, or a store with larger maps",
        )
    return first + (np.arange(cells + 1) * (last - first) + cells // 2) // cells


def map_edge(image_edge: Any, image_px: int, map_px: int) -> Any:
    """Map pixel at which an image pixel begins, ``(2 * a * S + n) // (2 * n)``; a number or an array of them."""
    return (2 * image_edge * map_px + image_px) // (2 * image_px)


def orient(grid: Shaped[np.ndarray, "*B H W"], flip: int, turns: int) -> Shaped[np.ndarray, "*B h w"]:
    """Mirror left and right if ``flip``, then turn ``turns`` quarters counter-clockwise."""
    return np.rot90(grid[..., ::-1] if flip else grid, turns, axes=(-2, -1))


def combine(pooled: UInt8[np.ndarray, "B K L"], weights: Integer[np.ndarray, "K"] | None) -> UInt8[np.ndarray, "B L"]:
    """One coverage of several regions: the largest, or ``(sum(w q) + W // 2) // W`` with W the sum of weights."""
    if weights is None:
        return pooled.max(axis=1)
    total = weights.sum()
    mean = (np.einsum("bkl,k->bl", pooled.astype(np.int64), weights.astype(np.int64)) + total // 2) // total
    return mean.astype(np.uint8)
