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
    folds: Sequence[Int64[np.ndarray, "N"]],
    overlap: float,
    *,
    seed: int,
    resamples: int,
) -> Compared:
    """Scores and paired differences, with intervals by group.

    Args:
        arms: Name -> the score of each round; a round's images are the same in all arms and rounds, in one order.
        group: Of each image.
        pairs: Which arm is compared with which.
        folds: For each round, the fold that tested an image.
        overlap: Test over training images of a fold (`over_seeds`).
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
    parts = [(np.unique(of)[:, None] == of).astype(np.int64) for of in folds]
    alone = {
        name: np.concatenate([measure(part) for measure, part in zip(rounds, parts, strict=True)])
        for name, rounds in arms.items()
    }
    differences = []
    for arm, than in pairs:
        gap = resampled[arm] - resampled[than]
        by_seed = alone[arm] - alone[than]
        by_seed = by_seed[np.isfinite(by_seed)]
        value = float(once[arm].mean() - once[than].mean())
        told = (*_ends(gap), float(np.nanstd(gap)), tuple(map(float, by_seed)))
        differences.append(Difference(arm, than, value, *told, *over_seeds(by_seed, value, overlap)))
    return Compared(scores, tuple(differences), len(names), len(group))


def _ends(values: Float[np.ndarray, "R"]) -> tuple[float, float]:
    usable = values[np.isfinite(values)]
    if not len(usable):
        return float("nan"), float("nan")
    low, high = np.percentile(usable, (100 * LEVEL / 2, 100 - 100 * LEVEL / 2))
    return float(low), float(high)


def over_seeds(by_seed: Float[np.ndarray, "J"], value: float, overlap: float) -> tuple[float, float, float]:
    """95 % interval and standard error of a difference over folds, each trained with a seed of its own.

    Folds share training images, so that their variance is raised by test over training images: the corrected
    resampled t-test (Nadeau and Bengio, 2003), variance ``(1 / J + overlap) s^2``, J - 1 degrees of freedom.

    >>> [round(side, 3) for side in over_seeds(np.array([0.02, 0.04, 0.03, 0.05, 0.01]), 0.03, 0.25)]
    [0.001, 0.059, 0.011]
    """
    count = len(by_seed)
    if count < 2:
        return float("nan"), float("nan"), float("nan")
    error = float(np.std(by_seed, ddof=1) * np.sqrt(1 / count + overlap))
    half = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * error
    return value - half, value + half, error


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
    return f"cannot be resolved here: {span}; {100 * found.smallest:.1f} points could be seen"
