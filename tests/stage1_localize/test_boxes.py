"""Overlap of boxes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage1_localize.boxes import overlaps

corner = st.integers(0, 50)
side = st.integers(1, 50)


@given(corner, corner, side, side, corner, corner, side, side)
def test_overlap_equals_the_count_of_shared_pixels(x, y, w, h, u, v, s, t):
    first, second = np.zeros((2, 101, 101), bool)
    first[y : y + h, x : x + w] = True
    second[v : v + t, u : u + s] = True
    found = overlaps(np.array([[x, y, x + w, y + h]], float), np.array([[u, v, u + s, v + t]], float))
    assert found.shape == (1, 1)
    assert found[0, 0] == pytest.approx((first & second).sum() / (first | second).sum())


def test_no_boxes_give_an_empty_table():
    assert overlaps(np.zeros((0, 4)), np.ones((3, 4))).shape == (0, 3)
