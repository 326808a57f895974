"""The window: which part of an image a draw sees, flipped and turned how. Integers, drawn by names.

Image and region maps take the same window, so a patch of the one is a patch of the other.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from jaxtyping import Int32, Integer, UInt64
from pydantic import Field, field_validator

from shared.config import Strict
from shared.rng import below, draw_u32, seed_key

PURPOSE = "augment"
VERSION = 1
"""Raised when the same options give other windows."""


class WindowOptions(Strict):
    """How images are cropped, flipped and turned."""

    crop_scale: tuple[int, int] = Field(
        (670, 1000),
        description="Smallest and largest share of the image's area to crop, in thousandths, both 1 to 1000; the "
        "image's aspect is kept. [1000, 1000]: never crop.",
    )
    flip: bool = Field(True, description="Mirror left and right in half of the draws.")
    turns: bool = Field(False, description="Turn by 0, 1, 2 or 3 quarters, equally often.")

    @field_validator("crop_scale")
    @classmethod
    def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1] <= 1000:
            raise ValueError("expected two thousandths, 1 <= smallest <= largest <= 1000")
        return value


def draw_windows(
    sizes_px: Integer[np.ndarray, "B 2"],
    sample_keys: UInt64[np.ndarray, "B"],
    *,
    seed: int,
    epoch: int,
    options: WindowOptions,
) -> Int32[np.ndarray, "B 8"]:
    """Draw the window of each sample in one epoch.

    Word 0 draws the area in thousandths m, and with it ``isqrt(n * n * m // 1000)`` pixels along each axis; word
    1 the first row, word 2 the first column; bit 31 of word 3 flips, bits 29 and 30 turn.

    Args:
        sizes_px: Height and width of each image.
        sample_keys: From `shared.rng.sample_keys`.
        seed: Of the run.
        epoch: 0 .. 2^24 - 1.
        options: What to draw.

    Returns:
        Top, left, height and width of the crop; height and width of the image; flip (0, 1); quarter turns (0 .. 3),
        counter-clockwise, after the flip.
    """
    words = draw_u32(seed_key(PURPOSE, seed), sample_keys, epoch=epoch, n=4)
    smallest, largest = options.crop_scale
    milli = smallest + below(words[:, 0], largest - smallest + 1)
    sizes = sizes_px.astype(np.int64)
    crop = np.array(
        [
            [max(1, isqrt(n * n * m // 1000)) for n in size]
            for size, m in zip(sizes.tolist(), milli.tolist(), strict=True)
        ],
        np.int64,
    ).reshape(sizes.shape)
    start = below(words[:, 1:3], sizes - crop + 1)
    flip = (words[:, 3] >> 31) * options.flip
    turns = (words[:, 3] >> 29 & 3) * options.turns
    return np.column_stack([start, crop, sizes, flip, turns]).astype(np.int32)
