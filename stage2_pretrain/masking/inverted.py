"""The control of `region`: what it does inside the region, done outside of it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from jaxtyping import UInt8

from shared.config import Strict
from stage2_pretrain.masking.plan import Plan
from stage2_pretrain.masking.region import RegionOptions, plan_region


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

    def plan(self, coverage: UInt8[np.ndarray, "B L"]) -> Plan:
        """Plan a batch: a patch is outside where its coverage stays below the threshold."""
        return plan_region(coverage, self.options, inverted=True)
