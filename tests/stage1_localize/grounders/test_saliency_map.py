"""Maps, thresholds and boxes against other ways to the same answer."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stage1_localize.grounders.saliency_map import box_of, parts, threshold, to_levels, to_map_frame


def random_map(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    frame = rng.random((256, 256)) * 0.4
    frame[40:90, 30:200] += 0.5
    return ((frame - frame.min()) / (frame.max() - frame.min())).astype(np.float32)


def test_a_square_image_is_resampled_as_by_torch() -> None:
    grid = np.random.default_rng(0).random((14, 14))
    expected = F.interpolate(torch.from_numpy(grid)[None, None], (256, 256), mode="bilinear")[0, 0].numpy()
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(to_map_frame(grid, 224, 224, 224), expected, atol=1e-6)


def test_padding_is_left_out_of_map_and_range() -> None:
    grid = np.zeros((8, 8))
    grid[:, :4] = np.linspace(0, 1, 8)[:, None]
    grid[:, 4:] = 100  # padding to the right of an image half as wide as high
    frame = to_map_frame(grid, 32, 32, 15)
    assert frame.max() == 1
    assert frame[:, :200].std(axis=1).max() < 1e-6
    assert (np.diff(frame[:, 0]) >= 0).all()
    assert not to_map_frame(np.full((4, 4), 3.0), 32, 32, 32).any()


def test_otsu_is_the_best_cut_and_two_means_is_a_fixed_point() -> None:
    frame = random_map(1)
    levels = to_levels(frame).ravel()

    def within(cut: int) -> float:
        return sum(part.size * part.var() for part in (levels[levels <= cut], levels[levels > cut]) if part.size)

    best = min(range(levels.min(), levels.max()), key=within)
    assert within(threshold(frame, "otsu", 0)) == pytest.approx(within(best))
    cut = threshold(frame, "kmeans", 0)
    low, high = levels[levels <= cut].mean(), levels[levels > cut].mean()
    assert int((low + high) // 2) == cut
    assert threshold(frame, "fixed", 300) == 76


@pytest.mark.parametrize("how", ["otsu", "kmeans", "fixed"])
def test_an_empty_map_has_nothing_above_its_threshold(how: str) -> None:
    frame = np.zeros((256, 256), np.float32)
    assert not (to_levels(frame) > threshold(frame, how, 0)).any()


def test_the_largest_parts_first_and_small_ones_not_at_all() -> None:
    above = np.zeros((256, 256), np.bool_)
    above[0:4, 0:5], above[10:20, 10:20], above[20:22, 20:22], above[100:110, 5:15] = True, True, True, True
    found = parts(above, 5, 10)
    assert [int(part.sum()) for part in found] == [100, 100, 20]  # the corner neighbour of 4 px is a part of its own
    assert found[0][15, 15]
    assert len(parts(above, 5, 1)) == 1
    assert box_of(found[1], 512, 128).tolist() == [2.5, 200, 7.5, 220]
