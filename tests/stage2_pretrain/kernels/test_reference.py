"""The reference draw against a slow one in whole numbers, golden bits, and what chance must look like."""

import hashlib
import json
from collections import Counter
from fractions import Fraction
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UsageError
from shared.rng import sample_key, sample_keys, seed_key
from stage2_pretrain.kernels import IMPLS
from stage2_pretrain.kernels.reference import draw_hidden, exponential_q26, race_key
from tests.shared.test_rng import philox_slowly

GOLDEN = Path(__file__).with_name("golden_v1.json")
CONSTANTS = (1901337675, 1195032239, 845921995, 568016905, 279065107, 66489286)
ON_HOST = sorted(set(IMPLS) - {"fused"})
"""``fused`` begins with region maps: `test_op`, `interpreted_fused`."""
ONE_STRATUM = np.zeros(256, np.uint8)
ONES = np.ones(256, np.int32)


def key_of(*text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"".join(text)).digest()[:8], "little")


def round_to_float32(value: Fraction) -> tuple[int, Fraction]:
    """Bits and value of the float32 nearest to a positive rational, ties to even; no float is used."""
    exponent = 0
    while value >= 2 ** (exponent + 24):
        exponent += 1
    while value < Fraction(2) ** (exponent + 23):
        exponent -= 1
    scaled = value / Fraction(2) ** exponent
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2):
        whole += 1
    # A carry out of the mantissa runs into the exponent, as it should.
    return ((exponent + 150) << 23) + whole - (1 << 23), whole * Fraction(2) ** exponent


def exponential_slowly(word: int) -> int:
    odd = (word >> 9) * 2 + 1
    exponent = 25 - odd.bit_length()
    t = (odd << 32 >> odd.bit_length() - 1) - (1 << 32)
    polynomial = CONSTANTS[5]
    for constant in reversed(CONSTANTS[:5]):
        polynomial = constant - (t * polynomial >> 32)
    logarithm = t + ((t * ((1 << 32) - 1 - t) >> 32) * polynomial >> 32)
    assert 0 <= logarithm < 1 << 32
    return max(1, (exponent << 26) - (logarithm >> 6))


def draw_slowly(case: dict[str, Any]) -> list[int]:
    """Hidden patches of one sample, ascending, by Python integers alone."""
    key = key_of(b"mwm-v1\0mask\0", case["seed"].to_bytes(8, "little"))
    sample = key_of(case["sample_id"].encode())
    keys: dict[int, list[tuple[int, int]]] = {}
    for patch, level in enumerate(case["level"]):
        counter = [patch // 4, sample % 2**32, sample >> 32, case["epoch"] | case["view"] << 24]
        word = philox_slowly(counter, [key % 2**32, key >> 32])[patch % 4]
        _, exponential = round_to_float32(Fraction(exponential_slowly(word)))
        bits, _ = round_to_float32(exponential / case["weight_of"][level])
        keys.setdefault(case["stratum_of"][level], []).append((bits, patch))
    return sorted(
        patch
        for stratum, number in enumerate(case["num_hidden"])
        for _, patch in sorted(keys.get(stratum, []))[:number]
    )


def draw_case(case: dict[str, Any], impl: str = "reference") -> list[int]:
    hidden = IMPLS.load(impl)(
        np.array([case["level"]], np.uint8),
        np.array(case["stratum_of"], np.uint8),
        np.array(case["weight_of"], np.int32),
        np.array([case["num_hidden"]], np.int32),
        sample_keys([case["sample_id"]]),
        seed_key=seed_key("mask", case["seed"]),
        epoch=case["epoch"],
        view=case["view"],
    )
    assert hidden.dtype == np.bool_
    return [int(patch) for patch in np.flatnonzero(hidden[0])]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    level = list(draw(st.binary(min_size=1, max_size=60)))
    strata = draw(st.integers(1, 3))
    # Tables repeat a few drawn values: every level still meets every kind of weight and stratum.
    stratum_of = (draw(st.lists(st.integers(0, strata - 1), min_size=1, max_size=7)) * 256)[:256]
    sizes = Counter(stratum_of[value] for value in level)
    weights = st.sampled_from((1, 2, 3, 255, 2**23 + 1, 2**24)) | st.integers(1, 2**24)
    return {
        "sample_id": draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "epoch": draw(st.integers(0, 2**24 - 1)),
        "view": draw(st.integers(0, 255)),
        "level": level,
        "stratum_of": stratum_of,
        "weight_of": (draw(st.lists(weights, min_size=1, max_size=5)) * 256)[:256],
        "num_hidden": [draw(st.integers(0, sizes[number])) for number in range(strata)],
    }


@pytest.mark.parametrize("impl", ON_HOST)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_implementation_equals_whole_numbers(impl: str, case: dict[str, Any]) -> None:
    assert draw_case(case, impl) == draw_slowly(case)


@pytest.mark.parametrize("impl", ON_HOST)
@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text()), ids=lambda case: case["name"])
def test_golden_bits_of_version_1(case: dict[str, Any], impl: str) -> None:
    # These bits are published: a run's masks must draw again years later. A change here is a new version.
    assert draw_case(case, impl) == case["hidden"]
    if len(case["level"]) <= 400:
        assert draw_slowly(case) == case["hidden"]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.integers(1, 2**24))
def test_race_key_is_rounded_as_ieee_says(words: list[int], weight: int) -> None:
    got = race_key(np.array(words, np.uint32), np.full(len(words), weight, np.int32)).tolist()
    for bits, word in zip(got, words, strict=True):
        _, exponential = round_to_float32(Fraction(exponential_slowly(word)))
        assert bits == round_to_float32(exponential / weight)[0]


def test_exponential_is_the_logarithm_and_never_zero() -> None:
    top = np.concatenate([np.arange(1 << 12), (1 << 23) - 1 - np.arange(1 << 12), np.arange(0, 1 << 23, 997)])
    words = top.astype(np.uint32) << np.uint32(9)
    got = exponential_q26(words)
    u = (2.0 * top + 1) / 2**24
    assert np.abs(got / 2**26 + np.log2(u)).max() < 1.2e-6
    assert got.min() >= 1
    assert got.max() == 24 << 26
    # The nine low bits of a word decide nothing.
    assert np.array_equal(exponential_q26(words | np.uint32(511)), got)


def draw_equal(
    level: np.ndarray, num_hidden: list[int], names: list[str], impl: str = "reference", **changes: Any
) -> np.ndarray:
    names_of = {"seed_key": seed_key("mask", 0), "epoch": 0, "view": 0, **changes}
    hidden: np.ndarray = IMPLS.load(impl)(
        np.tile(level, (len(names), 1)),
        changes.pop("stratum_of", ONE_STRATUM),
        changes.pop("weight_of", ONES),
        np.tile(np.array(num_hidden, np.int32), (len(names), 1)),
        sample_keys(names),
        **{key: names_of[key] for key in ("seed_key", "epoch", "view")},
    )
    return hidden


def test_ties_go_to_the_lower_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "stage2_pretrain.kernels.reference.race_key", lambda words, weight: np.full(words.shape, 7, np.int32)
    )
    assert np.flatnonzero(draw_equal(np.zeros(9, np.uint8), [4], ["a"])[0]).tolist() == [0, 1, 2, 3]


def test_a_draw_does_not_depend_on_the_batch_around_it() -> None:
    rng = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(40)]
    level = rng.integers(0, 255, (40, 49), dtype=np.uint8)
    stratum_of = (np.arange(256) < 100).astype(np.uint8)
    sizes = np.stack([(level >= 100).sum(1), (level < 100).sum(1)], axis=1)
    num_hidden = (sizes // 2).astype(np.int32)

    def drawn(chosen: np.ndarray) -> np.ndarray:
        keys = sample_keys([names[index] for index in chosen])
        return draw_hidden(level[chosen], stratum_of, ONES, num_hidden[chosen], keys, seed_key=1, epoch=5, view=2)

    whole = drawn(np.arange(40))
    shuffled = rng.permutation(40)
    assert np.array_equal(drawn(shuffled), whole[shuffled])
    for part in (np.array([7]), np.arange(3, 11), np.arange(0, 40, 4)):
        assert np.array_equal(drawn(part), whole[part])


def test_every_name_matters() -> None:
    level = np.zeros(196, np.uint8)
    first = draw_equal(level, [118], ["a"])
    assert np.array_equal(first, draw_equal(level, [118], ["a"]))
    for other in ({"epoch": 1}, {"view": 1}, {"seed_key": seed_key("mask", 1)}):
        assert not np.array_equal(first, draw_equal(level, [118], ["a"], **other))
    assert not np.array_equal(first, draw_equal(level, [118], ["b"]))


def test_hiding_more_keeps_what_was_hidden() -> None:
    level = np.zeros(49, np.uint8)
    draws = [draw_equal(level, [number], ["a", "b"]) for number in range(50)]
    for fewer, more in pairwise(draws):
        assert (more.sum(1) == fewer.sum(1) + 1).all()
        assert not (fewer & ~more).any()


def test_uniform_inclusion_is_even() -> None:
    n, patches, hidden = 6000, 49, 29
    counts = draw_equal(np.zeros(patches, np.uint8), [hidden], [f"{number}" for number in range(n)]).sum(0)
    share = hidden / patches
    chi_square = ((counts - n * share) ** 2).sum() / (n * share * (1 - share)) * (patches - 1) / patches
    assert 23 < chi_square < 84  # 48 degrees of freedom: 0.1 % on either side


def test_pairs_are_hidden_together_as_often_as_chance_has_it() -> None:
    n, patches = 12000, 5
    drawn = draw_equal(np.zeros(patches, np.uint8), [2], [f"{number}" for number in range(n)])
    counts = Counter(tuple(np.flatnonzero(row).tolist()) for row in drawn)
    expected = n / 10
    assert sum((counts[pair] - expected) ** 2 / expected for pair in combinations(range(5), 2)) < 27.9  # df 9, 0.1 %


def test_draws_of_two_epochs_are_independent() -> None:
    n, patches, hidden = 4000, 49, 29
    names = [f"{number}" for number in range(n)]
    level = np.zeros(patches, np.uint8)
    one = draw_equal(level, [hidden], names)
    for other in (draw_equal(level, [hidden], names, epoch=1), draw_equal(level, [hidden], names, view=1), one[::-1]):
        shared = (one & other).sum(1)
        spread = np.sqrt(hidden**2 / patches * (1 - hidden / patches) ** 2 * patches / (patches - 1) / n)
        assert abs(shared.mean() - hidden**2 / patches) < 4.5 * spread


@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_weighted_draws_are_without_replacement_by_weight(hidden: int) -> None:
    n = 20000
    weights = (1, 2, 5, 16)
    level = np.array([10, 20, 30, 40], np.uint8)
    weight_of = np.ones(256, np.int32)
    weight_of[level] = weights
    drawn = draw_equal(level, [hidden], [f"{number}" for number in range(n)], weight_of=weight_of)
    counts = Counter(tuple(np.flatnonzero(row).tolist()) for row in drawn)
    statistic = 0.0
    sets = list(combinations(range(4), hidden))
    for chosen in sets:
        share = Fraction(0)
        for order in permutations(chosen):  # drawn one after the other, each by weight among those left
            left, chance = Fraction(sum(weights)), Fraction(1)
            for patch in order:
                chance *= weights[patch] / left
                left -= weights[patch]
            share += chance
        statistic += (counts[chosen] - n * float(share)) ** 2 / (n * float(share))
    assert statistic < {3: 16.3, 5: 20.5}[len(sets) - 1]


def test_largest_grid() -> None:
    drawn = draw_equal(np.zeros(65535, np.uint8), [40000], ["a"])
    assert drawn.sum() == 40000
    with pytest.raises(UsageError, match="65536 patches"):
        draw_equal(np.zeros(65536, np.uint8), [1], ["a"])


@pytest.mark.parametrize("impl", ON_HOST)
@pytest.mark.parametrize(
    ("num_hidden", "changes", "match"),
    [
        ([10], {}, "counts"),
        ([-1], {}, "counts"),
        ([1], {"stratum_of": np.ones(256, np.uint8)}, "counts"),
        ([0], {"stratum_of": np.ones(256, np.uint8)}, "counts"),
        ([1], {"weight_of": np.zeros(256, np.int32)}, "weights"),
        ([1], {"weight_of": np.full(256, (1 << 24) + 1, np.int32)}, "weights"),
        ([1], {"epoch": 1 << 24}, "epoch"),
        ([1], {"view": 256}, "view"),
    ],
)
def test_arguments_out_of_range_are_refused(
    num_hidden: list[int], changes: dict[str, Any], match: str, impl: str
) -> None:
    with pytest.raises(UsageError, match=match):
        draw_equal(np.zeros(9, np.uint8), num_hidden, ["a"], impl=impl, **changes)


def test_slow_keys_are_the_keys() -> None:
    assert sample_key("x/y.png") == key_of(b"x/y.png")
