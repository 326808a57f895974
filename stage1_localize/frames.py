"""Where a picture lies in a network's square input, and back: every map ends in the map frame.

A network reads a square. An image fills its top left (the rest is padding), or all of it where it is squashed. What
the network answers lies on a grid over the same square; the part that the image fills is resampled to the map frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from stage1_localize.contracts import MAP_SIZE_PX


@dataclass(frozen=True)
class Frame:
    """How one image lies in a square input.

    Attributes:
        size_px: Side of the square.
        height_px: Rows of the square that the image fills, from the top.
        width_px: Columns, from the left.
        height_image_px: Rows of the image as given.
        width_image_px: Columns, likewise.
    """

    size_px: int
    height_px: int
    width_px: int
    height_image_px: int
    width_image_px: int

    def to_input(self, box_xyxy_px: Float32[np.ndarray, "n 4"]) -> Float32[np.ndarray, "n 4"]:
        """Boxes in pixels of the image, in pixels of the square."""
        scale = (self.width_px / self.width_image_px, self.height_px / self.height_image_px)
        return box_xyxy_px.astype(np.float32) * np.array(scale * 2, np.float32)


def letterboxed(height_image_px: int, width_image_px: int, size_px: int) -> Frame:
    """The longest side fills the square, the other keeps its proportion, rounded half up and at least 1 px.

    >>> letterboxed(100, 200, 64)
    Frame(size_px=64, height_px=32, width_px=64, height_image_px=100, width_image_px=200)
    """
    longest = max(height_image_px, width_image_px)
    height_px, width_px = (
        max(1, (2 * side * size_px + longest) // (2 * longest)) for side in (height_image_px, width_image_px)
    )
    return Frame(size_px, height_px, width_px, height_image_px, width_image_px)


def squashed(height_image_px: int, width_image_px: int, size_px: int) -> Frame:
    """Both sides fill the square."""
    return Frame(size_px, size_px, size_px, height_image_px, width_image_px)


def to_map_frame(values: Float[Tensor, "n h w"], frame: Frame) -> Float[Tensor, "n 256 256"]:
    """Crop the padding, then resample the whole image to the map frame (bilinear, half-pixel centres).

    The image's edge may fall inside a cell of the grid: a cell that it touches counts, one beyond it does not.

    Args:
        values: On a grid over the square, ``h`` and ``w`` cells a side.
        frame: Of the image.
    """
    rows = _samples(frame.height_px / frame.size_px, values.shape[1], values.device)
    columns = _samples(frame.width_px / frame.size_px, values.shape[2], values.device)
    return _sampled(_sampled(values, 1, rows), 2, columns)


def _samples(filled: float, cells: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pixel of the map frame: cell before, cell after, share of the one after."""
    last = max(0, int(np.ceil(filled * cells)) - 1)
    at = np.clip((np.arange(MAP_SIZE_PX) + 0.5) / MAP_SIZE_PX * filled * cells - 0.5, 0, last)
    before = np.floor(at).astype(np.int64)
    after = np.minimum(before + 1, last)
    share = torch.from_numpy((at - before).astype(np.float32))
    return torch.from_numpy(before).to(device), torch.from_numpy(after).to(device), share.to(device)


def _sampled(values: Tensor, axis: int, samples: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    before, after, share = samples
    weight = share.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    low, high = values.index_select(axis, before), values.index_select(axis, after)
    return low + (high - low) * weight
