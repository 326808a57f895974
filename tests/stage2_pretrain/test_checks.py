"""Grids, windows and convolutions that would fail in the middle of a run, found before it."""

import numpy as np
import pytest
from torch import nn

from shared.errors import ConfigError
from shared.rng import sample_keys
from stage2_pretrain.checks import check_grid, check_strided
from stage2_pretrain.masking.coverage import cell_edges
from stage2_pretrain.window import WindowOptions, draw_windows


def every_window_fits(cells: int, map_px: int, image_px: int, crop_px: int, only: int | None = None) -> bool:
    try:
        for start in range(image_px - crop_px + 1) if only is None else (only,):
            cell_edges(start, crop_px, image_px, map_px, cells)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("image_px", [64, 90, 97, 300])
@pytest.mark.parametrize("map_px", [64, 61])
def test_a_grid_passes_exactly_if_every_window_does(image_px: int, map_px: int) -> None:
    window = WindowOptions(crop_scale=(250, 1000))
    crop_px = int(np.sqrt(image_px * image_px * 250 // 1000))
    passed = []
    for cells in range(crop_px * map_px // image_px - 2, crop_px * map_px // image_px + 3):
        try:
            check_grid((cells, 1), (map_px, map_px), np.array([[image_px, image_px]]), window)
            passed.append(True)
        except ConfigError:
            passed.append(False)
        assert passed[-1] == every_window_fits(cells, map_px, image_px, crop_px)
    assert passed[0]
    assert not passed[-1]


def test_the_case_that_offset_0_alone_lets_through() -> None:
    # 45 of 90 image pixels are 31 of 61 map pixels at offset 0, but 30 at others.
    cell_edges(0, 45, 90, 61, 31)
    sizes, window = np.array([[90, 90]] * 50), WindowOptions(crop_scale=(250, 250))
    keys = sample_keys(f"{number}" for number in range(50))
    windows = draw_windows(sizes, keys, seed=0, epoch=0, options=window)
    top = next(top for top in windows[:, 0].tolist() if not every_window_fits(31, 61, 90, 45, top))
    with pytest.raises(ConfigError, match="31 patches along 30 pixels"):
        cell_edges(top, 45, 90, 61, 31)
    with pytest.raises(ConfigError, match="31 patches along 30 pixels"):
        check_grid((31, 31), (61, 61), sizes, window)


def test_a_quarter_turn_exchanges_rows_and_columns() -> None:
    sizes, whole = np.array([[64, 64]]), {"crop_scale": (1000, 1000)}
    check_grid((64, 16), (64, 16), sizes, WindowOptions(**whole))
    with pytest.raises(ConfigError, match="64 patches along 16 pixels"):
        check_grid((64, 16), (64, 16), sizes, WindowOptions(**whole, turns=True))


def test_small_strided_pointwise_convolutions_are_refused_by_name() -> None:
    check_strided(nn.Sequential(nn.Conv2d(8, 4, 1, stride=2), nn.Conv2d(4, 4, 1), nn.Conv2d(1, 4, 3, stride=2)))
    with pytest.raises(ConfigError, match="1 is a 1x1 convolution of stride 2 over 6 channels"):
        check_strided(nn.Sequential(nn.ReLU(), nn.Conv2d(6, 8, 1, stride=2)))
    with pytest.raises(ConfigError, match="over 4 channels"):
        check_strided(nn.Conv2d(8, 8, 1, stride=2, groups=2))
