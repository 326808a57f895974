"""Scores of a study's arms, and differences between them: paired by image, resampled by group, and over seeds.

Every arm predicts the same images, each once a round by a model that never saw its group. One draw of groups weighs all
arms alike, so that what makes a group hard cancels in a difference. That interval is of the models as they were
trained; what other seeds and training images would have changed is in the differences of single folds, each of a seed
of its own. A difference is real where both say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float, Int64
from scipy import stats

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
        low: 2.5th percentile over resampled groups.
        high: 97.5th percentile.
        error: Standard deviation over resampled groups.
        by_seed: The difference in each fold alone, of one seed.
        seed_low: Lower end of the 95 % interval over seeds; NaN for fewer than two.
        seed_high: Its upper end.
        seed_error: Standard error over seeds (`over_seeds`).
    """

    arm: str
    than: str
    value: float
    low: float
    high: float
    error: float
    by_seed: tuple[float, ...]
    seed_low: float
    seed_high: float
    seed_error: float

    @property
    def smallest(self) -> float:
        """The smallest true difference that would be told from none in 80 of 100 such studies, at the 5 % level."""
        return max(detectable(self.error), detectable(self.seed_error, len(self.by_seed)))


@dataclass(frozen=True)
class Compared:
    """One score of one endpoint, for all arms.

    Attributes:
        scores: Arm -> value, and the ends of its 95 % interval over groups.
        differences: Of the pairs that were asked for.
        groups: What was resampled.
        images: Tested in all; in several rounds, as often.
    """

    scores: Mapping[str, tuple[float, float, float]]
    differences: tuple[Difference, ...]
    groups: int
    images: int


@dataclass(frozen=True)
class Place:
    """One fold of one round, as one arm predicted it; the images are the same in all arms, in any order.

    Attributes:
        measure: Score of its N images.
        group: Of each image.
    """

    measure: Measure
    group: Sequence[str]


def compare(
    arms: Mapping[str, Sequence[Place]],
    pairs: Sequence[tuple[str, str]],
    overlap: float,
    *,
    seed: int,
    resamples: int,
) -> Compared:
    """Scores and paired differences, with intervals by group and by seed.

    A score is the mean over folds, of the images as they are and in each resample: ranks of one model's answers are
    never mixed with those of another. A fold where a score is undefined (it lacks a class) is left out, in all arms.

    Args:
        arms: Name -> what it predicted, fold by fold.
        pairs: Which arm is compared with which.
        overlap: Test over training images of a fold (`over_seeds`).
        seed: Of the resamples.
        resamples: How many.

    Raises:
        ValueError: Fewer than two groups: there is nothing to resample.
    """
    places = next(iter(arms.values()))
    names = sorted({name for place in places for name in place.group})
    if len(names) < 2:
        raise ValueError("a study needs two groups or more")
    drawn = draw_groups(len(names), resamples, seed)
    step = max(1, _CHUNK // max(len(place.group) for place in places))
    alone, resampled = {}, {}
    for name, own in arms.items():
        alone[name] = np.array([place.measure(np.ones((1, len(place.group)), np.int64))[0] for place in own])
        again = []
        for place in own:
            rows = np.searchsorted(names, place.group)
            parts = [place.measure(drawn[at : at + step][:, rows]) for at in range(0, resamples, step)]
            again.append(np.concatenate(parts))
        resampled[name] = _mean_of_known(np.array(again))
    scores = {name: (float(_mean_of_known(alone[name])), *_ends(resampled[name])) for name in arms}
    differences = []
    for arm, than in pairs:
        gap = resampled[arm] - resampled[than]
        by_seed = alone[arm] - alone[than]
        by_seed = by_seed[np.isfinite(by_seed)]
        value = float(_mean_of_known(by_seed))
        told = (*_ends(gap), float(np.nanstd(gap)), tuple(map(float, by_seed)))
        differences.append(Difference(arm, than, value, *told, *over_seeds(by_seed, overlap)))
    return Compared(scores, tuple(differences), len(names), sum(len(place.group) for place in places))


def _mean_of_known(values: Float[np.ndarray, "P *R"]) -> Float[np.ndarray, "*R"]:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _ends(values: Float[np.ndarray, "R"]) -> tuple[float, float]:
    usable = values[np.isfinite(values)]
    if not len(usable):
        return float("nan"), float("nan")
    low, high = np.percentile(usable, (100 * LEVEL / 2, 100 - 100 * LEVEL / 2))
    return float(low), float(high)


def over_seeds(by_seed: Float[np.ndarray, "J"], overlap: float) -> tuple[float, float, float]:
    """95 % interval and standard error of a difference over folds, each trained with a seed of its own.

    Folds share training images, so that their variance is raised by test over training images: the corrected
    resampled t-test (Nadeau and Bengio, 2003), variance ``(1 / J + overlap) s^2``, J - 1 degrees of freedom.

    >>> [round(side, 3) for side in over_seeds(np.array([0.02, 0.04, 0.03, 0.05, 0.01]), 0.25)]
    [0.001, 0.059, 0.011]
    """
    count = len(by_seed)
    if count < 2:
        return float("nan"), float("nan"), float("nan")
    error = float(np.std(by_seed, ddof=1) * np.sqrt(1 / count + overlap))
    half = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * error
    middle = float(np.mean(by_seed))
    return middle - half, middle + half, error


def detectable(error: float, seeds: int | None = None) -> float:
    """Smallest true difference that is told from none with 80 % power at the two-sided 5 % level.

    Args:
        error: Standard error of the difference; NaN: nothing is told, and the answer is infinite.
        seeds: How many it was estimated from; None: very many.

    >>> round(detectable(1.0), 2), round(detectable(1.0, 5), 2)
    (2.8, 3.72)
    """
    if np.isnan(error):
        return float("inf")
    quantile = NormalDist().inv_cdf if seeds is None else stats.t(seeds - 1).ppf
    return float(quantile(1 - LEVEL / 2) + quantile(POWER)) * error


def expected_smallest(error: float, seeds: int, overlap: float) -> float:
    """What `Difference.smallest` will be if seeds add nothing to the error over groups; else it will be larger.

    Args:
        error: Standard error over groups.
        seeds: Folds of all rounds.
        overlap: As of `over_seeds`.
    """
    return detectable(error * float(np.sqrt(1 + seeds * overlap)), seeds)


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
    if not np.isfinite([found.low, found.high]).all():
        return "cannot be resolved here: no interval"
    if not np.isfinite([found.seed_low, found.seed_high]).all():
        return f"cannot be resolved here: {100 * found.value:+.1f} points with one seed"
    span = (
        f"{100 * found.value:+.1f} points (by groups {100 * found.low:+.1f} to {100 * found.high:+.1f}, "
        f"by seeds {100 * found.seed_low:+.1f} to {100 * found.seed_high:+.1f})"
    )
    low, high = min(found.low, found.seed_low), max(found.high, found.seed_high)
    if low > 0:
        size = "as claimed" if low <= claim <= high else "but less than claimed" if high < claim else "and more"
        return f"holds: {span}, better, {size}"
    if high < 0:
        return f"does not hold: {span}, worse"
    if high < claim:
        return f"does not hold: {span}, less than claimed"
    smallest = f"the smallest difference that could be seen is {100 * found.smallest:.1f} points"
    return f"cannot be resolved here: {span}; {smallest}"
