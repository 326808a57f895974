"""Which samples of a region store a run is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from shared.errors import UsageError

if TYPE_CHECKING:
    from shared.region_layout import SampleRow
    from shared.regions import RegionStore


def usable_samples(store: RegionStore) -> list[SampleRow]:
    """Rows of a store that have maps; the others were quarantined by stage 1.

    Raises:
        UsageError: None has maps, or the store is not of 2D images.
    """
    if len(store.grid) != 2:
        raise UsageError(f"region store: maps of {len(store.grid)} axes, expected 2")
    used = [sample for sample in store.samples if sample.status == "ok" and sample.shape is not None]
    if not used:
        raise UsageError(f"region store: none of its {len(store.samples)} samples has region maps")
    return used


def image_sizes_px(samples: Sequence[SampleRow]) -> Int64[np.ndarray, "N 2"]:
    """Height and width of each sample's decoded image."""
    return np.array([(sample.shape or (0, 0))[-2:] for sample in samples], np.int64)
