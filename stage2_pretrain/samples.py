"""Which samples of a region store a run is made from."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from shared.errors import IncompatibleError, InputMissingError, UsageError
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


def listed_rows(store: RegionStore, table: Path) -> str:
    """Rows of a store whose samples a table names, as `tell_rows` tells them.

    Args:
        store: The region store.
        table: CSV with the column ``sample_id``; others are passed over.

    Raises:
        InputMissingError: No such table, or it names samples that the store has no maps of.
        UsageError: Not such a table.
    """
    if not table.is_file():
        raise InputMissingError(f"subset {table}: no such file", hint="a CSV with the column sample_id")
    try:
        reader = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig")))
        listed = {unicodedata.normalize("NFC", row["sample_id"] or "") for row in reader}
    except (KeyError, UnicodeDecodeError, csv.Error):
        raise UsageError(f"subset {table}: not a CSV in UTF-8 with the column sample_id") from None
    some = {sample.sample_id: sample.row for sample in usable_samples(store) if sample.sample_id in listed}
    if missing := sorted(listed - some.keys()):
        raise InputMissingError(
            f"subset {table}: {len(missing)} of {len(listed)} samples have no maps in the region store, "
            f"as {missing[0]!a}"
        )
    if not some:
        raise UsageError(f"subset {table}: no rows under the header")
    return tell_rows(list(some.values()))


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
