"""Which samples of a region store a run is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from shared.region_images import flat_samples

if TYPE_CHECKING:
    from shared.region_layout import SampleRow
    from shared.regions import RegionStore


def usable_samples(store: RegionStore) -> Sequence[SampleRow]:
    """Rows of a store that have maps, each read from disk when asked for; the others were quarantined by stage 1.

    Raises:
        UsageError: None has maps, or the store is not of 2D images.
    """
    return flat_samples(store.samples, store.grid)


def image_sizes_px(samples: Sequence[SampleRow]) -> Int64[np.ndarray, "N 2"]:
    """Height and width of each sample's decoded image."""
    return np.array([(sample.shape or (0, 0))[-2:] for sample in samples], np.int64)
