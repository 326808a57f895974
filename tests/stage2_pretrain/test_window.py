"""Windows: inside the image, of the area asked, flipped and turned as often as asked, by names alone."""

from math import isqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.rng import sample_keys, uniform_u32
from stage2_pretrain.window import WindowOptions, draw_windows

NAMES = [f"{number}.png" for number in range(4000)]
KEYS = sample_keys(NAMES)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 99))
def test_windows_follow_the_words(height: int, width: int, one: int, other: int, number: int) -> None:
    smallest, largest = sorted((one, other))
    options = WindowOptions(crop_scale=(smallest, largest), turns=True)
    size = np.array([[height, width]])
    window = draw_windows(size, KEYS[number : number + 1], seed=5, epoch=9, options=options)
    area, top, left, rest = (int(word) for word in uniform_u32("augment", 5, NAMES[number], 9, 4))
    milli = smallest + (area * (largest - smallest + 1) >> 32)
    crop = [max(1, isqrt(n * n * milli // 1000)) for n in (height, width)]
    start = [word * (n - c + 1) >> 32 for word, n, c in zip((top, left), (height, width), crop, strict=True)]
    assert window.dtype == np.int32
    assert window[0].tolist() == [*start, *crop, height, width, rest >> 31, rest >> 29 & 3]
    assert all(0 <= s <= s + c <= n for s, c, n in zip(start, crop, (height, width), strict=True))


def test_nothing_is_moved_where_nothing_is_asked() -> None:
    options = WindowOptions(crop_scale=(1000, 1000), flip=False, turns=False)
    windows = draw_windows(np.tile([[60, 80]], (4000, 1)), KEYS, seed=0, epoch=0, options=options)
    assert (windows == [0, 0, 60, 80, 60, 80, 0, 0]).all()


def test_flips_turns_and_areas_are_evenly_drawn() -> None:
    windows = draw_windows(np.tile([[1000, 1000]], (4000, 1)), KEYS, seed=0, epoch=0, options=WindowOptions(turns=True))
    counts = np.bincount(windows[:, 6] * 4 + windows[:, 7], minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # 7 degrees of freedom, 0.1 %
    area = windows[:, 2].astype(np.int64) ** 2 / 1e6
    assert 0.668 < area.min() < 0.68
    assert 0.99 < area.max() <= 1
    assert abs(area.mean() - 0.835) < 4 * 0.33 / np.sqrt(12 * 4000)


def test_a_window_depends_on_names_only() -> None:
    sizes = np.random.default_rng(0).integers(30, 300, (4000, 2))
    whole = draw_windows(sizes, KEYS, seed=1, epoch=2, options=WindowOptions())
    part = np.array([17, 3, 999])
    assert np.array_equal(draw_windows(sizes[part], KEYS[part], seed=1, epoch=2, options=WindowOptions()), whole[part])
    for seed, epoch in ((2, 2), (1, 3)):
        assert not np.array_equal(draw_windows(sizes, KEYS, seed=seed, epoch=epoch, options=WindowOptions()), whole)


@pytest.mark.parametrize("scale", [(0, 1000), (800, 700), (1, 1001)])
def test_areas_out_of_range_are_refused(scale: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="1 <= smallest <= largest <= 1000"):
        WindowOptions(crop_scale=scale)
