"""Hide what is hardest to draw, and fill the budget at random."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8
from pydantic import Field

from shared.config import Strict
from stage2_pretrain.masking.budget import Counts, count
from stage2_pretrain.masking.plan import Tables, equal_weights


class HardOptions(Strict):
    """How much to hide, and how much of it by difficulty."""

    overall: int = Field(600, ge=1, le=999, description="Share of all patches to hide, in thousandths.")
    share: int = Field(
        500,
        ge=0,
        le=1000,
        description="Share of the hidden patches that are the hardest ones, in thousandths; the rest is drawn "
        "uniformly. Let it rise with schedule.first.share=0.",
    )


class Hard:
    """Two strata: the patches that the teacher draws worst, all hidden, and the rest.

    Source: HPM (arXiv 2304.05919) and AnatoMask (arXiv 2407.06468). There the patches that the teacher saw count as
    easy, and AnatoMask compares normalised predictions with raw pixels; here every patch is judged while hidden, by
    the loss that the method trains with (`stage2_pretrain.guide`).
    """

    Options: ClassVar[type[Strict]] = HardOptions
    version: ClassVar[int] = 1
    strata: ClassVar[tuple[str, ...]] = ("hardest", "rest")
    guide: ClassVar[Literal["loss", "attention"]] = "loss"

    def __init__(self, options: HardOptions) -> None:
        self.options = options

    def tables(self) -> Tables:
        """Level 1 is hidden for certain, level 0 fills the budget."""
        stratum_of = (np.arange(256) == 0).astype(np.uint8)
        return Tables(stratum_of, equal_weights(), Counts(self.options.overall, 1000))

    def levels(self, score: Float32[np.ndarray, "B L"], coverage: UInt8[np.ndarray, "B L"]) -> UInt8[np.ndarray, "B L"]:
        """1 for so many patches of the highest score, 0 for the others."""
        return (places(score) < self._hardest(score.shape[1])).astype(np.uint8)

    def gives(self, levels: UInt8[np.ndarray, "B L"]) -> Bool[np.ndarray, "B"]:
        """As many ones as `levels` gives, and zeros."""
        ones = (levels == 1).sum(1)
        return (ones == self._hardest(levels.shape[1])) & (ones + (levels == 0).sum(1) == levels.shape[1])

    def _hardest(self, patches: int) -> int:
        return int(count(count(np.array(patches), self.options.overall), self.options.share))


def places(score: Float32[np.ndarray, "B L"]) -> Int64[np.ndarray, "B L"]:
    """Place of each patch by falling score, from 0; of equal ones the lower patch comes first.

    >>> places(np.array([[0.5, 2.0, 0.5, 1.0]], np.float32)).tolist()
    [[2, 0, 3, 1]]
    """
    return np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1, kind="stable")
