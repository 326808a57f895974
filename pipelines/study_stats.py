"""Scores of a study's arms, and differences between them: paired by image, resampled by group.

Every arm predicts the same images, each once a round by a model that never saw its group. One draw of groups weighs all
arms alike, so that what makes a group hard cancels in a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int64

from stage3_finetune.intervals import draw_groups

Measure = Callable[[Int64[np.ndarray, "R N"]], Float[np.ndarray, "R"]]
"""A score of R weighted copies of the N images, in the order of their ids; NaN where undefined."""

POWER, LEVEL = 0.8, 0.05
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Difference:
    """How much better one arm is than another.

    Attributes:
        arm: The one.
        than: The other.
        value: Difference of their scores.
        low: 2.5th percentile over the resamples.
        high: 97.5th percentile.
        error: Standard deviation over the resamples.
        by_round: The difference in each round alone.
    """

    arm: str
    than: str
    value: float
    low: float
    high: float
    error: float
    by_round: tuple[float, ...]

    @property
    def smallest(self) -> float:
        """The smallest true difference that would be told from none in 80 of 100 such studies, at the 5 % level."""
        return detectable(self.error)


@dataclass(frozen=True)
class Compared:
    """One score of one endpoint, for all arms.

    Attributes:
        scores: Arm -> value, and the ends of its 95 % interval.
        differences: Each arm against the first.
        groups: What was resampled.
        images: In all.
    """

    scores: Mapping[str, tuple[float, float, float]]
    differences: tuple[Difference, ...]
    groups: int
    images: int


def compare(
    arms: Mapping[str, Sequence[Measure]],
    group: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int,
    resamples: int,
) -> Compared:
    """Scores and paired differences, with intervals by group.

    Args:
        arms: Name -> the score of each round; a round's images are the same in all arms and rounds, in one order.
        group: Of each image.
        pairs: Which arm is compared with which.
        seed: Of the resamples.
        resamples: How many.

    Returns:
        A score is the mean over rounds, of the images as they are and in each resample.

    Raises:
        ValueError: Fewer than two groups: there is nothing to resample.
    """
    names, membership = np.unique(np.asarray(group, np.str_), return_inverse=True)
    if len(names) < 2:
        raise ValueError("a study needs two groups or more")
    drawn = draw_groups(len(names), resamples, seed)
    step = max(1, _CHUNK // len(group))
    whole = np.ones((1, len(group)), np.int64)
    once = {name: np.array([measure(whole)[0] for measure in rounds]) for name, rounds in arms.items()}
    again: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    for first in range(0, resamples, step):
        weight = drawn[first : first + step][:, membership]
        for name, rounds in arms.items():
            again[name].append(np.mean([measure(weight) for measure in rounds], axis=0))
    resampled = {name: np.concatenate(parts) for name, parts in again.items()}
    scores = {name: (float(once[name].mean()), *_ends(resampled[name])) for name in arms}
    differences = []
    for arm, than in pairs:
        gap = resampled[arm] - resampled[than]
        by_round = once[arm] - once[than] if len(once[arm]) == len(once[than]) else np.empty(0)
        value = float(once[arm].mean() - once[than].mean())
        error = float(np.nanstd(gap))
        differences.append(Difference(arm, than, value, *_ends(gap), error, tuple(map(float, by_round))))
    return Compared(scores, tuple(differences), len(names), len(group))


def _ends(values: Float[np.ndarray, "R"]) -> tuple[float, float]:
    usable = values[np.isfinite(values)]
    if not len(usable):
        return float("nan"), float("nan")
    low, high = np.percentile(usable, (100 * LEVEL / 2, 100 - 100 * LEVEL / 2))
    return float(low), float(high)


def detectable(error: float) -> float:
    """Smallest true difference that is told from none with 80 % power at the two-sided 5 % level.

    >>> round(detectable(1.0), 2)
    2.8
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * error


def expected_error(spread: float, correlation: float, groups: int) -> float:
    """Standard error of a paired difference before anything is run.

    Args:
        spread: Standard deviation of a score over single groups, as a pilot gave it.
        correlation: Of two arms over groups, assumed.
        groups: In the study.
    """
    return spread * float(np.sqrt(2 * (1 - correlation) / groups))


def verdict(found: Difference, claim: float) -> str:
    """What a difference says of a claimed one, in a plain sentence.

    A study that could not have seen the claim says so instead of "no".
    """
    span = f"{100 * found.value:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
    if not np.isfinite([found.low, found.high]).all():
        return "cannot be resolved here: no interval"
    if found.low > 0:
        size = (
            "as claimed"
            if found.low <= claim <= found.high
            else "but less than claimed"
            if found.high < claim
            else "and more"
        )
        return f"holds: {span}, better, {size}"
    if found.high < 0:
        return f"does not hold: {span}, worse"
    if found.high < claim:
        return f"does not hold: {span}, less than claimed"
    smallest = f"the smallest difference that could be seen is {100 * found.smallest:.1f} points"
    return f"cannot be resolved here: {span}; {smallest}"
