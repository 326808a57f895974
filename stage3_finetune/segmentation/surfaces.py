"""Distances between the surfaces of two regions of one image.

A region's surface is its pixels that have one of their four neighbours outside of it; beyond the image is outside, a
pixel that counts neither way is not. From each surface pixel of one region to the nearest of the other, centre to
centre, both ways. HD95 is the larger of the two directed 95th percentiles, as in Metrics Reloaded
(arXiv 2206.01653); the average symmetric surface distance (ASSD) is the mean over the pixels of both surfaces.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float64
from scipy.ndimage import binary_erosion, distance_transform_edt

_PERCENTILE = 95


def surface(region: Bool[np.ndarray, "H W"], ignore: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels of a region at its border."""
    inner: Bool[np.ndarray, "H W"] = region & ~binary_erosion(region | ignore)
    return inner


def directed_distances(
    one: Bool[np.ndarray, "H W"],
    other: Bool[np.ndarray, "H W"],
    spacing: tuple[float, float],
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "m"]]:
    """From each pixel of one surface to the nearest of the other, and back; neither may be empty.

    Args:
        one: A surface.
        other: Another.
        spacing: Of rows and columns; distances are in its unit.
    """
    # Both lie within their common frame, and so does each line between them: the rest of the image is not needed.
    either = one | other
    rows, columns = np.flatnonzero(either.any(axis=1)), np.flatnonzero(either.any(axis=0))
    frame = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    one, other = one[frame], other[frame]
    to_other, to_one = (distance_transform_edt(~surface, sampling=spacing) for surface in (other, one))
    return to_other[one], to_one[other]


def surface_distances(
    truth: Bool[np.ndarray, "H W"],
    found: Bool[np.ndarray, "H W"],
    ignore: Bool[np.ndarray, "H W"],
    spacing: tuple[float, float],
) -> tuple[float, float]:
    """HD95 and ASSD in the unit of the spacing; NaN where one of the regions has no surface.

    >>> square, none = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    >>> square[1:3, 1:3] = True
    >>> surface_distances(square, np.roll(square, 1, axis=1), none, (1.0, 2.0))
    (2.0, 1.0)
    """
    one, other = surface(truth, ignore), surface(found, ignore)
    if not (one.any() and other.any()):
        return float("nan"), float("nan")
    there, back = directed_distances(one, other, spacing)
    hd95 = max(float(np.percentile(there, _PERCENTILE)), float(np.percentile(back, _PERCENTILE)))
    return hd95, float(there.sum() + back.sum()) / (len(there) + len(back))
