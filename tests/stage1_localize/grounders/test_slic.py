"""Superpixels: whole, connected, and with borders where the image has them."""

import numpy as np
import pytest
from scipy import ndimage

from stage1_localize.grounders.slic import superpixels


def scene() -> np.ndarray:
    rows, columns = np.mgrid[:256, :256]
    grey = np.where(columns < 101, 40, 90)
    grey[np.hypot(columns - 170, rows - 130) < 40] = 220
    return (grey + np.random.default_rng(0).integers(-4, 5, grey.shape)).astype(np.uint8)


def test_segments_are_whole_connected_and_of_about_the_number_asked() -> None:
    labels = superpixels(scene(), 100, 20, (1, 1))
    areas = np.bincount(labels.ravel())
    assert 70 <= len(areas) <= 140
    assert areas.min() >= 256 * 256 // 400
    assert all(ndimage.label(labels == i)[1] == 1 for i in range(len(areas)))
    first = [int(np.flatnonzero(labels.ravel() == i)[0]) for i in range(len(areas))]
    assert first == sorted(first)


def test_borders_follow_the_image() -> None:
    grey = scene()
    labels = superpixels(grey, 100, 20, (1, 1))
    thing = np.digitize(grey, [65, 150])
    leaks = sum(
        areas.sum() - areas.max() for i in range(labels.max() + 1) for areas in [np.bincount(thing[labels == i])]
    )
    assert leaks / grey.size < 0.005
    squares = superpixels(grey, 100, 255, (1, 1))
    assert sum(a.sum() - a.max() for i in range(squares.max() + 1) for a in [np.bincount(thing[squares == i])]) > leaks


@pytest.mark.parametrize(("aspect", "down", "across"), [((1, 1), 10, 10), ((4, 1), 5, 20), ((1, 4), 20, 5)])
def test_of_nothing_it_makes_cells_as_wide_as_high_in_the_image(
    aspect: tuple[int, int], down: int, across: int
) -> None:
    labels = superpixels(np.full((256, 256), 9, np.uint8), 100, 20, aspect)
    assert labels.max() + 1 == down * across
    assert len(np.unique(labels[:, 128])) == pytest.approx(down, abs=1)
    assert len(np.unique(labels[128])) == pytest.approx(across, abs=1)


def test_an_image_has_the_same_segments_everywhere() -> None:
    rows, columns = np.mgrid[:64, :64]
    labels = superpixels(((rows * rows + 3 * columns) % 256).astype(np.uint8), 9, 10, (1, 1))
    assert np.bincount(labels.ravel()).tolist() == [
        238,
        161,
        431,
        153,
        229,
        126,
        300,
        116,
        121,
        137,
        154,
        199,
        252,
        131,
        264,
        205,
        239,
        165,
        259,
        216,
    ]
