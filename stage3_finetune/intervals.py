"""Bootstrap intervals that resample groups, never files.

Samples of one group (a patient, a run of neighbouring slices) are not independent: an interval that resamples files is
too narrow. Here a resample draws as many groups as there are, with replacement, and every sample counts as often as its
group was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from shared.rng import below, uniform_u32

RESAMPLES = 2000
_CHUNK = 1 << 22
"""Weights held at once while bootstrapping: bounds memory at some hundred megabytes, whatever N is."""


@dataclass(frozen=True)
class Interval:
    """A score in [0, 1] and its 95 % percentile interval; None where it is undefined.

    Attributes:
        value: The score of the samples as they are.
        low: 2.5th percentile over the resamples, or None with fewer than two groups.
        high: 97.5th percentile, likewise.
    """

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        span = "no interval" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"
        return f"{self.value:.3f} ({span})"


def bootstrap(
    measure: Callable[[Int64[np.ndarray, "R N"]], Float[np.ndarray, "R"]],
    group: Sequence[str],
    *,
    seed: int,
    resamples: int,
) -> tuple[Interval, int]:
    """A score and its interval.

    Args:
        measure: Scores of R weighted copies of the N samples; NaN where undefined.
        group: One group name a sample.
        seed: Run seed; resamples are a function of it and of the number of groups alone.
        resamples: How many.

    Returns:
        The interval (no ends with fewer than two groups), and how many resamples had no value.
    """
    return bootstrap_many(lambda weight: measure(weight)[:, None], group, seed=seed, resamples=resamples)[0]


def bootstrap_many(
    measure: Callable[[Int64[np.ndarray, "R N"]], Float[np.ndarray, "R M"]],
    group: Sequence[str],
    *,
    seed: int,
    resamples: int,
) -> list[tuple[Interval, int]]:
    """`bootstrap` of M scores that are measured together."""
    names, membership = np.unique(np.asarray(group, dtype=np.str_), return_inverse=True)
    values = measure(np.ones((1, len(group)), np.int64))[0]
    if len(names) < 2:
        return [_interval(value, np.empty(0)) for value in values]
    drawn = draw_groups(len(names), resamples, seed)
    step = max(1, _CHUNK // len(group))
    found = np.concatenate([measure(drawn[i : i + step][:, membership]) for i in range(0, len(drawn), step)])
    return [_interval(value, column) for value, column in zip(values, found.T, strict=True)]


def draw_groups(groups: int, resamples: int, seed: int) -> Int64[np.ndarray, "R G"]:
    """How often each group is drawn in each resample; every row sums to the number of groups."""
    words = uniform_u32("finetune/bootstrap", seed, str(groups), 0, resamples * groups)
    flat = below(words, groups).reshape(resamples, groups) + groups * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * groups).reshape(resamples, groups)


def _interval(value: float, resampled: Float[np.ndarray, "R"]) -> tuple[Interval, int]:
    """The interval, and how many resamples had no value."""
    usable = resampled[np.isfinite(resampled)]
    dropped = len(resampled) - len(usable)
    if not np.isfinite(value):
        return Interval(None, None, None), dropped
    if len(usable) == 0:
        return Interval(float(value), None, None), dropped
    low, high = np.percentile(usable, (2.5, 97.5))
    return Interval(float(value), float(low), float(high)), dropped
