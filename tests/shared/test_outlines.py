"""Outlines against answers that are known by hand or by COCO's own tool (its output is written down here)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.outlines import Outline, area, draw, extent, unpack_runs

PACKED = "522000OO2"
"""What pycocotools 2.0 writes for the mask below."""
MASK = np.array([[0, 0, 0, 0, 1], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], np.float32)


def runs_of(mask: np.ndarray) -> tuple[int, ...]:
    flat = np.concatenate([[0], mask.T.ravel(), [0]])
    edges = np.flatnonzero(np.diff(flat))
    return tuple(int(run) for run in np.diff(np.concatenate([[0], edges, [mask.size]])))


def test_packed_run_lengths_are_those_of_coco_s_own_tool() -> None:
    runs = unpack_runs(PACKED)
    assert runs == [5, 2, 2, 2, 2, 2, 1, 1, 3]
    assert np.array_equal(draw(Outline(runs=tuple(runs)), 4, 5), MASK)
    wide = unpack_runs("b6d0d0" + "0" * 77 + "n5")  # a box of 20 x 40 px in 40 x 50, by the same tool
    expected = np.zeros((40, 50), np.float32)
    expected[10:30, 5:45] = 1
    assert np.array_equal(draw(Outline(runs=tuple(wide)), 40, 50), expected)


@pytest.mark.parametrize("text", ["5\x7f", "b", "ü", "ooooooooooooooooo"])
def test_a_text_that_holds_no_run_lengths_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        unpack_runs(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_run_lengths_give_back_pixels_extent_and_area(height: int, width: int, seed: int) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < 0.3).astype(np.float32)
    outline = Outline(runs=runs_of(mask))
    assert np.array_equal(draw(outline, height, width), mask)
    assert area(outline) == mask.sum()
    rows, columns = np.nonzero(mask)
    around = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
    assert extent(outline, height) == around


def test_a_polygon_on_pixel_corners_is_exact_and_polygons_unite() -> None:
    square, other = (1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0), (3.0, 2.0, 6.0, 2.0, 6.0, 4.0, 3.0, 4.0)
    expected = np.zeros((5, 7), np.float32)
    expected[1:3, 1:4] = expected[2:4, 3:6] = 1
    outline = Outline(polygons=(square, other))
    assert np.array_equal(draw(outline, 5, 7), expected)
    assert extent(outline, 5) == (1, 1, 6, 4)
    assert area(outline) == 12


def test_a_slanted_polygon_has_its_area_and_stays_inside_the_image() -> None:
    outline = Outline(polygons=((5.0, 5.0, 40.0, 12.0, 22.0, 35.0),))
    assert draw(outline, 40, 50).sum() == pytest.approx(area(outline), rel=0.002)
    over = Outline(polygons=((-1.0, -1.0, 3.0, -1.0, 3.0, 9.0, -1.0, 9.0),))
    drawn = draw(over, 4, 4)
    assert np.array_equal(drawn, np.tile([1, 1, 1, 0], (4, 1)).astype(np.float32))


def test_a_concave_polygon_leaves_its_notch_free() -> None:
    notched = Outline(polygons=((0.0, 0.0, 6.0, 0.0, 6.0, 4.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0, 2.0, 4.0, 0.0, 4.0),))
    drawn = draw(notched, 4, 6)
    assert not drawn[2:, 2:4].any()
    assert drawn.sum() == area(notched) == 20
