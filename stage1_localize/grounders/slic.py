"""Superpixels by SLIC: k-means of grey and place, each pixel compared with the clusters around it only.

Whole numbers throughout, so an image has the same segments on every machine. Own code rather than scikit-image's:
sixty lines against a dependency whose next release may move a border, and with it the id of every store.

Source: Achanta et al., SLIC superpixels compared to state-of-the-art superpixel methods (PAMI 2012); candidates from
the 3 x 3 neighbouring cells of the starting grid as in Ren and Reid, gSLIC (2011).
"""

from __future__ import annotations

import heapq

import numpy as np
from jaxtyping import Float64, Int, UInt8
from scipy import ndimage

ITERATIONS = 10
UNIT = 64
"""A cell of the starting grid measures so many units, a grey level likewise so many: means lie between pixels."""


def superpixels(
    grey: UInt8[np.ndarray, "h w"], count: int, compactness: int, aspect_wh: tuple[int, int]
) -> Int[np.ndarray, "h w"]:
    """Cut an image into connected segments of like grey.

    Args:
        grey: 0 to 255.
        count: Segments, about.
        compactness: Grey levels that weigh as much as the side of a segment; high makes them square.
        aspect_wh: Width and height of what ``grey`` shows, where it was squeezed: segments are as wide as high there.

    Returns:
        Labels from 0, without gaps, in the order of each segment's first pixel.
    """
    height, width = grey.shape
    down = min(height, max(1, round((count * aspect_wh[1] / aspect_wh[0]) ** 0.5)))
    across = min(width, max(1, round(count / down)))
    rows, columns = np.indices(grey.shape)
    # Place in units of a cell: (2 i + 1) / 2 pixels of height / down pixels a cell.
    place = np.stack([(2 * rows + 1) * down * UNIT // (2 * height), (2 * columns + 1) * across * UNIT // (2 * width)])
    # Whole numbers in doubles: exact below 2^53, and multiplied faster than integers.
    values = np.concatenate([place, grey[None].astype(np.int64) * UNIT]).reshape(3, -1).astype(np.float64)
    cell_row, cell_column = (place // UNIT).reshape(2, -1)
    near = [
        np.clip(cell_row + i, 0, down - 1) * across + np.clip(cell_column + j, 0, across - 1)
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    ]
    label = cell_row * across + cell_column
    for _ in range(ITERATIONS):
        centres = _means(values, label, down * across)
        best = np.stack([_distance(values, centres, cell, compactness) for cell in near]).argmin(axis=0)
        label = np.stack(near)[best, np.arange(label.size)]
    return _connected(label.reshape(grey.shape), height * width // (4 * down * across))


def _means(values: Float64[np.ndarray, "3 n"], label: Int[np.ndarray, "n"], count: int) -> Float64[np.ndarray, "3 c"]:
    sizes = np.maximum(np.bincount(label, minlength=count), 1)
    return np.stack([np.bincount(label, weights=row, minlength=count) for row in values]) // sizes


def _distance(
    values: Float64[np.ndarray, "3 n"],
    centres: Float64[np.ndarray, "3 c"],
    cell: Int[np.ndarray, "n"],
    compactness: int,
) -> Float64[np.ndarray, "n"]:
    row, column, grey = (value - centre[cell] for value, centre in zip(values, centres, strict=True))
    return (row * row + column * column) * compactness**2 + grey * grey


def _connected(label: Int[np.ndarray, "h w"], area_min_px: int) -> Int[np.ndarray, "h w"]:
    """Each connected piece its own segment; a piece that is too small joins the one that it touches most."""
    pieces = np.zeros(label.shape, np.int64)
    total = 0
    for value, window in enumerate(ndimage.find_objects(label + 1)):
        if window is not None:
            found, count = ndimage.label(label[window] == value)
            pieces[window] += np.where(found > 0, found + total, 0)
            total += count
    joined = _join_small(np.bincount(pieces.ravel(), minlength=total + 1).tolist(), _contacts(pieces), area_min_px)
    _, first, labels = np.unique(joined[pieces], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels.reshape(pieces.shape)]


def _contacts(pieces: Int[np.ndarray, "h w"]) -> dict[int, dict[int, int]]:
    """Piece -> neighbour -> pairs of pixels that touch across their border."""
    found: dict[int, dict[int, int]] = {}
    for one, other in ((pieces[1:], pieces[:-1]), (pieces[:, 1:], pieces[:, :-1])):
        border = one != other
        pairs, counts = np.unique(np.stack([one[border], other[border]]), axis=1, return_counts=True)
        for (a, b), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
            for piece, neighbour in ((a, b), (b, a)):
                row = found.setdefault(piece, {})
                row[neighbour] = row.get(neighbour, 0) + count
    return found


def _join_small(areas: list[int], contacts: dict[int, dict[int, int]], area_min_px: int) -> Int[np.ndarray, "pieces"]:
    """Piece -> the piece that it is part of in the end; the smallest join first."""
    part_of = np.arange(len(areas))
    waiting = [(area, piece) for piece, area in enumerate(areas) if 0 < area < area_min_px]
    heapq.heapify(waiting)
    while waiting:
        area, piece = heapq.heappop(waiting)
        if area != areas[piece] or not contacts.get(piece):  # it has grown, or has joined another, or is alone
            continue
        target = max(contacts[piece], key=lambda other: (contacts[piece][other], -other))
        for other, count in contacts.pop(piece).items():
            del contacts[other][piece]
            if other != target:
                contacts[target][other] = contacts[other][target] = contacts[target].get(other, 0) + count
        areas[target] += areas[piece]
        areas[piece] = 0
        part_of[part_of == piece] = target
        if areas[target] < area_min_px:
            heapq.heappush(waiting, (areas[target], target))
    return part_of
