"""Hide what is hard to draw, in the region with the greater chance."""

from __future__ import annotations

from functools import cache
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from pydantic import Field

from shared.config import Strict
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.coverage import COVERAGE_MAX
from stage2_pretrain.masking.hard import places
from stage2_pretrain.masking.plan import Tables
from stage2_pretrain.masking.region_soft import soft_weights

_DOUBLINGS = 24
"""Weights are 1 .. 2^24."""


class RegionHardOptions(Strict):
    """How much to hide, and how strongly coverage draws."""

    overall: int = Field(600, ge=1, le=999, description="Share of all patches to hide, in thousandths.")
    sharpness: int = Field(
        8,
        ge=1,
        le=100,
        description="How many times as likely a fully covered patch is to be hidden first as one without coverage "
        "that is as hard. 1: by difficulty alone.",
    )


class RegionHard:
    """One stratum; a patch's weight is its coverage prior (`region-soft`) times its difficulty.

    Source: ours. Difficulty is the place of the patch among those of its image, from 1/L to 1: losses differ by
    orders of magnitude between tissue and air, and a product with them would leave nothing to the words.
    """

    Options: ClassVar[type[Strict]] = RegionHardOptions
    version: ClassVar[int] = 1
    strata: ClassVar[tuple[str, ...]] = ("all",)
    guide: ClassVar[Literal["loss", "attention"]] = "loss"

    def __init__(self, options: RegionHardOptions) -> None:
        self.options = options

    def tables(self) -> Tables:
        """A patch's level is the logarithm of its weight."""
        counts = Counts(self.options.overall, self.options.overall)
        return Tables(np.zeros(256, np.uint8), log_weights(), counts)

    def levels(self, score: Float32[np.ndarray, "B L"], coverage: UInt8[np.ndarray, "B L"]) -> UInt8[np.ndarray, "B L"]:
        """The product on a scale of logarithms that 2^-24 begins and 1 ends: to 7 %, wherever on it."""
        patches = score.shape[1]
        prior = soft_weights(self.options.sharpness)[coverage] / (COVERAGE_MAX * self.options.sharpness)
        product = prior * ((patches - places(score)) / patches)
        return np.rint(255 + 255 / _DOUBLINGS * np.log2(product)).astype(np.uint8)

    def gives(self, levels: UInt8[np.ndarray, "B L"]) -> Bool[np.ndarray, "B"]:
        """Above what the least product on a grid of any size has."""
        positive: Bool[np.ndarray, "B"] = np.all(levels > 0, axis=1)
        return positive


@cache
def log_weights() -> Int32[np.ndarray, "256"]:
    """Level -> weight, ``2^(24 level / 255)`` rounded down, at least 1; by whole numbers alone.

    >>> log_weights()[[0, 85, 170, 254, 255]].tolist()
    [1, 256, 65536, 15717600, 16777216]
    """
    found = np.ones(256, np.int32)
    for level in range(256):
        weight, bit = 0, 1 << _DOUBLINGS
        while bit:
            if (weight + bit) ** 255 <= 1 << (_DOUBLINGS * level):
                weight += bit
            bit >>= 1
        found[level] = weight
    return found
