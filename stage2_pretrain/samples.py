"""Which samples of a region store a run is made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from shared.errors import IncompatibleError
from shared.images import find_sources
from shared.region_images import flat_samples

if TYPE_CHECKING:
    from shared.region_layout import SampleRow
    from shared.regions import RegionStore


def usable_samples(store: RegionStore, rows: str | None = None) -> Sequence[SampleRow]:
    """Rows of a store that have maps, each read from disk when asked for; the others were quarantined by stage 1.

    Args:
        store: The region store.
        rows: Those that a run was made from, as `tell_rows` tells them; None: all.

    Raises:
        UsageError: None has maps, or the store is not of 2D images.
        IncompatibleError: ``rows`` is not what `tell_rows` tells.
    """
    if rows is None:
        return flat_samples(store.samples, store.grid)
    kept = read_rows(rows)
    return flat_samples(store.samples, store.grid, lambda sample: sample.row in kept)


def listed_rows(store: RegionStore, images: Path) -> str:
    """Rows of a store whose images are listed, as `tell_rows` tells them.

    Raises:
        UsageError: None is.
    """
    listed = {source.sample_id for source in find_sources(images)}
    some = flat_samples(store.samples, store.grid, lambda sample: sample.sample_id in listed)
    return tell_rows([sample.row for sample in some])


def tell_rows(rows: Sequence[int]) -> str:
    """Ascending rows as runs.

    >>> tell_rows([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    array = np.asarray(rows, np.int64)
    breaks = np.flatnonzero(np.diff(array) != 1) + 1
    runs = [(int(run[0]), int(run[-1])) for run in np.split(array, breaks) if len(run)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def read_rows(told: str) -> set[int]:
    """The reverse of `tell_rows`.

    Raises:
        IncompatibleError: Not such a text.
    """
    try:
        runs = [tuple(map(int, run.split("-"))) for run in told.split(",")]
        return {row for run in runs for row in range(run[0], run[-1] + 1)}
    except (ValueError, AttributeError):
        raise IncompatibleError("card: its rows are not told as runs; its masks cannot be drawn again") from None


def image_sizes_px(samples: Sequence[SampleRow]) -> Int64[np.ndarray, "N 2"]:
    """Height and width of each sample's decoded image."""
    return np.array([(sample.shape or (0, 0))[-2:] for sample in samples], np.int64)
