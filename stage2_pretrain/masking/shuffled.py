"""The control of `region`: the same budget, by another sample's region maps."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from jaxtyping import Int64

from shared.config import Strict
from shared.rng import below, draw_u32, seed_key
from stage2_pretrain.masking.plan import Tables
from stage2_pretrain.masking.region import RegionOptions, region_tables

PURPOSE = "shuffled"


class Shuffled:
    """Two strata as of `region`, inside and outside of what another image of the run shows.

    Masks keep the shapes, sizes and usual places of regions, and lose what they have to do with the image. An
    encoder that learns as well from these masks has not learnt from the region.

    Source: ours.
    """

    Options: ClassVar[type[Strict]] = RegionOptions
    version: ClassVar[int] = 1
    strata: ClassVar[tuple[str, ...]] = ("inside", "outside")

    def __init__(self, options: RegionOptions) -> None:
        self.options = options

    def maps_of(self, samples: int, seed: int) -> Int64[np.ndarray, "N"]:
        """Sample i takes the maps of ``(i + s) mod N``, s in 1 .. N - 1 by the run's seed: never its own, each once."""
        words = draw_u32(seed_key(PURPOSE, seed), [0], epoch=0, n=1)[0]
        shift = 1 + below(words, max(1, samples - 1))
        return (np.arange(samples) + shift) % samples

    def tables(self) -> Tables:
        """As of `region`."""
        return region_tables(self.options)
