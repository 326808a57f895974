"""Hide the same number in every sample, and the region's patches with the greater chance."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from jaxtyping import Int32
from pydantic import Field

from shared.config import Strict
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.coverage import COVERAGE_MAX
from stage2_pretrain.masking.plan import Tables


class RegionSoftOptions(Strict):
    """How much to hide, and how strongly coverage draws."""

    overall: int = Field(600, ge=1, le=999, description="Share of all patches to hide, in thousandths.")
    sharpness: int = Field(
        8,
        ge=1,
        le=1000,
        description="How many times as likely a fully covered patch is to be hidden first as one without coverage; "
        "linear in coverage between them. 1: uniform.",
    )


class RegionSoft:
    """One stratum; a patch's weight rises with its coverage, without a threshold between inside and outside.

    Source: ours. The draw is successive sampling without replacement (Efraimidis and Spirakis, 2006): where much
    is hidden, the share of the region that is hidden rises with ``sharpness``, but less than in proportion.
    """

    Options: ClassVar[type[Strict]] = RegionSoftOptions
    version: ClassVar[int] = 1
    strata: ClassVar[tuple[str, ...]] = ("all",)

    def __init__(self, options: RegionSoftOptions) -> None:
        self.options = options

    def tables(self) -> Tables:
        """Every sample hides the same number."""
        counts = Counts(self.options.overall, self.options.overall)
        return Tables(np.zeros(256, np.uint8), soft_weights(self.options.sharpness), counts)


def soft_weights(sharpness: int) -> Int32[np.ndarray, "256"]:
    """Coverage -> weight, ``254 + (sharpness - 1) * coverage``: whole numbers, so that no float decides a draw.

    >>> soft_weights(8)[[0, 127, 254]].tolist()
    [254, 1143, 2032]
    """
    return (COVERAGE_MAX + (sharpness - 1) * np.minimum(np.arange(256), COVERAGE_MAX)).astype(np.int32)
