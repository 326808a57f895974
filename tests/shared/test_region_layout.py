import doctest
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import region_layout
from shared.errors import UsageError
from shared.region_layout import (
    Layout,
    SampleRow,
    decode_boxes,
    decode_probability,
    encode_boxes,
    encode_probability,
    encode_scores,
    plan_rows_per_shard,
    quarter,
)

LINE = SampleRow(7, "ä/b.png", "ok", "0" * 64, None, {"kind": "2d"}, (1, 30, 40), (0.1, 1e-7), None, "1" * 64, "2" * 64)


@given(
    st.integers(1, 3_000_000),
    st.integers(1, 40),
    st.lists(st.integers(1, 150).map(lambda cells: cells * 4), min_size=2, max_size=3),
)
def test_shards_are_cut_by_bytes_rows_and_number(samples: int, regions: int, grid: list[int]) -> None:
    rows = plan_rows_per_shard(samples, regions, tuple(grid))
    layout = Layout(samples, ("a",) * regions, tuple(grid), rows, "")
    assert 1 <= rows <= 1024
    assert rows == 1 or rows * regions * math.prod(grid) <= 256 << 20
    assert layout.shards >= min(samples, 8)
    assert layout.rows(0).start == 0
    assert layout.rows(layout.shards - 1).stop == samples
    for shard in range(min(layout.shards, 5) - 1):
        assert layout.rows(shard).stop == layout.rows(shard + 1).start
        assert len(layout.rows(shard)) == rows


def test_a_common_store_has_full_shards() -> None:
    assert plan_rows_per_shard(100_000, 4, (256, 256)) == 1024
    assert plan_rows_per_shard(100_000, 40, (256, 256)) == 102


@pytest.mark.parametrize("size", [(0, 1, (8, 8)), (1, 0, (8, 8)), (1, 1, (8, 6)), (1, 1, (8,)), (1, 1, (0, 8))])
def test_what_cannot_be_a_store_is_refused(size: tuple[int, int, tuple[int, ...]]) -> None:
    with pytest.raises(UsageError, match="expected at least one"):
        plan_rows_per_shard(*size)


def test_a_shard_outside_is_refused() -> None:
    with pytest.raises(UsageError, match="shards 0 to 2"):
        Layout(5, ("a",), (8, 8), 2, "").rows(3)


def test_layout_round_trips() -> None:
    layout = Layout(5, ("a", "ö"), (8, 12), 2, "f" * 64)
    assert Layout.from_json(layout.to_json()) == layout
    assert replace(layout, grid=(12, 8)).digest() != layout.digest()


def test_a_line_holds_no_float_and_round_trips() -> None:
    assert b'"spacing_mm":["0.1","1e-07"]' in LINE.to_line()
    assert SampleRow.from_line(LINE.to_line()) == LINE


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 60_000,
        LINE.to_line().replace(b'"ok"', b'"fine"'),
        LINE.to_line().replace(b'"row":7', b'"row":true'),
        LINE.to_line()[:-1] + b',"more":1}',
        LINE.to_line()[:-1] + b" " * 70_000 + b"}",
    ],
)
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - JSON's own message or ours
        SampleRow.from_line(line)


@given(st.floats(0, 1, width=32))
def test_probabilities_survive_to_half_a_step(probability: float) -> None:
    code = encode_probability(np.array([probability], np.float32))
    assert code[0] <= 254
    assert abs(decode_probability(code)[0] - probability) <= 0.5 / 254 + 1e-6
    assert (encode_probability(decode_probability(code)) == code).all()


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_what_is_no_probability_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="outside"):
        encode_probability(np.array([0.5, value]))
    with pytest.raises(UsageError, match="outside"):
        encode_scores(np.array([0.5, value]))


def test_boxes_are_kept_to_a_sixteenth_of_a_pixel() -> None:
    boxes = np.array([[0.03, 0.04, 100.5, 2000.99]])
    assert encode_boxes(boxes).tolist() == [[0, 1, 1608, 32016]]
    assert np.abs(decode_boxes(encode_boxes(boxes)) - boxes).max() <= 1 / 32
    assert encode_boxes(np.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("shape", [(2, 8, 12), (1, 4, 8, 12)])
def test_the_quarter_level_is_the_rounded_mean_of_cells(shape: tuple[int, ...]) -> None:
    maps = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    small = quarter(maps)
    assert small.shape == (shape[0], *(size // 4 for size in shape[1:]))
    for place in np.ndindex(small.shape):
        cell = maps[(place[0], *(slice(4 * part, 4 * part + 4) for part in place[1:]))]
        assert small[place] == int(cell.mean() + 0.5)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(region_layout).failed == 0
