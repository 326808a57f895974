"""Sizes as published, one size a call, room where a model needs more cells."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import CorruptError
from stage1_localize.grounders.dino_images import (
    FILE,
    Preprocessing,
    enough,
    fitted,
    gather,
    prepare,
    read_preprocessing,
)

SIDES = st.integers(1, 3000)
PLAIN = Preprocessing(64, 106, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
STRIDES = (8, 16, 32, 64)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.sampled_from([224, 480, 800]))
def test_sides_are_those_of_the_published_processor(height: int, width: int, size_px: int) -> None:
    from transformers.image_transforms import get_size_with_aspect_ratio

    longest_px = size_px * 1333 // 800
    published = get_size_with_aspect_ratio((height, width), size_px, longest_px)
    if min(published) > 0:  # it squeezes the thinnest images to nothing
        assert fitted(height, width, size_px, longest_px) == tuple(published)
    assert min(fitted(height, width, size_px, longest_px)) >= 1


def test_pixels_are_those_of_the_published_processor_but_for_its_rounding() -> None:
    from transformers import GroundingDinoImageProcessor

    raw = np.random.default_rng(0).integers(0, 256, (3, 100, 150), dtype=np.uint8)
    size = {"shortest_edge": 64, "longest_edge": 106}
    published = GroundingDinoImageProcessor(size=size)(torch.from_numpy(raw), return_tensors="pt")["pixel_values"][0]
    ours = prepare(raw.astype(np.float32) / 255, Preprocessing(64, 106), (64, 96))
    assert ours.shape == published.shape
    # It resizes bytes, and rounds to them after each axis.
    assert (ours - published).abs().max() < 1.01 / 255 / 0.224
    assert (ours - published).abs().mean() < 0.5 / 255 / 0.224


def test_grey_is_repeated_and_only_images_of_one_size_share_a_call() -> None:
    made = np.random.default_rng(0)
    images = [made.random(shape, np.float32) for shape in ((1, 64, 80), (3, 64, 64), (1, 64, 80), (1, 128, 160))]
    images.insert(1, np.full((3, 64, 64), 0.5, np.float32))
    calls = gather(images, PLAIN, batch=2, strides=STRIDES, cells_min=1)
    assert [call.places for call in calls] == [(0, 3), (4,), (2,)]
    assert torch.equal(calls[0].pixels[0], torch.from_numpy(images[0]).expand(3, -1, -1))


@settings(max_examples=200, deadline=None)
@given(SIDES, SIDES, st.sampled_from([64, 224, 480]))
def test_no_image_has_fewer_cells_than_the_model_has_queries(height: int, width: int, size_px: int) -> None:
    how = Preprocessing(size_px, size_px * 1333 // 800)
    rows, columns = enough(height, width, how, STRIDES, 900)
    assert sum(-(-rows // stride) * -(-columns // stride) for stride in STRIDES) >= 900
    if size_px >= 224 and max(height, width) <= 1.5 * min(height, width):
        assert (rows, columns) == fitted(height, width, how.size_px, how.longest_px), "grown without need"


def test_the_folder_says_how_pixels_are_normalised(tmp_path: Path) -> None:
    assert read_preprocessing(tmp_path, 480) == Preprocessing(480, 799)
    (tmp_path / FILE).write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}))
    how = read_preprocessing(tmp_path, 800)
    assert how == Preprocessing(800, 1333, "bicubic", (0.5,) * 3, (0.25,) * 3)
    assert "bicubic" in str(how)
    assert torch.allclose(prepare(np.ones((1, 900, 900), np.float32), how, (64, 64)), torch.tensor(2.0))
    (tmp_path / FILE).write_text(json.dumps({"do_normalize": False}))
    assert read_preprocessing(tmp_path, 800).mean == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("text", ["{", "[]", '{"resample": 0}', '{"image_std": [0, 1, 1]}', '{"image_mean": 1}'])
def test_a_preprocessor_file_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(CorruptError, match=r"preprocessor_config\.json: cannot be used"):
        read_preprocessing(tmp_path, 480)
