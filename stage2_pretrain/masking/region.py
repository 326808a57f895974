"""Hide one share of the region and another of the rest."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from shared.config import Strict
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.coverage import COVERAGE_MAX
from stage2_pretrain.masking.plan import Tables, equal_weights


class RegionOptions(Strict):
    """How much to hide inside and outside of the region."""

    budget: Literal["matched", "per-sample"] = Field(
        "matched",
        description="matched: every sample hides the same number of patches ('overall'). "
        "per-sample: 'hide_inside' and 'hide_outside', so that the number follows the region's size. "
        "Compare arms at matched budgets only.",
    )
    hide_inside: int = Field(
        800, ge=0, le=1000, description="Share of the patches inside the region to hide, in thousandths."
    )
    hide_outside: int | None = Field(
        None, ge=0, le=1000, description="Share of the patches outside to hide, in thousandths; per-sample only."
    )
    overall: int | None = Field(
        None,
        ge=1,
        le=999,
        description="Share of all patches to hide, in thousandths; matched only, where it is 600 if not given.",
    )
    inside: int = Field(
        500,
        ge=1,
        le=1000,
        description="Mean coverage from which a patch is inside the region, in thousandths of full coverage.",
    )

    @model_validator(mode="before")
    @classmethod
    def _published_overall(cls, data: Any) -> Any:
        # Filled in here, so that what ran is what resolved.yaml says; SparK hides 600 of everything.
        if isinstance(data, dict) and data.get("budget", "matched") == "matched" and data.get("overall") is None:
            return {**data, "overall": 600}
        return data

    @model_validator(mode="after")
    def _one_budget(self) -> RegionOptions:
        if self.budget == "matched" and self.hide_outside is not None:
            raise ValueError("hide_outside belongs to budget 'per-sample'; 'matched' takes 'overall'")
        if self.budget == "per-sample" and self.overall is not None:
            raise ValueError("overall belongs to budget 'matched'; 'per-sample' takes 'hide_outside'")
        if self.budget == "per-sample" and self.hide_outside is None:
            raise ValueError("hide_outside is required with budget 'per-sample'")
        return self


class Region:
    """Two strata, inside and outside, equal weights in each.

    Source: Mask What Matters (arXiv 2509.23054), by area coverage where it takes one pixel of a patch.
    """

    Options: ClassVar[type[Strict]] = RegionOptions
    version: ClassVar[int] = 1
    strata: ClassVar[tuple[str, ...]] = ("inside", "outside")

    def __init__(self, options: RegionOptions) -> None:
        self.options = options

    def tables(self) -> Tables:
        """A patch is inside where its coverage reaches the threshold."""
        return region_tables(self.options)


def region_tables(options: RegionOptions, *, inverted: bool = False) -> Tables:
    """Two strata by the threshold of coverage; the first takes ``hide_inside``.

    Args:
        options: Budget and threshold.
        inverted: The first stratum is what lies outside.
    """
    threshold = (COVERAGE_MAX * options.inside + 999) // 1000
    stratum_of = ((np.arange(256) < threshold) ^ inverted).astype(np.uint8)
    return Tables(stratum_of, equal_weights(), Counts(options.overall, options.hide_inside, options.hide_outside or 0))
