"""A filled box has the box's area, wherever its edges fall."""

import numpy as np
import pytest

from stage1_localize.contracts import Batch, Detections
from stage1_localize.segmenters.boxfill import BoxFill


def fill(height: int, width: int, *boxes: tuple[float, float, float, float]) -> np.ndarray:
    n = len(boxes)
    found = Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.ones(n, np.float32),
        np.zeros(n, int),
        np.zeros(n, int),
        [None] * n,
    )
    return BoxFill(BoxFill.Options()).segment(Batch([np.zeros((1, height, width), np.float32)]), [found])[0]


def test_whole_pixels() -> None:
    (filled,) = fill(128, 512, (64, 32, 128, 48))
    expected = np.zeros((256, 256), np.float32)
    expected[64:96, 32:64] = 1
    assert np.array_equal(filled, expected)


@pytest.mark.parametrize("box", [(0.3, 0.2, 0.9, 3.7), (10.25, 7.5, 11.75, 99.0), (0.0, 0.0, 300.0, 100.0)])
def test_area_of_any_box(box: tuple[float, float, float, float]) -> None:
    (filled,) = fill(100, 300, box)
    x0, y0, x1, y1 = box
    assert filled.sum() / 256**2 == pytest.approx((x1 - x0) * (y1 - y0) / 30000, rel=1e-4)
    assert filled.min() >= 0
    assert filled.max() <= 1


def test_each_box_by_itself_and_none_for_none() -> None:
    filled = fill(64, 64, (0, 0, 32, 32), (32, 32, 64, 64))
    assert filled.shape == (2, 256, 256)
    assert filled[0, :128, :128].all()
    assert filled.sum() == 2 * 128 * 128
    assert fill(64, 64).shape == (0, 256, 256)
