"""The grid of a volume as it is stored, and the way to RAS+ and back: for decoding, and for exports to lie on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file are.

    Attributes:
        shape: Extent of its three axes, as stored.
        affine: 4 x 4, row by row: voxel index (i, j, k, 1) as stored -> mm to the right, anterior and up.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, float, float, float], ...]

    @staticmethod
    def of(shape: tuple[int, int, int], affine: Float64[np.ndarray, "4 4"]) -> Grid:
        """From an affine as an array."""
        rows: Any = tuple(tuple(float(value) for value in row) for row in affine)
        return Grid(shape, rows)

    def spacing_mm(self) -> Float64[np.ndarray, "3"]:
        """Between voxels along right, anterior and up."""
        lengths = np.linalg.norm(np.array(self.affine)[:3, :3], axis=0)
        return lengths[np.argsort(_orientation(self)[:, 0])]


def to_canonical(values: Shaped[np.ndarray, "i j k"], grid: Grid) -> Shaped[np.ndarray, "x y z"]:
    """Turn stored voxels into RAS+ order: x to the right, y anterior, z up, as near as whole turns come.

    Raises:
        ValueError: The affine has an axis without direction.
    """
    import nibabel

    turned: np.ndarray[Any, Any] = nibabel.apply_orientation(values, _orientation(grid))
    return turned


def from_canonical(values: Shaped[np.ndarray, "x y z"], grid: Grid) -> Shaped[np.ndarray, "i j k"]:
    """Undo `to_canonical`: what lies on RAS+ voxels, in the order of the file; save it with the file's affine."""
    import nibabel

    there = _orientation(grid)
    back = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), there)
    turned: np.ndarray[Any, Any] = nibabel.apply_orientation(values, back)
    return turned


def _orientation(grid: Grid) -> Float64[np.ndarray, "3 2"]:
    """For each stored axis, the RAS+ axis that it is nearest to, and 1 or -1."""
    import nibabel

    found: np.ndarray[Any, Any] = nibabel.io_orientation(np.array(grid.affine))
    if np.isnan(found).any():
        raise ValueError("an axis without direction")
    return found
