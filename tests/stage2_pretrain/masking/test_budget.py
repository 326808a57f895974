"""Counts: exact, monotone, and within what a sample has."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage2_pretrain.masking.budget import count, matched, per_sample

MILLI = st.integers(0, 1000)


@given(st.integers(0, 65535), MILLI)
def test_count_is_the_share_rounded_half_up(n: int, milli: int) -> None:
    assert count(np.array([n]), milli).tolist() == [floor(Fraction(n * milli, 1000) + Fraction(1, 2))]


@pytest.mark.parametrize(("n", "kept"), [(5, 1), (10, 2), (15, 3)])
def test_where_a_float_keeps_one_patch_too_few(n: int, kept: int) -> None:
    assert n - count(np.array([n]), 800).item() == kept
    assert int(n * (1 - 0.8)) == kept - 1


@given(st.integers(1, 400), st.data(), MILLI, MILLI)
def test_per_sample_counts_each_stratum_by_itself(patches: int, data: st.DataObject, inner: int, outer: int) -> None:
    inside = data.draw(st.integers(0, patches))
    hidden = per_sample(np.array([inside]), patches, inner, outer)[0].tolist()
    assert hidden == [(inside * inner + 500) // 1000, ((patches - inside) * outer + 500) // 1000]


@given(st.integers(1, 400), st.data(), MILLI, MILLI)
def test_matched_hides_the_same_number_in_every_sample(
    patches: int, data: st.DataObject, overall: int, inner: int
) -> None:
    inside = data.draw(st.integers(0, patches))
    (hidden,), (clamped,) = (part.tolist() for part in matched(np.array([inside]), patches, overall, inner))
    total = (patches * overall + 500) // 1000
    asked = (inside * inner + 500) // 1000
    assert sum(hidden) == total
    assert 0 <= hidden[0] <= inside
    assert 0 <= hidden[1] <= patches - inside
    assert clamped == (hidden[0] != asked)
    # Clamped only as far as needed: the nearest count that fits.
    fitting = [k for k in range(inside + 1) if 0 <= total - k <= patches - inside]
    assert abs(hidden[0] - asked) == min(abs(k - asked) for k in fitting)


@given(st.integers(1, 200), MILLI, MILLI, MILLI)
def test_budgets_are_monotone(patches: int, overall: int, one: int, other: int) -> None:
    inside = np.arange(patches + 1)
    low, high = sorted((one, other))
    assert (matched(inside, patches, overall, low)[0][:, 0] <= matched(inside, patches, overall, high)[0][:, 0]).all()
    assert (matched(inside, patches, low, overall)[0].sum(1) <= matched(inside, patches, high, overall)[0].sum(1)).all()
    assert (per_sample(inside, patches, low, overall) <= per_sample(inside, patches, high, overall)).all()
    # A larger region never hides fewer of its patches.
    assert (np.diff(matched(inside, patches, overall, one)[0][:, 0]) >= 0).all()


def test_worked_example_of_a_clamp() -> None:
    hidden, clamped = matched(np.array([0, 10, 40, 49]), 49, 600, 900)
    assert hidden.tolist() == [[0, 29], [9, 20], [29, 0], [29, 0]]
    assert clamped.tolist() == [False, False, True, True]
