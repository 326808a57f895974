"""Axial slices of the ICBM 152 template with grey and white matter truth, from files that nilearn ships.

The volumes are the ICBM 2009a nonlinear symmetric average of 152 adults at 1 mm (Fonov et al., NeuroImage 54,
2011), skull-stripped by nilearn. No network is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

BRAIN_MIN = 0.02
"""Intensity (0 to 1) above which a voxel of the stripped template is brain."""


@dataclass(frozen=True)
class TemplateSlice:
    """One axial slice, displayed as radiologists do: anterior up, the patient's right on the image's left.

    The template is symmetric, so left and right differ by the display rule alone.

    Attributes:
        name: ``z`` and the height in mm of the MNI frame, e.g. ``z+012``.
        index: Place from bottom (0) to top of the brain's own axial extent.
        pixels: T1 intensity, 0 to 255, 1 mm a pixel.
        grey: Probability of grey matter, 0 to 1, the frame of ``pixels``.
        white: Probability of white matter, likewise.
        brain_fraction: Share of the pixels that are brain, 0 to 1.
    """

    name: str
    index: int
    pixels: UInt8[np.ndarray, "H W"]
    grey: Float32[np.ndarray, "H W"]
    white: Float32[np.ndarray, "H W"]
    brain_fraction: float

    @property
    def brain(self) -> Float32[np.ndarray, "H W"]:
        """1 where the slice is brain, else 0."""
        return (self.pixels > BRAIN_MIN * 255).astype(np.float32)


def template_slices() -> list[TemplateSlice]:
    """Every axial slice that holds brain, bottom to top.

    Returns:
        Slices of equal size, read-only arrays; grey plus white is at most 1 up to the template's own rounding.
    """
    return list(_slices())


@cache
def _slices() -> tuple[TemplateSlice, ...]:
    from nilearn import datasets

    image = datasets.load_mni152_template(resolution=1)
    volume = _unit(image)
    grey = _unit(datasets.load_mni152_gm_template(resolution=1))
    white = _unit(datasets.load_mni152_wm_template(resolution=1))
    heights = np.flatnonzero((volume > BRAIN_MIN).any(axis=(0, 1)))
    z0_mm, step_mm = float(image.affine[2, 3]), float(image.affine[2, 2])
    slices = []
    for index, z in enumerate(range(int(heights[0]), int(heights[-1]) + 1)):
        pixels = np.rint(_display(volume[:, :, z]) * 255).astype(np.uint8)
        slices.append(
            TemplateSlice(
                name=f"z{round(z0_mm + step_mm * z):+04d}",
                index=index,
                pixels=_frozen(pixels),
                grey=_frozen(_display(grey[:, :, z])),
                white=_frozen(_display(white[:, :, z])),
                brain_fraction=float((pixels > BRAIN_MIN * 255).mean()),
            )
        )
    return tuple(slices)


def _unit(image: Any) -> Float32[np.ndarray, "X Y Z"]:
    volume = np.asarray(image.get_fdata(dtype=np.float32))
    return np.clip(volume / volume.max(), 0, 1)


def _display(plane: Float32[np.ndarray, "X Y"]) -> Float32[np.ndarray, "Y X"]:
    """The volume runs left to right and back to front; rows of a picture run downwards from the front."""
    return np.ascontiguousarray(plane.T[::-1, ::-1])


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
