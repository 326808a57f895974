"""The study's statistics: what pairs cancels, what a claim needs, on numbers whose answer is known."""

import numpy as np
import pytest

from pipelines.study_stats import Compared, Difference, compare, detectable, expected_error, over_seeds, verdict
from pipelines.study_stats import Measure as Score

OVERLAP = 0.25


def mean_of(values: np.ndarray):
    return lambda weight: (weight @ values) / weight.sum(axis=1)


def compared(
    arms: dict[str, list[Score]], group: list[str], *, folds: int = 5, seed: int = 0, resamples: int
) -> Compared:
    """The second arm against the first; folds hold neighbouring images."""
    first, second = arms
    rounds = len(arms[first])
    tested = [np.arange(len(group)) * folds // len(group)] * rounds
    return compare(arms, group, [(second, first)], tested, OVERLAP, seed=seed, resamples=resamples)


def test_a_constant_gap_is_told_exactly_however_hard_the_groups_are() -> None:
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.random(40), 5)
    group = [f"g{i // 5}" for i in range(200)]
    arms = {"base": [mean_of(hard)], "better": [mean_of(hard + 0.03)]}
    found = compared(arms, group, seed=1, resamples=500)
    (difference,) = found.differences
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.03, 0.03, 0.03))
    assert found.scores["base"][2] - found.scores["base"][1] > 0.1  # the scores themselves are uncertain
    assert (found.groups, found.images) == (40, 200)


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    group = [f"g{i // 4}" for i in range(240)]
    covered = 0
    for trial in range(100):
        shared = np.repeat(rng.normal(0, 0.3, 60), 4)
        gap = np.repeat(rng.normal(0.05, 0.2, 60), 4) + rng.normal(0, 0.1, 240)
        arms = {"a": [mean_of(shared)], "b": [mean_of(shared + gap)]}
        found = compared(arms, group, seed=trial, resamples=300).differences[0]
        covered += found.low <= 0.05 <= found.high
    assert 88 <= covered <= 99


def test_files_resampled_instead_of_groups_would_be_too_sure() -> None:
    rng = np.random.default_rng(2)
    gap = np.repeat(rng.normal(0, 0.3, 20), 10)
    arms = {"a": [mean_of(np.zeros(200))], "b": [mean_of(gap)]}
    grouped = compared(arms, [f"g{i // 10}" for i in range(200)], resamples=500).differences[0]
    alone = compared(arms, [str(i) for i in range(200)], resamples=500).differences[0]
    assert grouped.error > 2 * alone.error


def test_rounds_are_averaged_and_every_seed_is_shown() -> None:
    values = np.linspace(0, 1, 30)
    group = [str(i) for i in range(30)]
    steps = np.repeat([0.1, 0.2], 15)  # the second fold gains more
    arms = {"a": [mean_of(values), mean_of(values)], "b": [mean_of(values + steps), mean_of(values + 0.3)]}
    found = compared(arms, group, folds=2, resamples=100).differences[0]
    assert found.value == pytest.approx((0.15 + 0.3) / 2)
    assert found.by_seed == pytest.approx((0.1, 0.2, 0.3, 0.3))
    assert (found.seed_low, found.seed_high, found.seed_error) == over_seeds(
        np.array(found.by_seed), found.value, OVERLAP
    )


def test_a_seed_that_decides_is_seen_though_its_groups_agree() -> None:
    """Five trained models, each wrong or right about all of its images: groups alone would be sure."""
    lucky = np.repeat(np.random.default_rng(7).normal(0.1, 0.1, 5), 40)
    arms = {"a": [mean_of(np.zeros(200))], "b": [mean_of(lucky)]}
    found = compared(arms, [str(i) for i in range(200)], resamples=500).differences[0]
    assert found.low > 0
    assert found.seed_low < 0 < found.seed_high
    assert verdict(found, 0.03).startswith("cannot be resolved here")


def test_the_interval_over_seeds_covers_as_often_as_it_says() -> None:
    """Of folds without a common training image, where no correction is due."""
    rng = np.random.default_rng(3)
    ends = [over_seeds(gaps, gaps.mean(), 0.0)[:2] for gaps in rng.normal(0.05, 0.1, (2000, 5))]
    covered = np.mean([low <= 0.05 <= high for low, high in ends])
    assert 0.935 <= covered <= 0.965
    assert np.isnan(over_seeds(np.array([0.1]), 0.1, 0.25)).all()


def test_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match="two groups"):
        compare({"a": [mean_of(np.ones(3))]}, ["g"] * 3, [], [np.zeros(3, int)], OVERLAP, seed=0, resamples=100)


def test_power() -> None:
    assert detectable(0.02) == pytest.approx(0.056, abs=5e-4)
    assert detectable(0.02, 5) == pytest.approx(0.0744, abs=5e-4)  # (2.776 + 0.941) standard errors, by tables of t
    assert detectable(float("nan")) == float("inf")
    assert expected_error(0.25, 0.5, 175) == pytest.approx(0.25 / np.sqrt(175))
    assert expected_error(0.25, 1.0, 175) == 0


BY = "(by groups "


@pytest.mark.parametrize(
    ("value", "low", "high", "told"),
    [
        (0.04, 0.01, 0.07, f"holds: +4.0 points {BY}+1.0 to +7.0, by seeds +1.0 to +7.0), better, as claimed"),
        (
            0.02,
            0.01,
            0.03,
            f"holds: +2.0 points {BY}+1.0 to +3.0, by seeds +1.0 to +3.0), better, but less than claimed",
        ),
        (0.06, 0.05, 0.07, f"holds: +6.0 points {BY}+5.0 to +7.0, by seeds +5.0 to +7.0), better, and more"),
        (-0.04, -0.07, -0.01, f"does not hold: -4.0 points {BY}-7.0 to -1.0, by seeds -7.0 to -1.0), worse"),
        (0.00, -0.02, 0.02, f"does not hold: +0.0 points {BY}-2.0 to +2.0, by seeds -2.0 to +2.0), less than claimed"),
        (
            0.01,
            -0.04,
            0.06,
            f"cannot be resolved here: +1.0 points {BY}-4.0 to +6.0, by seeds -4.0 to +6.0); 5.6 points",
        ),
        (float("nan"), float("nan"), float("nan"), "cannot be resolved here: no interval"),
    ],
)
def test_sentences(value, low, high, told) -> None:
    found = Difference("a", "b", value, low, high, 0.02, (value,) * 5, low, high, 0.001)
    assert verdict(found, 0.031).startswith(told)


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ((-0.01, 0.09), "cannot be resolved here: +4.0 points"),
        ((float("nan"), float("nan")), "cannot be resolved here: +4.0 points with one seed"),
    ],
)
def test_groups_alone_settle_nothing(seeds, told) -> None:
    found = Difference("a", "b", 0.04, 0.01, 0.07, 0.02, (0.04,), *seeds, float("nan"))
    assert verdict(found, 0.031).startswith(told)
