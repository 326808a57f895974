"""What every method draws and is measured by: pixels of patches, their normalisation, the error of hidden ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from shared import ranks
from shared.errors import UsageError

Measure = Literal["squared", "absolute"]
MEASURES: dict[Measure, Callable[..., Tensor]] = {"squared": F.mse_loss, "absolute": F.l1_loss}
_EPS = 1e-6
"""Added to the variance of a patch, so that a constant patch stays finite."""


def patches(image: Float[Tensor, "B C S S"], patch_px: int) -> Float[Tensor, "B L P"]:
    """Pixels of each patch: patches row by row, then the pixels of a patch row by row, channels last.

    >>> patches(torch.arange(16.0).view(1, 1, 4, 4), 2)[0].tolist()
    [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0], [8.0, 9.0, 12.0, 13.0], [10.0, 11.0, 14.0, 15.0]]
    """
    batch, channels, height, width = image.shape
    rows, columns = height // patch_px, width // patch_px
    cut = image.reshape(batch, channels, rows, patch_px, columns, patch_px).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, rows * columns, patch_px * patch_px * channels)


def unpatch(cut: Float[Tensor, "B L P"], patch_px: int, channels: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patches`."""
    parts = cut.reshape(len(cut), *grid, patch_px, patch_px, channels).permute(0, 5, 1, 3, 2, 4)
    return parts.reshape(len(cut), channels, grid[0] * patch_px, grid[1] * patch_px)


def normalise(cut: Float[Tensor, "*L P"]) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch by its mean and deviation (unbiased variance plus 1e-6); also returns those two."""
    mean = cut.mean(-1, keepdim=True)
    deviation = (cut.var(-1, keepdim=True, unbiased=True) + _EPS).sqrt()
    return (cut - mean) / deviation, mean, deviation


def count_hidden(visible: Bool[Tensor, "B gh gw"]) -> int:
    """Hidden patches of the batch, in all processes.

    Raises:
        UsageError: There is none.
    """
    count = ranks.total(int((~visible).sum()))
    if not count:
        raise UsageError("no patch of this batch is hidden: nothing to learn", hint="hide more")
    return count


def target(
    image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"], *, normalised: bool
) -> Float[Tensor, "n P"]:
    """Pixels of hidden patches, image after image, each by its own mean and deviation if ``normalised``."""
    cut = patches(image, image.shape[2] // visible.shape[1])
    return (normalise(cut)[0] if normalised else cut)[~visible.flatten(1)]


def error(
    predicted: Float[Tensor, "n P"],
    true: Float[Tensor, "n P"],
    count: int,
    kind: Measure = "squared",
) -> Float[Tensor, ""]:
    """Mean error of hidden patches; of several processes each gives its part, which sum to the mean over all.

    Args:
        predicted: Of this process's hidden patches; n may be 0 where other processes have some.
        true: `target`.
        count: Hidden patches of all processes.
        kind: Of each pixel.
    """
    measure = MEASURES[kind]
    if ranks.size() == 1:
        return measure(predicted.to(true.dtype), true)
    return measure(predicted.to(true.dtype), true, reduction="sum") / (count * true.shape[1])


def fill_hidden(
    image: Float[Tensor, "B C S S"],
    visible: Bool[Tensor, "B gh gw"],
    predicted: Float[Tensor, "B L P"],
    *,
    normalised: bool,
) -> Float[Tensor, "B C S S"]:
    """The image with its hidden patches as predicted; visible patches are the image's own, to the bit.

    Args:
        image: Pixels.
        visible: True where the encoder saw the patch.
        predicted: Of every patch.
        normalised: Predictions are in units of the patch's own mean and deviation, which are taken from the image.
    """
    grid = (visible.shape[1], visible.shape[2])
    patch_px = image.shape[2] // grid[0]
    true = patches(image, patch_px)
    if normalised:
        _, mean, deviation = normalise(true)
        predicted = predicted * deviation + mean
    seen = visible.flatten(1)[:, :, None]
    return unpatch(torch.where(seen, true, predicted), patch_px, image.shape[1], grid)
