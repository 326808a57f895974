"""The control of `region`: what it does inside the region, done outside of it."""

from __future__ import annotations

from typing import ClassVar

from shared.config import Strict
from stage2_pretrain.masking.plan import Tables
from stage2_pretrain.masking.region import RegionOptions, region_tables


class Inverted:
    """Two strata, outside and inside, which take each other's place in the budget of `region`.

    So ``hide_inside`` is the share of what lies outside of the region, and the budget is met as there. An encoder
    that learns as well from these masks has not learnt from the region.

    Source: ours.
    """

    Options: ClassVar[type[Strict]] = RegionOptions
    version: ClassVar[int] = 1
    strata: ClassVar[tuple[str, ...]] = ("outside", "inside")

    def __init__(self, options: RegionOptions) -> None:
        self.options = options

    def tables(self) -> Tables:
        """A patch is outside where its coverage stays below the threshold."""
        return region_tables(self.options, inverted=True)
