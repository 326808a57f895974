"""How fast each epoch went, and what share of it the model stood still for want of data."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from shared.runlog import read_timings

T = TypeVar("T")
_SHOWN = {"images_per_s": ("images a second", 1), "data_wait_share": ("time lost to data, %", 100)}


class Pace:
    """Clock of one process, from the first batch on; a resumed run begins with a part of an epoch.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began_s = clock()
        self._wait_s = 0.0
        self._samples = 0

    def follow(self, source: Iterator[tuple[T, Sequence[str]]]) -> Iterator[tuple[T, Sequence[str]]]:
        """The same batches with their sample ids; between two of them, time in here is time waited."""
        self._began_s = self._clock()
        try:
            asked_s = self._began_s
            for batch, sample_ids in source:
                self._wait_s += self._clock() - asked_s
                self._samples += len(sample_ids)
                yield batch, sample_ids
                asked_s = self._clock()
        finally:
            if isinstance(source, Generator):
                source.close()

    def close_epoch(self) -> dict[str, float]:
        """Samples a second of wall time, saving and drawing included, and the share of it waited; starts the next."""
        now_s = self._clock()
        elapsed_s = max(now_s - self._began_s, 1e-9)
        row = {"images_per_s": self._samples / elapsed_s, "data_wait_share": self._wait_s / elapsed_s}
        self._began_s, self._wait_s, self._samples = now_s, 0.0, 0
        return row


def pace_curves(out: Path) -> dict[str, tuple[list[float], list[float]]]:
    """What a run's epochs recorded of it: label -> epochs and values."""
    rows = [row for row in read_timings(out) if "epoch" in row]
    return {
        label: (
            [row["epoch"] for row in rows if name in row],
            [round(factor * row[name], 2) for row in rows if name in row],
        )
        for name, (label, factor) in _SHOWN.items()
    }
