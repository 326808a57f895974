"""Which images a store's report shows, and why: some evenly spread, and the worst by rules that are said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from shared.errors import CorruptError
from shared.region_arrays import ShardedArray
from shared.region_layout import ARRAYS, HALF, RESTORE

SPREAD, LOW, FRAGMENTED, UNUSUAL, NOTHING = (
    "evenly spread",
    "low score",
    "fragmented",
    "unusual coverage",
    "nothing found",
)
SPREAD_MAX = 8
WORST_MAX = 2
"""Of each rule."""
EXAMPLES_MAX = SPREAD_MAX + 4 * WORST_MAX
_SCORE_MAX = 65535


T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """What is known of one row of a store.

    Attributes:
        row: In the store.
        shares: Of each region, the share of the map at a probability of 0.5 or more.
        parts: Of each region, the connected parts (by sides) at 0.5 or more.
        scores: Of each region, the best score of its detections in [0, 1]; NaN where there is none.
    """

    row: int
    shares: tuple[float, ...]
    parts: tuple[int, ...]
    scores: tuple[float, ...]


def measure(arrays: Path, rows: Sequence[int], regions: int) -> list[Measured]:
    """Measure some rows of a finalised store; memory does not grow with the store.

    Args:
        arrays: Folder of the arrays.
        rows: With maps, ascending.
        regions: K.

    Raises:
        CorruptError: An array cannot be read.
    """
    stored, found = ShardedArray(arrays / "maps"), Detected(arrays)
    measured = []
    for row in rows:
        inside = read_maps(stored, row) >= HALF
        parts = tuple(ndimage.label(part)[1] for part in inside)
        shares = tuple(float(part.mean()) for part in inside)
        measured.append(Measured(row, shares, parts, found.best_scores(row, regions)))
    return measured


def choose(measured: Sequence[Measured], regions: Sequence[str]) -> dict[int, dict[str, str]]:
    """Rows worth a look.

    Evenly spread ones first, then at most `WORST_MAX` by each rule: the lowest best score of a region that was
    found, the map in most parts, the share farthest from the region's median, nothing found at all. A rule that
    tells no row from the others (all scores alike, every map of one part) chooses none.

    Args:
        measured: Rows to choose from, ascending.
        regions: K names.

    Returns:
        Row -> why it is shown -> the figures behind it, in the order shown; at most `EXAMPLES_MAX` rows.
    """
    chosen: dict[int, dict[str, str]] = {item.row: {SPREAD: ""} for item in spread(measured, SPREAD_MAX)}
    for why, worst in (
        (LOW, _low(measured, regions)),
        (FRAGMENTED, _fragmented(measured, regions)),
        (UNUSUAL, _unusual(measured, regions)),
        (NOTHING, _nothing(measured)),
    ):
        for _, row, told in sorted(worst)[:WORST_MAX]:
            chosen.setdefault(row, {})[why] = told
    return chosen


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, evenly spaced.

    >>> spread("abcdefghi", 3)
    ['a', 'e', 'i']
    """
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def read_maps(stored: ShardedArray, row: int) -> UInt8[np.ndarray, "K s s"]:
    """The region maps of a row, as they are stored.

    Raises:
        CorruptError: They cannot be read.
    """
    maps = np.empty((1, *stored.shape[1:]), np.uint8)
    damaged = stored.read([row], maps)
    if damaged:
        raise CorruptError(f"{stored.folder.name}: row {row}: {damaged[row]}", hint=RESTORE)
    return maps[0]


class Detected:
    """Detections of some rows of a finalised store, read piece by piece; rows that ascend read each piece once.

    Args:
        arrays: Folder of the arrays.
    """

    def __init__(self, arrays: Path) -> None:
        self._offsets = _Flat(arrays / "box_offsets")
        self._scores = _Flat(arrays / "scores")
        self._regions = _Flat(arrays / "box_regions")

    def best_scores(self, row: int, regions: int) -> tuple[float, ...]:
        """Of each region, the best score of a row's detections in [0, 1]; NaN where there is none."""
        first, last = self._offsets.read(row, row + 2).tolist()
        best = [math.nan] * regions
        names, scores = self._regions.read(first, last).tolist(), self._scores.read(first, last).tolist()
        for region, score in zip(names, scores, strict=True):
            best[region] = max(score / _SCORE_MAX, 0.0 if math.isnan(best[region]) else best[region])
        return tuple(best)


class _Flat:
    """A flat array of which one chunk is kept in memory."""

    def __init__(self, folder: Path) -> None:
        import zarr

        self._name = f"{ARRAYS}/{folder.name}"
        self._array: Any = zarr.open_array(folder, mode="r")
        self._size = int(self._array.chunks[0])
        self._held, self._chunk = -1, np.zeros(0)

    def read(self, first: int, last: int) -> np.ndarray[Any, Any]:
        """Values ``first`` to before ``last``."""
        parts = [np.zeros(0, self._array.dtype)]
        for number in range(first // self._size, -(-last // self._size)):
            start = number * self._size
            parts.append(self._load(number)[max(first - start, 0) : last - start])
        return np.concatenate(parts)

    def _load(self, number: int) -> np.ndarray[Any, Any]:
        if number != self._held:
            try:
                self._chunk = np.asarray(self._array[number * self._size : (number + 1) * self._size])
            except Exception as error:  # zarr raises what the damaged byte makes it raise
                raise CorruptError(
                    f"{self._name}: {[*str(error).splitlines(), 'unreadable'][0][:120]}", hint=RESTORE
                ) from None
            self._held = number
        return self._chunk


Worst = Iterable[tuple[float, int, str]]
"""What is worst comes first, then the row, then the figures behind it."""


def _low(measured: Sequence[Measured], regions: Sequence[str]) -> Worst:
    found = []
    for item in measured:
        scores = [(score, name) for score, name in zip(item.scores, regions, strict=True) if score >= 0]  # not NaN
        if scores:
            score, name = min(scores)
            found.append((score, item.row, f"{name} {score:.2f} at best"))
    return found if len({score for score, *_ in found}) > 1 else []


def _fragmented(measured: Sequence[Measured], regions: Sequence[str]) -> Worst:
    most = [(max(item.parts), item) for item in measured]
    return [
        (-count, item.row, f"{regions[item.parts.index(count)]} in {count} parts") for count, item in most if count > 1
    ]


def _unusual(measured: Sequence[Measured], regions: Sequence[str]) -> Worst:
    shares = np.array([item.shares for item in measured]).reshape(-1, len(regions))
    if not len(shares):
        return []
    medians = np.median(shares, axis=0)
    far = np.abs(shares - medians)
    places = far.argmax(axis=1)
    return [
        (-far[n, k], item.row, f"{regions[k]} {shares[n, k]:.1%}, median {medians[k]:.1%}")
        for n, (item, k) in enumerate(zip(measured, places.tolist(), strict=True))
        if far[n, k] > 0
    ]


def _nothing(measured: Sequence[Measured]) -> Worst:
    return [(0.0, item.row, "") for item in measured if all(map(math.isnan, item.scores)) and not any(item.parts)]
