"""The study's statistics: what pairs cancels, what a claim needs, on numbers whose answer is known."""

import numpy as np
import pytest

from pipelines.study_stats import Difference, compare, detectable, expected_error, verdict


def mean_of(values: np.ndarray):
    return lambda weight: (weight @ values) / weight.sum(axis=1)


def test_a_constant_gap_is_told_exactly_however_hard_the_groups_are() -> None:
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.random(40), 5)
    group = [f"g{i // 5}" for i in range(200)]
    arms = {"base": [mean_of(hard)], "better": [mean_of(hard + 0.03)]}
    found = compare(arms, group, [("better", "base")], seed=1, resamples=500)
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
        found = compare(arms, group, [("b", "a")], seed=trial, resamples=300).differences[0]
        covered += found.low <= 0.05 <= found.high
    assert 88 <= covered <= 99


def test_files_resampled_instead_of_groups_would_be_too_sure() -> None:
    rng = np.random.default_rng(2)
    gap = np.repeat(rng.normal(0, 0.3, 20), 10)
    arms = {"a": [mean_of(np.zeros(200))], "b": [mean_of(gap)]}
    grouped = compare(arms, [f"g{i // 10}" for i in range(200)], [("b", "a")], seed=0, resamples=500).differences[0]
    alone = compare(arms, [str(i) for i in range(200)], [("b", "a")], seed=0, resamples=500).differences[0]
    assert grouped.error > 2 * alone.error


def test_rounds_are_averaged_and_shown_apart() -> None:
    values = np.linspace(0, 1, 30)
    group = [str(i) for i in range(30)]
    arms = {"a": [mean_of(values), mean_of(values)], "b": [mean_of(values + 0.1), mean_of(values + 0.3)]}
    found = compare(arms, group, [("b", "a")], seed=0, resamples=100).differences[0]
    assert found.value == pytest.approx(0.2)
    assert found.by_round == pytest.approx((0.1, 0.3))


def test_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match="two groups"):
        compare({"a": [mean_of(np.ones(3))]}, ["g"] * 3, [], seed=0, resamples=100)


def test_power() -> None:
    assert detectable(0.02) == pytest.approx(0.056, abs=5e-4)
    assert expected_error(0.25, 0.5, 175) == pytest.approx(0.25 / np.sqrt(175))
    assert expected_error(0.25, 1.0, 175) == 0


@pytest.mark.parametrize(
    ("value", "low", "high", "told"),
    [
        (0.04, 0.01, 0.07, "holds: +4.0 points (+1.0 to +7.0), better, as claimed"),
        (0.02, 0.01, 0.03, "holds: +2.0 points (+1.0 to +3.0), better, but less than claimed"),
        (-0.04, -0.07, -0.01, "does not hold: -4.0 points (-7.0 to -1.0), worse"),
        (0.00, -0.02, 0.02, "does not hold: +0.0 points (-2.0 to +2.0), less than claimed"),
        (0.01, -0.04, 0.06, "cannot be resolved here: +1.0 points (-4.0 to +6.0); the smallest"),
        (float("nan"), float("nan"), float("nan"), "cannot be resolved here: no interval"),
    ],
)
def test_sentences(value, low, high, told) -> None:
    assert verdict(Difference("a", "b", value, low, high, 0.02, ()), 0.031).startswith(told)
