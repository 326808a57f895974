"""Hide what is hard to draw, in the region with the greater chance."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from pydantic import Field

from shared.config import Strict
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.coverage import COVERAGE_MAX
from stage2_pretrain.masking.hard import places
from stage2_pretrain.masking.plan import Tables
from stage2_pretrain.masking.region_soft import soft_weights


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
        """A patch's level is its weight."""
        counts = Counts(self.options.overall, self.options.overall)
        return Tables(np.zeros(256, np.uint8), np.maximum(np.arange(256), 1).astype(np.int32), counts)

    def levels(self, score: Float32[np.ndarray, "B L"], coverage: UInt8[np.ndarray, "B L"]) -> UInt8[np.ndarray, "B L"]:
        """The product in 1 .. 255, rounded down: whole numbers."""
        patches = score.shape[1]
        prior = soft_weights(self.options.sharpness).astype(np.int64)[coverage]
        most = COVERAGE_MAX * self.options.sharpness * patches
        return np.maximum(255 * prior * (patches - places(score)) // most, 1).astype(np.uint8)
