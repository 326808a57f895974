"""Pooling as fast host code: the reference's numbers, and its errors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, CorruptError, MwmError
from stage2_pretrain.kernels.pooling import pool
from stage2_pretrain.masking import coverage
from tests.stage2_pretrain.masking.test_coverage import cuts


def outcome(way, *arguments):
    """What it gives: numbers, or the error's kind and message."""
    try:
        return way(*arguments).tolist()
    except MwmError as error:
        return type(error), str(error)


@settings(max_examples=200, deadline=None)
@given(cuts(), st.integers(0, 2), st.booleans())
def test_it_equals_the_reference(cut, before: int, absent: bool) -> None:
    maps, window, grid = cut
    height, width = maps.shape[1:]
    whole = [0, 0, height, width, height, width, 0, 0]
    batch = np.stack([*[maps[:, ::-1]] * before, maps])
    windows = np.array([*[whole] * before, window], np.int32)
    if absent:
        batch[-1, -1, window[0] % height, -1] = 255
    assert outcome(pool, batch, windows, grid) == outcome(coverage.pool, batch, windows, grid)


def test_full_maps_of_any_layout() -> None:
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 255, (3, 2, 224, 200), dtype=np.uint8)
    windows = np.array([[5, 9, 100, 90, 128, 110, 1, 3], [0, 0, 64, 64, 64, 64, 0, 2], [1, 2, 30, 40, 64, 64, 1, 1]])
    windows = windows.astype(np.int32)
    assert np.array_equal(pool(maps, windows, (7, 5)), coverage.pool(maps, windows, (7, 5)))
    seen = maps.transpose(0, 1, 3, 2)
    assert np.array_equal(pool(seen, windows, (14, 14)), coverage.pool(seen, windows, (14, 14)))


def test_what_the_reference_refuses_is_refused() -> None:
    maps = np.zeros((2, 1, 8, 8), np.uint8)
    windows = np.tile(np.array([0, 0, 4, 4, 8, 8, 0, 0], np.int32), (2, 1))
    maps[1, 0, 7, 7] = 255
    with pytest.raises(CorruptError, match="item 1"):
        pool(maps, windows, (2, 2))
    with pytest.raises(ConfigError, match="5 patches along 4 pixels"):
        pool(maps, windows, (5, 2))
