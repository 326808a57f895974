"""The study's statistics: what pairs cancels, what a claim needs, on numbers whose answer is known."""

import numpy as np
import pytest

from pipelines.study_stats import (
    Compared,
    Difference,
    Place,
    compare,
    detectable,
    expected_error,
    expected_smallest,
    over_seeds,
    verdict,
)

OVERLAP = 0.25


def mean_of(values: np.ndarray):
    def measure(weight: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # a resample without an image of this fold
            return (weight @ values) / weight.sum(axis=1)

    return measure


def places(values: np.ndarray, group: list[str], folds: int = 5) -> list[Place]:
    """Folds of neighbouring images."""
    parts = np.split(np.arange(len(group)), folds)
    return [Place(mean_of(values[part]), [group[at] for at in part]) for part in parts]


def compared(arms: dict[str, list[Place]], *, seed: int = 0, resamples: int) -> Compared:
    """The second arm against the first."""
    first, second = arms
    return compare(arms, [(second, first)], OVERLAP, seed=seed, resamples=resamples)


def test_a_constant_gap_is_told_exactly_however_hard_the_groups_are() -> None:
    rng = np.random.default_rng(0)
    hard = np.repeat(rng.random(40), 5)
    group = [f"g{i // 5}" for i in range(200)]
    arms = {"base": places(hard, group), "better": places(hard + 0.03, group)}
    found = compared(arms, seed=1, resamples=500)
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
        arms = {"a": places(shared, group), "b": places(shared + gap, group)}
        found = compared(arms, seed=trial, resamples=300).differences[0]
        covered += found.low <= 0.05 <= found.high
    assert 88 <= covered <= 99


def test_files_resampled_instead_of_groups_would_be_too_sure() -> None:
    rng = np.random.default_rng(2)
    gap = np.repeat(rng.normal(0, 0.3, 20), 10)
    grouped, alone = (
        compared({"a": places(np.zeros(200), group), "b": places(gap, group)}, resamples=500).differences[0]
        for group in ([f"g{i // 10}" for i in range(200)], [str(i) for i in range(200)])
    )
    assert grouped.error > 2 * alone.error


def test_a_score_is_the_mean_over_folds_and_every_seed_is_shown() -> None:
    values = np.linspace(0, 1, 30)
    group = [str(i) for i in range(30)]
    steps = np.repeat([0.1, 0.2], 15)  # the second fold gains more
    arms = {
        "a": [*places(values, group, 2), *places(values, group, 2)],
        "b": [*places(values + steps, group, 2), *places(values + 0.3, group, 2)],
    }
    found = compared(arms, resamples=100)
    difference = found.differences[0]
    assert difference.value == pytest.approx((0.15 + 0.3) / 2)
    assert difference.by_seed == pytest.approx((0.1, 0.2, 0.3, 0.3))
    assert (difference.seed_low, difference.seed_high, difference.seed_error) == over_seeds(
        np.array(difference.by_seed), OVERLAP
    )
    assert found.scores["a"][0] == pytest.approx(0.5)
    assert (found.groups, found.images) == (30, 60)


def test_ranks_of_one_model_are_not_mixed_with_those_of_another() -> None:
    """Two arms that order every fold alike; one's answers are higher in some folds, which no ranking should see."""
    rng = np.random.default_rng(5)

    def auc(score: np.ndarray, truth: np.ndarray):
        def measure(weight: np.ndarray) -> np.ndarray:
            pairs = (score[truth][:, None] > score[~truth]).astype(float)
            ours, theirs = weight[:, truth], weight[:, ~truth]
            return np.einsum("rp,pn,rn->r", ours, pairs, theirs) / (ours.sum(1) * theirs.sum(1))

        return measure

    arms: dict[str, list[Place]] = {"a": [], "b": []}
    for fold in range(5):
        truth, group = np.arange(40) % 2 == 0, [f"{fold}-{i}" for i in range(40)]
        score = rng.normal(0, 1, 40) + truth
        arms["a"].append(Place(auc(score, truth), group))
        arms["b"].append(Place(auc(score + 10 * fold, truth), group))
    (difference,) = compared(arms, resamples=200).differences
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


def test_a_fold_where_a_score_is_undefined_is_left_out_of_both_arms() -> None:
    group = [str(i) for i in range(20)]
    nothing = Place(lambda weight: np.full(len(weight), np.nan), [f"n{i}" for i in range(5)])
    arms = {"a": [*places(np.zeros(20), group, 2), nothing], "b": [*places(np.full(20, 0.1), group, 2), nothing]}
    (difference,) = compared(arms, resamples=100).differences
    assert difference.value == pytest.approx(0.1)
    assert difference.low == pytest.approx(0.1)
    assert difference.by_seed == pytest.approx((0.1, 0.1))


def test_a_drawn_group_weighs_its_own_images() -> None:
    """Nine images of one group gain nothing, the one of another all: a quarter of the draws holds the latter alone."""
    group = [*["many"] * 9, "one"]
    gain = np.array([0.0] * 9 + [1.0])
    arms = {"a": places(np.zeros(10), group, 1), "b": places(gain, group, 1)}
    (difference,) = compared(arms, resamples=200).differences
    assert (difference.value, difference.low, difference.high) == (pytest.approx(0.1), 0, 1)


def test_a_seed_that_decides_is_seen_though_its_groups_agree() -> None:
    """Five trained models, each right or wrong about all of its images: groups alone would be sure."""
    lucky = np.repeat(np.random.default_rng(7).normal(0.1, 0.1, 5), 40)
    group = [str(i) for i in range(200)]
    found = compared({"a": places(np.zeros(200), group), "b": places(lucky, group)}, resamples=500).differences[0]
    assert found.low > 0
    assert found.seed_low < 0 < found.seed_high
    assert verdict(found, 0.03).startswith("cannot be resolved here")


def test_the_interval_over_seeds_covers_as_often_as_it_says() -> None:
    """Of folds without a common training image, where no correction is due."""
    rng = np.random.default_rng(3)
    ends = [over_seeds(gaps, 0.0)[:2] for gaps in rng.normal(0.05, 0.1, (2000, 5))]
    covered = np.mean([low <= 0.05 <= high for low, high in ends])
    assert 0.935 <= covered <= 0.965
    assert np.isnan(over_seeds(np.array([0.1]), 0.25)).all()


def test_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match="two groups"):
        compare({"a": [Place(mean_of(np.ones(3)), ["g"] * 3)]}, [], OVERLAP, seed=0, resamples=100)


def test_power() -> None:
    assert detectable(0.02) == pytest.approx(0.056, abs=5e-4)
    assert detectable(0.02, 5) == pytest.approx(0.0744, abs=5e-4)  # (2.776 + 0.941) standard errors, by tables of t
    assert detectable(float("nan")) == float("inf")
    assert expected_error(0.25, 0.5, 175) == pytest.approx(0.25 / np.sqrt(175))
    assert expected_error(0.25, 1.0, 175) == 0
    assert expected_smallest(0.02, 5, 0.25) == pytest.approx(0.0744 * 1.5, abs=1e-3)  # sqrt(1 + 5 / 4)


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
            f"cannot be resolved here: +1.0 points {BY}-4.0 to +6.0, by seeds -4.0 to +6.0); the smallest",
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
