"""Hide a share of the patches, wherever they are."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from shared.config import Strict
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.plan import Tables, equal_weights


class UniformOptions(Strict):
    """How much to hide."""

    hide: int = Field(600, ge=1, le=999, description="Share of all patches to hide, in thousandths.")


class Uniform:
    """One stratum, equal weights. Coverage plays no part.

    Source: MAE (He et al., 2022; 750) and SparK (Tian et al., 2023; 600).
    """

    Options: ClassVar[type[Strict]] = UniformOptions
    version: ClassVar[int] = 1
    strata: ClassVar[tuple[str, ...]] = ("all",)

    def __init__(self, options: UniformOptions) -> None:
        self.options = options

    def tables(self) -> Tables:
        """Every patch, and every sample, alike."""
        return Tables(np.zeros(256, np.uint8), equal_weights(), Counts(self.options.hide, self.options.hide))
