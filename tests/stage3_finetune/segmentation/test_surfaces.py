"""Distances between surfaces, against every pair of pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stage3_finetune.segmentation.surfaces import surface, surface_distances

MASKS = arrays.arrays(np.bool_, (7, 9))
NONE = np.zeros((7, 9), bool)


def border(region: np.ndarray, ignore: np.ndarray) -> list[tuple[int, int]]:
    """Pixels of a region with a neighbour that is outside of it."""
    found = []
    for y, x in np.argwhere(region):
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            row, column = y + dy, x + dx
            inside = 0 <= row < region.shape[0] and 0 <= column < region.shape[1]
            if not inside or not (region[row, column] or ignore[row, column]):
                found.append((int(y), int(x)))
                break
    return found


@given(MASKS, MASKS, MASKS, st.sampled_from([(1.0, 1.0), (0.5, 2.0), (3.0, 0.7)]))
@settings(max_examples=80, deadline=None)
def test_as_every_pair_of_pixels_says(truth, found, ignore, spacing) -> None:
    truth, found = truth & ~ignore, found & ~ignore
    one, other = border(truth, ignore), border(found, ignore)
    assert sorted(one) == [tuple(place) for place in np.argwhere(surface(truth, ignore)).tolist()]
    hd95, assd = surface_distances(truth, found, ignore, spacing)
    if not one or not other:
        assert np.isnan([hd95, assd]).all()
        return
    step = (np.array(one)[:, None] - np.array(other)[None]) * np.array(spacing)
    every = np.sqrt((step**2).sum(axis=2))
    there, back = every.min(axis=1), every.min(axis=0)
    assert hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert assd == pytest.approx((there.sum() + back.sum()) / (len(one) + len(other)))


def test_the_larger_direction_counts_and_equal_regions_are_at_no_distance() -> None:
    one, two = NONE.copy(), NONE.copy()
    one[1, 1] = True
    two[1, 1] = two[1, 8] = True
    assert surface_distances(one, one, NONE, (1.0, 1.0)) == (0.0, 0.0)
    hd95, assd = surface_distances(one, two, NONE, (1.0, 1.0))
    assert hd95 == pytest.approx(np.percentile([0, 7], 95))
    assert assd == pytest.approx(7 / 3)
    assert surface_distances(two, one, NONE, (1.0, 1.0)) == (hd95, assd)
