"""Pooling against one pixel at a time, and images against maps: a patch of one is a patch of the other."""

from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.errors import ConfigError, CorruptError
from stage2_pretrain.masking.coverage import CoverageOptions, cell_edges, combine, pool, region_weights

HALF = Fraction(1, 2)


def half_up(value: Fraction) -> int:
    return floor(value + HALF)


def edges_slowly(start: int, length: int, image_px: int, map_px: int, cells: int) -> list[int]:
    first, last = (half_up(Fraction(edge * map_px, image_px)) for edge in (start, start + length))
    return [first + floor(Fraction(edge * (last - first) + cells // 2, cells)) for edge in range(cells + 1)]


def pool_slowly(regions: list[list[list[int]]], window: list[int], grid: tuple[int, int]) -> list[list[int]]:
    """Pixel by pixel; the view's cell is carried back through the turns and the flip."""
    top, left, height, width, image_height, image_width, flip, turns = window
    rows, columns = grid[::-1] if turns % 2 else grid
    ys = edges_slowly(top, height, image_height, len(regions[0]), rows)
    xs = edges_slowly(left, width, image_width, len(regions[0][0]), columns)
    out = []
    for region in regions:
        pooled = []
        for y in range(grid[0]):
            for x in range(grid[1]):
                # Undo one counter-clockwise quarter at a time: there, (y, x) was (x, size - 1 - y).
                a, b, size = y, x, grid
                for _ in range(turns):
                    a, b, size = b, size[0] - 1 - a, size[::-1]
                if flip:
                    b = columns - 1 - b
                values = [region[i][j] for i in range(ys[a], ys[a + 1]) for j in range(xs[b], xs[b + 1])]
                pooled.append(floor(Fraction(sum(values) + len(values) // 2, len(values))))
        out.append(pooled)
    return out


@st.composite
def cuts(draw: st.DrawFn) -> tuple[np.ndarray, list[int], tuple[int, int]]:
    grid = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    shape = (draw(st.integers(1, 2)), draw(st.integers(5, 24)), draw(st.integers(5, 24)))
    maps = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 254)))
    size = [draw(st.integers(4, 40)), draw(st.integers(4, 40))]
    crop = [draw(st.integers(1, n)) for n in size]
    start = [draw(st.integers(0, n - c)) for n, c in zip(size, crop, strict=True)]
    return maps, [*start, *crop, *size, draw(st.integers(0, 1)), draw(st.integers(0, 3))], grid


@settings(max_examples=150, deadline=None)
@given(cuts())
def test_pooling_equals_one_pixel_at_a_time(cut: tuple[np.ndarray, list[int], tuple[int, int]]) -> None:
    maps, window, grid = cut
    try:
        pooled = pool(maps[None], np.array([window], np.int32), grid)
    except ConfigError:
        rows, columns = grid[::-1] if window[7] % 2 else grid
        ys = edges_slowly(window[0], window[2], window[4], maps.shape[1], rows)
        xs = edges_slowly(window[1], window[3], window[5], maps.shape[2], columns)
        assert any(b <= a for edges in (ys, xs) for a, b in pairwise(edges))
        return
    assert pooled.dtype == np.uint8
    assert pooled[0].tolist() == pool_slowly(maps.tolist(), window, grid)


@given(st.data(), st.integers(1, 4000), st.integers(1, 512), st.integers(1, 28))
def test_cells_tile_the_window(data: st.DataObject, image_px: int, map_px: int, cells: int) -> None:
    length = data.draw(st.integers(1, image_px))
    start = data.draw(st.integers(0, image_px - length))
    expected = edges_slowly(start, length, image_px, map_px, cells)
    assume(expected[-1] - expected[0] >= cells)
    edges = cell_edges(start, length, image_px, map_px, cells).tolist()
    assert edges == expected
    widths = np.diff(edges)
    assert widths.min() >= 1
    assert widths.max() - widths.min() <= 1
    assert 0 <= edges[0] <= edges[-1] <= map_px


def test_a_patch_below_one_map_pixel_is_refused() -> None:
    with pytest.raises(ConfigError, match="29 patches along 28 pixels"):
        cell_edges(0, 56, 512, 256, 29)
    assert len(cell_edges(0, 56, 512, 256, 28)) == 29


def test_absent_samples_are_never_pooled() -> None:
    maps = np.zeros((2, 1, 8, 8), np.uint8)
    maps[1, 0, 7, 7] = 255
    windows = np.tile(np.array([0, 0, 8, 8, 8, 8, 0, 0], np.int32), (2, 1))
    with pytest.raises(CorruptError, match="item 1"):
        pool(maps, windows, (2, 2))


def test_full_coverage_stays_full_and_none_stays_none() -> None:
    windows = np.array([[3, 5, 40, 31, 64, 48, 1, 3]], np.int32)
    for value in (0, 254):
        assert (pool(np.full((1, 1, 256, 256), value, np.uint8), windows, (7, 7)) == value).all()


@given(
    hnp.arrays(np.uint8, (2, 3, 10), elements=st.integers(0, 254)), st.lists(st.integers(0, 9), min_size=3, max_size=3)
)
def test_regions_combine(pooled: np.ndarray, weights: list[int]) -> None:
    assert np.array_equal(combine(pooled, None), pooled.max(axis=1))
    total = sum(weights)
    assume(total)
    mean = combine(pooled, np.array(weights))
    assert mean.dtype == np.uint8
    for sample, row in zip(pooled.tolist(), mean.tolist(), strict=True):
        for patch, value in enumerate(row):
            assert value == (sum(w * q[patch] for w, q in zip(weights, sample, strict=True)) + total // 2) // total


def test_weights_by_name() -> None:
    options = CoverageOptions(combine="weighted", weights={"lung": 2})
    assert region_weights(options, ["tumour", "lung"]).tolist() == [0, 2]
    assert region_weights(CoverageOptions(), ["tumour"]) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"combine": "weighted", "weights": {"lugn": 1}}, "coverage.weights.lugn: no such region"),
        ({"weights": {"lung": 1}}, "expected 'weighted'"),
        ({"combine": "weighted"}, "sum is 0"),
        ({"combine": "weighted", "weights": {"lung": 1 << 55}}, "sum is 36028797018963968; expected below 2"),
        ({"combine": "weighted", "weights": {"lung": 1 << 70}}, "expected below"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        region_weights(CoverageOptions(**options), ["lung"])


def test_the_largest_weights_are_exact() -> None:
    weights = region_weights(
        CoverageOptions(combine="weighted", weights={"lung": (1 << 55) - 2, "heart": 1}), ["heart", "lung"]
    )
    assert combine(np.array([[[0, 254], [254, 0]]], np.uint8), weights).tolist() == [[254, 0]]


def test_mean_is_rounded_half_up() -> None:
    maps = np.array([0, 1, 1, 2], np.uint8).reshape(1, 1, 1, 4)
    pooled = pool(maps, np.array([[0, 0, 1, 4, 1, 4, 0, 0]], np.int32), (1, 2))
    assert pooled.tolist() == [[[ceil(1 / 2), 2]]]
