"""What GroundingDINO sees: resized, normalised pixels, gathered into calls of one size each.

Sides follow the rule of DETR (Carion et al., 2020): the shortest side to a size, unless the longest would then pass a
limit. Images share a call only where their sizes agree, so nothing is ever padded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from shared.errors import CorruptError

FILE = "preprocessor_config.json"
LONGEST_SHARE = (1333, 800)
"""Limit of the longest side over the shortest, as published."""
_MODES = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the model's input.

    Attributes:
        size_px: Shortest side.
        longest_px: Most of the longest side.
        mode: ``bilinear`` or ``bicubic``, antialiased.
        mean: Of each channel, for values in [0, 1].
        std: Likewise.
    """

    size_px: int
    longest_px: int
    mode: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __str__(self) -> str:
        return (
            f"shortest side {self.size_px} px, longest at most {self.longest_px}, more where the model would "
            f"have fewer cells than queries, {self.mode} antialiased in torch float32; "
            f"mean {' '.join(map(str, self.mean))}, std {' '.join(map(str, self.std))}; version 1"
        )


@dataclass(frozen=True)
class Call:
    """Images of one size that go through the model together.

    Attributes:
        places: Index of each in the batch.
        pixels: Normalised.
    """

    places: tuple[int, ...]
    pixels: Float[Tensor, "B 3 H W"]


def read_preprocessing(folder: Path, size_px: int) -> Preprocessing:
    """Normalisation and interpolation of a model folder; the published ones where it says nothing.

    Raises:
        CorruptError: A file that is no preprocessor configuration, or one that asks for what is not offered.
    """
    longest_px = size_px * LONGEST_SHARE[0] // LONGEST_SHARE[1]
    if not (folder / FILE).is_file():
        return Preprocessing(size_px, longest_px)
    try:
        said = json.loads((folder / FILE).read_text(encoding="utf-8"))
        mode = _MODES[int(said.get("resample", 2))]
        normalise = bool(said.get("do_normalize", True))
        mean = tuple(map(float, said.get("image_mean", Preprocessing.mean))) if normalise else (0.0, 0.0, 0.0)
        std = tuple(map(float, said.get("image_std", Preprocessing.std))) if normalise else (1.0, 1.0, 1.0)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError("mean and std of three channels")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{FILE}: cannot be used ({type(error).__name__}: {error}); expected image_mean and image_std of three "
            "channels, and resample 2 (bilinear) or 3 (bicubic)",
            hint="download it again",
        ) from None
    return Preprocessing(size_px, longest_px, mode, mean, std)


def fitted(height: int, width: int, size_px: int, longest_px: int) -> tuple[int, int]:
    """Rows and columns after resizing.

    >>> fitted(240, 300, 480, 800), fitted(100, 400, 480, 800)
    ((480, 600), (200, 800))
    """
    short, long = min(height, width), max(height, width)
    exact: float = size_px
    if long / short * size_px > longest_px:
        exact = longest_px * short / long
    short_px = max(1, round(exact))
    if short == short_px:
        return height, width
    long_px = max(1, int(exact * long / short))
    return (short_px, long_px) if height <= width else (long_px, short_px)


def is_constant(image: Float32[np.ndarray, "C H W"]) -> bool:
    """Whether every pixel is like the first: nothing can be found there."""
    return bool((image == image[:, :1, :1]).all())


def enough(height: int, width: int, how: Preprocessing, strides: Sequence[int], cells_min: int) -> tuple[int, int]:
    """As `fitted`, but larger where the feature levels would have too few cells to pick the model's queries from.

    The releases fail there: small inputs and thin ones. Padding instead would offer cells that hold no image.

    Args:
        height: Rows of the image.
        width: Its columns.
        how: Preprocessing.
        strides: Of the model's feature levels, px.
        cells_min: Cells that the levels must have together.
    """
    size_px, longest_px = how.size_px, how.longest_px
    while True:
        rows, columns = fitted(height, width, size_px, longest_px)
        if sum(-(-rows // stride) * -(-columns // stride) for stride in strides) >= cells_min:
            return rows, columns
        grown = size_px + -(-size_px // 16)
        size_px, longest_px = grown, -(-longest_px * grown // size_px)


def prepare(image: Float32[np.ndarray, "C H W"], how: Preprocessing, size: tuple[int, int]) -> Float32[Tensor, "3 h w"]:
    """Resize to ``size`` and normalise one image of values in [0, 1]; grey is repeated to three channels."""
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None]
    if size != tuple(image.shape[1:]):
        pixels = F.interpolate(pixels, size, mode=how.mode, align_corners=False, antialias=True).clamp_(0, 1)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (how.mean, how.std))
    return (pixels[0].expand(3, -1, -1) - mean) / std


def gather(
    images: Sequence[Float32[np.ndarray, "C H W"]],
    how: Preprocessing,
    *,
    batch: int,
    strides: Sequence[int],
    cells_min: int,
) -> list[Call]:
    """Cut a batch into calls of at most ``batch`` images of one size, in the order of the images.

    Args:
        images: Any sizes; constant ones are left out.
        how: Preprocessing.
        batch: Images a call, at most.
        strides: Of the model's feature levels, px.
        cells_min: As for `enough`.
    """
    by_size: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for place, image in enumerate(images):
        if not is_constant(image):
            size = enough(image.shape[1], image.shape[2], how, strides, cells_min)
            by_size.setdefault(size, []).append((place, prepare(image, how, size)))
    calls = []
    for members in by_size.values():
        for start in range(0, len(members), batch):
            chosen = members[start : start + batch]
            calls.append(Call(tuple(place for place, _ in chosen), torch.stack([pixels for _, pixels in chosen])))
    return calls
