"""Every policy keeps the contract; uniform and region give the plans that masking papers describe."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import digest
from shared.errors import ConfigError, IncompatibleError
from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels.reference import draw_hidden
from stage2_pretrain.masking import POLICIES
from stage2_pretrain.masking.plan import Plan, build_policy, guide_of, maps_of, plan_batch, policy_of_card, policy_spec


@st.composite
def coverages(draw: st.DrawFn) -> np.ndarray:
    batch, patches = draw(st.integers(1, 5)), draw(st.integers(1, 60))
    values = draw(st.binary(min_size=batch * patches, max_size=batch * patches))
    return np.minimum(np.frombuffer(values, np.uint8).reshape(batch, patches), 254)


REGION = [
    {},
    {"overall": 400, "hide_inside": 700},
    {"budget": "per-sample", "hide_inside": 700, "hide_outside": 300},
    {"budget": "per-sample", "hide_inside": 0, "hide_outside": 1000, "inside": 1},
]


def sizes(plan: Plan) -> np.ndarray:
    stratum = plan.stratum_of[plan.level]
    return np.stack([(stratum == number).sum(1) for number in range(plan.num_hidden.shape[1])], axis=1)


@pytest.mark.parametrize("name", list(POLICIES))
@settings(max_examples=50, deadline=None)
@given(coverage=coverages())
def test_plans_fit_the_sampler(name: str, coverage: np.ndarray) -> None:
    policy = build_policy(name)
    plan = plan_batch(policy, coverage)
    assert plan.level.shape == coverage.shape
    assert plan.stratum_of.shape == plan.weight_of.shape == (256,)
    assert plan.num_hidden.shape == (len(coverage), len(policy.strata))
    assert plan.weight_of.min() >= 1
    assert ((plan.num_hidden >= 0) & (plan.num_hidden <= sizes(plan))).all()
    alone = plan_batch(policy, coverage[-1:])
    assert np.array_equal(alone.num_hidden, plan.num_hidden[-1:])
    assert np.array_equal(alone.level, plan.level[-1:])


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_option_is_described_and_on_the_card(name: str) -> None:
    policy = build_policy(name)
    fields = type(policy.options).model_fields
    assert all(field.description for field in fields.values())
    card = policy_spec(name, policy)
    assert card["name"] == name
    assert set(card["options"]) == set(fields)
    digest(card)
    assert policy_of_card(card).options == policy.options
    with pytest.raises(IncompatibleError, match=f"policy {name}: version 99"):
        policy_of_card({**card, "version": 99})


def test_uniform_hides_the_same_share_wherever_the_region_is() -> None:
    coverage = np.random.default_rng(0).integers(0, 255, (5, 49), dtype=np.uint8)
    plan = plan_batch(build_policy("uniform", {"hide": 750}), coverage)
    assert plan.num_hidden.tolist() == [[37]] * 5
    assert not plan.stratum_of.any()
    assert (plan.weight_of == 1).all()


@pytest.mark.parametrize("options", REGION)
@settings(max_examples=50, deadline=None)
@given(coverage=coverages())
def test_region_counts(options: dict[str, Any], coverage: np.ndarray) -> None:
    policy = build_policy("region", options)
    plan = plan_batch(policy, coverage)
    patches = coverage.shape[1]
    threshold = -(-254 * options.get("inside", 500) // 1000)
    inside = [int(n) for n in (coverage >= threshold).sum(1)]
    assert sizes(plan).tolist() == [[n, patches - n] for n in inside]
    for n, (inner, outer), clamped in zip(inside, plan.num_hidden.tolist(), plan.clamped.tolist(), strict=True):
        asked = (n * options.get("hide_inside", 800) + 500) // 1000
        if "hide_outside" in options:
            assert (inner, outer) == (asked, ((patches - n) * options["hide_outside"] + 500) // 1000)
            assert not clamped
        else:
            assert inner + outer == (patches * options.get("overall", 600) + 500) // 1000
            assert clamped == (inner != asked)


@pytest.mark.parametrize(("milli", "lowest"), [(1, 1), (500, 127), (501, 128), (1000, 254)])
def test_inside_begins_at_the_rounded_up_threshold(milli: int, lowest: int) -> None:
    plan = plan_batch(build_policy("region", {"inside": milli}), np.array([[lowest - 1, lowest]], np.uint8))
    assert plan.stratum_of[plan.level].tolist() == [[1, 0]]


@pytest.mark.parametrize("options", REGION)
@settings(max_examples=50, deadline=None)
@given(coverage=coverages())
def test_inverted_is_region_of_what_lies_outside(options: dict[str, Any], coverage: np.ndarray) -> None:
    plan = plan_batch(build_policy("inverted", options), coverage)
    straight = plan_batch(build_policy("region", options), coverage)
    assert np.array_equal(plan.stratum_of[plan.level], 1 - straight.stratum_of[straight.level])
    # Full coverage where there was none, and none elsewhere: what `region` then does inside is done here outside.
    outside = np.where(straight.stratum_of[coverage] == 0, 0, 254).astype(np.uint8)
    mirrored = plan_batch(build_policy("region", options), outside)
    assert np.array_equal(plan.num_hidden, mirrored.num_hidden)
    assert np.array_equal(plan.clamped, mirrored.clamped)


def test_region_soft_hides_the_same_number_and_covered_patches_more_often() -> None:
    coverage = np.tile(np.repeat(np.array([0, 127, 254], np.uint8), 40), (400, 1))
    policy = build_policy("region-soft", {"overall": 300, "sharpness": 9})
    plan = plan_batch(policy, coverage)
    assert plan.num_hidden.tolist() == [[36]] * 400
    assert plan.weight_of[[0, 127, 254]].tolist() == [254, 5 * 254, 9 * 254]
    keys = sample_keys(str(number) for number in range(400))
    tables = (plan.level, plan.stratum_of, plan.weight_of, plan.num_hidden, keys)
    hidden = draw_hidden(*tables, seed_key=seed_key("mask", 5), epoch=0)
    none, half, full = hidden.reshape(400, 3, 40).mean((0, 2))
    assert none + half + full == pytest.approx(0.9)
    # Successive sampling in the limit: a patch of weight w is hidden with chance 1 - exp(-w t), t fixed by the count.
    expected = np.array([1 - np.exp(-weight * 0.0777) for weight in (1, 5, 9)])
    assert expected.sum() == pytest.approx(0.9, abs=0.01)
    assert np.allclose([none, half, full], expected, atol=0.015)


def test_region_soft_of_sharpness_one_is_uniform() -> None:
    plan = plan_batch(build_policy("region-soft", {"sharpness": 1}), np.arange(49, dtype=np.uint8)[None])
    assert len(set(plan.weight_of.tolist())) == 1
    largest = plan_batch(build_policy("region-soft", {"sharpness": 1000}), np.full((1, 4), 254, np.uint8))
    assert largest.weight_of.max() == 254_000


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(2, 5000), seed=st.integers(0, 2**64 - 1))
def test_shuffled_takes_every_sample_s_maps_once_and_never_its_own(samples: int, seed: int) -> None:
    whose = maps_of(build_policy("shuffled"), samples, seed)
    assert sorted(whose) == list(range(samples))
    assert not (whose == np.arange(samples)).any()
    assert np.array_equal(whose, maps_of(build_policy("shuffled"), samples, seed))


def test_shifts_are_spread_over_all_and_others_keep_their_own() -> None:
    shifts = [int(maps_of(build_policy("shuffled"), 5, seed)[0]) for seed in range(400)]
    assert set(shifts) == {1, 2, 3, 4}
    assert all(70 < shifts.count(shift) < 130 for shift in (1, 2, 3, 4))
    for name in set(POLICIES) - {"shuffled"}:
        assert maps_of(build_policy(name), 4, 9).tolist() == [0, 1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(coverage=coverages())
def test_shuffled_plans_as_region(coverage: np.ndarray) -> None:
    plan, straight = (plan_batch(build_policy(name), coverage) for name in ("shuffled", "region"))
    assert np.array_equal(plan.num_hidden, straight.num_hidden)
    assert np.array_equal(plan.stratum_of, straight.stratum_of)


GUIDED = [name for name in POLICIES if guide_of(build_policy(name))]


@pytest.mark.parametrize("name", GUIDED)
@settings(max_examples=50, deadline=None)
@given(coverage=coverages(), seed=st.integers(0, 99))
def test_levels_are_whole_numbers_of_each_sample_by_itself(name: str, coverage: np.ndarray, seed: int) -> None:
    policy: Any = build_policy(name)
    score = np.random.default_rng(seed).integers(0, 4, coverage.shape).astype(np.float32)  # ties too
    levels = policy.levels(score, coverage)
    assert (levels.dtype, levels.shape) == (np.uint8, coverage.shape)
    assert np.array_equal(policy.levels(score[-1:], coverage[-1:]), levels[-1:])
    assert np.array_equal(policy.levels(7 * score + 3, coverage), levels)  # the order of scores alone
    assert policy.gives(levels).all()
    if name != "region-hard" and levels.any():
        assert not policy.gives(levels * np.uint8(2)).any()
        assert not policy.gives(np.zeros_like(levels)).any()
    assert not policy.gives(np.full_like(levels, 0 if name == "region-hard" else 3)).any()
    plan = plan_batch(policy, levels)
    assert (plan.num_hidden.sum(1) == (600 * coverage.shape[1] + 500) // 1000).all()
    assert not plan.clamped.any()


@pytest.mark.parametrize("name", ["hard", "attention"])
def test_the_hardest_are_hidden_and_the_rest_is_drawn(name: str) -> None:
    """Of 10 patches 6 are hidden, 3 of them for their score; the other 3 of 7 are drawn alike."""
    policy: Any = build_policy(name)
    score = np.tile(np.array([0, 9, 1, 8, 2, 2, 2, 2, 2, 2], np.float32), (700, 1))
    plan = plan_batch(policy, policy.levels(score, np.zeros(score.shape, np.uint8)))
    keys = sample_keys([f"s{i}" for i in range(len(score))])
    key = seed_key("mask", 0)
    tables = plan.level, plan.stratum_of, plan.weight_of, plan.num_hidden
    hidden = draw_hidden(*tables, keys, seed_key=key, epoch=0)
    assert hidden[:, [1, 3, 4]].all()
    assert (hidden.sum(1) == 6).all()
    rest = hidden[:, [0, 2, 5, 6, 7, 8, 9]].sum(0)
    assert (abs(rest - 300) < 60).all(), rest  # 4.6 deviations of a binomial of 700 and 3/7


def test_region_hard_weighs_both() -> None:
    policy: Any = build_policy("region-hard", {"sharpness": 4})
    score = np.array([[1, 2, 3, 4, 1, 2, 3, 4]], np.float32)
    coverage = np.array([[0, 0, 0, 0, 254, 254, 254, 254]], np.uint8)
    weights = policy.tables().weight_of[policy.levels(score, coverage)][0] / (1 << 24)
    difficulty = np.array([2, 4, 6, 8, 1, 3, 5, 7]) / 8  # of equal scores the lower patch is the harder
    np.testing.assert_allclose(weights, difficulty * np.repeat([0.25, 1], 4), rtol=0.04)
    alone: Any = build_policy("region-hard", {"sharpness": 1})
    assert np.array_equal(alone.levels(score, coverage), alone.levels(score, 0 * coverage))


def test_an_empty_region_is_valid() -> None:
    plan = plan_batch(build_policy("region", {"overall": 600}), np.zeros((1, 49), np.uint8))
    assert plan.num_hidden.tolist() == [[0, 29]]
    assert not plan.clamped.any()


def test_resolved_options_say_what_ran() -> None:
    assert build_policy("region").options.model_dump()["overall"] == 600
    per_sample = build_policy("region", {"budget": "per-sample", "hide_outside": 300})
    assert per_sample.options.model_dump()["overall"] is None


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("region", {"hide_outside": 300}, "hide_outside belongs to budget 'per-sample'"),
        ("region", {"budget": "per-sample", "overall": 600, "hide_outside": 1}, "overall belongs to budget 'matched'"),
        ("region", {"budget": "per-sample"}, "hide_outside is required"),
        ("region", {"hide_insde": 1}, "Did you mean 'hide_inside'"),
        ("region", {"hide_inside": 1001}, "hide_inside"),
        ("region", {"inside": 0}, "inside"),
        ("inverted", {"hide_outside": 300}, "hide_outside belongs to budget 'per-sample'"),
        ("region-soft", {"sharpness": 0}, "sharpness"),
        ("region-soft", {"overall": 0.6}, "overall"),
        ("uniform", {"hide": 1000}, "hide"),
        ("uniform", {"hide": 0.6}, "hide"),
        ("regoin", {}, "unknown policy 'regoin'"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_policy(name, options)
