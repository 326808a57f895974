"""Where an image lies in a square input, and back to the map frame."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stage1_localize.frames import letterboxed, squashed, to_map_frame


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([64, 256, 1008, 1024]))
def test_the_longest_side_fills_and_the_other_keeps_its_proportion(height, width, size):
    frame = letterboxed(height, width, size)
    assert max(frame.height_px, frame.width_px) == size
    assert min(frame.height_px, frame.width_px) >= 1
    assert abs(frame.height_px - size * height / max(height, width)) <= 1
    assert abs(frame.width_px - size * width / max(height, width)) <= 1


def test_boxes_follow_the_image():
    whole = np.array([[0, 0, 200, 100]], np.float32)
    assert letterboxed(100, 200, 64).to_input(whole).tolist() == [[0, 0, 64, 32]]
    assert squashed(100, 200, 64).to_input(whole).tolist() == [[0, 0, 64, 64]]


@pytest.mark.parametrize(("height", "width"), [(128, 256), (256, 64), (256, 256)])
def test_whole_cells_are_cropped_and_resampled_as_torch_does(height, width):
    values = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(values[None, :, :height, :width], (256, 256), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(to_map_frame(values, letterboxed(height, width, 256)), expected, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from([16, 64, 288]))
def test_a_ramp_stays_a_ramp_however_the_image_lies(height, width, cells):
    """Values that grow with the place read the place: no half pixel is lost, and no padding is seen."""
    frame = letterboxed(height, width, 1024)
    at = (torch.arange(cells) + 0.5) / cells * 1024
    rows, columns = to_map_frame(torch.stack([at[:, None].expand(-1, cells), at.expand(cells, -1)]), frame)
    inside = (torch.arange(256) + 0.5) / 256
    cell = 1024 / cells
    for found, filled in ((rows[:, 0], frame.height_px), (columns[0], frame.width_px)):
        expected = (inside * filled).clamp(cell / 2, (np.ceil(filled / cell) - 0.5) * cell)
        torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


def test_padding_is_never_seen():
    values = torch.zeros(1, 64, 64)
    values[:, 17:] = 9e9  # an image of 66 rows of 256 touches 17 rows of cells
    assert not to_map_frame(values, letterboxed(66, 256, 256)).any()
