"""Chance under every policy: how often each patch is hidden, against the exact chances of drawing without replacement.

In a stratum, patches of equal weight are exchangeable, and how many of each weight are hidden follows from successive
draws: an exact distribution, by dynamic programming. Its first two moments give two parts of a chi-square: how the
hidden are spread over patches of equal weight, and how over the weights. Draws are seeded; a sampler passes between
the 0.1 % quantiles on either side, so that one more even than chance fails as well.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels import cpu, reference
from stage2_pretrain.masking import POLICIES
from stage2_pretrain.masking.plan import Plan, build_policy, plan_batch

SAMPLES = 40_000
KEYS = sample_keys(map(str, range(SAMPLES)))
SIGNIFICANCE = 0.001
COVERAGE = np.repeat(np.array([0, 60, 200, 254], np.uint8), [14, 12, 10, 13])[np.random.default_rng(3).permutation(49)]

CASES = [(name, {}) for name in POLICIES] + [
    ("region", {"budget": "per-sample", "hide_inside": 700, "hide_outside": 300}),
    ("region", {"overall": 700, "hide_inside": 1000}),
    ("region-soft", {"overall": 300, "sharpness": 50}),
    ("uniform", {"hide": 100}),
]
Draw = Callable[..., np.ndarray]


def numbers_hidden(sizes: list[int], weights: list[int], count: int) -> dict[tuple[int, ...], float]:
    """Chances of how many of each weight are among ``count`` successive draws by weight, without replacement."""
    chances = {(0,) * len(sizes): 1.0}
    for _ in range(count):
        after: dict[tuple[int, ...], float] = {}
        for taken, chance in chances.items():
            left = [(n - t) * w for n, t, w in zip(sizes, taken, weights, strict=True)]
            for place, share in enumerate(left):
                if share:
                    then = (*taken[:place], taken[place] + 1, *taken[place + 1 :])
                    after[then] = after.get(then, 0.0) + chance * share / sum(left)
        chances = after
    return chances


def chi_square(plan: Plan, hidden: np.ndarray) -> tuple[float, int]:
    """The statistic of many draws of one plan, and its degrees of freedom."""
    draws, level = len(hidden), plan.level[0]
    stratum, weight = plan.stratum_of[level], plan.weight_of[level]
    times = hidden.sum(0)
    total, freedom = 0.0, 0
    for s, count in enumerate(plan.num_hidden[0].tolist()):
        kinds = np.unique(weight[stratum == s])
        groups = [np.flatnonzero((stratum == s) & (weight == kind)) for kind in kinds]
        chances = numbers_hidden([len(group) for group in groups], kinds.tolist(), count)
        numbers, chance = np.array(list(chances)), np.array(list(chances.values()))
        mean = chance @ numbers
        for place, group in enumerate(groups):
            n, number = len(group), numbers[:, place]
            # Variance less covariance of two exchangeable patches: E[X] - E[X Y].
            spread = mean[place] / n - chance @ (number * (number - 1)) / (n * max(n - 1, 1))
            if n > 1 and spread > 1e-12:
                total += ((times[group] - times[group].mean()) ** 2).sum() / (draws * spread)
                freedom += n - 1
        covariance = (numbers - mean).T @ ((numbers - mean) * chance[:, None])
        off = np.array([times[group].sum() for group in groups]) - draws * mean
        values, axes = np.linalg.eigh(covariance)
        free = values > 1e-9
        total += float(((off @ axes)[free] ** 2 / (draws * values[free])).sum())
        freedom += int(free.sum())
        assert abs(off.sum()) < 1e-6 * draws  # counts are exact
    return total, freedom


def p_value(draw: Draw, name: str, options: dict[str, Any], epoch: int = 0) -> float:
    """Chance of a statistic as large, under a fair sampler."""
    plan = plan_batch(build_policy(name, options), np.tile(COVERAGE, (SAMPLES, 1)))
    tables = (plan.level, plan.stratum_of, plan.weight_of, plan.num_hidden)
    statistic, freedom = chi_square(plan, draw(*tables, KEYS, seed_key=seed_key("mask", 1), epoch=epoch))
    assert freedom >= 20
    return float(chi2.sf(statistic, freedom))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_patches_are_hidden_as_often_as_chance_has_it(name: str, options: dict[str, Any]) -> None:
    for epoch in (0, 1):
        assert SIGNIFICANCE < p_value(cpu.draw_hidden, name, options, epoch) < 1 - SIGNIFICANCE


def test_the_exact_chances_are_those_of_a_small_case() -> None:
    # Two of weight 1 and one of 3; two draws: the heavy one is missed with chance 2/5 * 1/4.
    chances = numbers_hidden([2, 1], [1, 3], 2)
    assert chances == pytest.approx({(2, 0): 0.1, (1, 1): 0.9})


def favouring_two_patches(words: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """One inside of the region and one outside."""
    heavier = weight.astype(np.float32)
    heavier[:, [np.argmax(COVERAGE == 200), np.argmax(COVERAGE == 60)]] *= np.float32(1.12)
    quotient = reference.exponential_q26(words).astype(np.float32) / heavier
    return quotient.view(np.int32)


def sharing_words(words: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Patches by twos from one word: ties then favour the lower."""
    shared = np.repeat(words[:, ::2], 2, axis=1)[:, : words.shape[1]]
    quotient = reference.exponential_q26(shared).astype(np.float32) / weight.astype(np.float32)
    return quotient.view(np.int32)


def linear(words: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A uniform number in place of an exponential one: right for equal weights alone."""
    quotient = (words >> np.uint32(8)).astype(np.float32) / weight.astype(np.float32)
    return quotient.view(np.int32)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("race_key", [favouring_two_patches, sharing_words])
def test_a_biased_sampler_fails(
    race_key: Callable[..., Any], name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "race_key", race_key)
    assert p_value(reference.draw_hidden, name, options) < SIGNIFICANCE / 10


@pytest.mark.parametrize("race_key", [linear, lambda words, weight: linear(words, np.ones_like(weight))])
def test_a_sampler_that_takes_weights_for_something_else_fails(
    race_key: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "race_key", race_key)
    assert p_value(reference.draw_hidden, "region-soft", {}) < SIGNIFICANCE / 10
    assert SIGNIFICANCE < p_value(reference.draw_hidden, "uniform", {}) < 1 - SIGNIFICANCE


def test_a_sampler_that_knows_no_names_fails() -> None:
    def deaf(level: np.ndarray, *tables: np.ndarray, **names: int) -> np.ndarray:
        return cpu.draw_hidden(level, *tables[:-1], np.full_like(KEYS, KEYS[0]), **names)

    def too_even(level: np.ndarray, *tables: np.ndarray, **names: int) -> np.ndarray:
        # Every patch in turn, the same number of times.
        start = cpu.draw_hidden(level[:1], *tables[:2], tables[2][:1], KEYS[:1], **names)[0]
        return np.stack([np.roll(start, number % 49) for number in range(SAMPLES // 49 * 49)])

    assert p_value(deaf, "uniform", {}) < SIGNIFICANCE
    assert p_value(too_even, "uniform", {}) > 1 - SIGNIFICANCE
