"""Images for training: a function of names alone, however they are read."""

from dataclasses import replace
from itertools import islice
from math import isqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import CorruptError, DecodeError
from shared.images import find_sources
from shared.order import schedule
from shared.rng import uniform_u32
from stage3_finetune.config import AugmentConfig
from stage3_finetune.contracts import Example
from stage3_finetune.data import Part, augment_image, convert_channels, digest_images, plain_order
from stage3_finetune.tasks.classify import ClassTargets

from .conftest import CLASSES, rows

EXAMPLES = [Example(row["sample_id"], row["label"], row["group"], row["split"]) for row in rows()]
TARGETS = ClassTargets(Path("labels.csv"))


def part(images, **changes) -> Part:
    sources = {source.sample_id: source for source in find_sources(images)}
    settings = {
        "sources": sources,
        "sha256": digest_images(sources, EXAMPLES)[0],
        "size_px": 32,
        "channels": 1,
        "augment": AugmentConfig(),
        "seed": 0,
        "cache_bytes": 1 << 20,
    }
    return Part(EXAMPLES, CLASSES, TARGETS, **{**settings, **changes})


def some(part: Part, workers: int) -> list[tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]]:
    ids = [example.sample_id for example in part.examples]
    order = schedule(ids, 16, 0, begun=2)
    return [(batch.image, batch.target, batch.sample_ids) for batch in islice(part.batches(order, workers=workers), 6)]


def test_batches_do_not_depend_on_workers_or_cache(images) -> None:
    expected = some(part(images), 0)
    assert expected[0][0].shape[1:] == (1, 32, 32)
    assert sorted(len(batch[1]) for batch in expected[:4]) == [13, 13, 14, 14]
    for workers, cache in ((0, 0), (2, 1 << 20)):
        for left, right in zip(expected, some(part(images, cache_bytes=cache), workers), strict=True):
            assert torch.equal(left[0], right[0])
            assert torch.equal(left[1], right[1])
            assert left[2] == right[2]


def test_a_sample_looks_different_each_epoch_and_alike_whenever_asked(images) -> None:
    one = part(images)
    first = one.item(5, 0)[0]
    assert not torch.equal(one.item(5, 1)[0], first)
    assert torch.equal(one.item(5, 0)[0], first)
    assert not torch.equal(part(images, seed=1).item(5, 0)[0], first)
    plain = part(images, augment=None)
    assert torch.equal(plain.item(5, 0)[0], plain.item(5, 1)[0])


def test_labels_go_with_their_images(images) -> None:
    shown = part(images, augment=None)
    batches = list(shown.batches(plain_order(len(shown), 16)))
    assert [len(batch.target) for batch in batches] == [16, 16, 16, 6]
    means = torch.cat([batch.image.mean(dim=(1, 2, 3)) for batch in batches])
    label = torch.cat([batch.target for batch in batches])
    levels = [float(means[label == index].mean()) for index in range(3)]
    assert np.allclose(levels, [60 / 255, 120 / 255, 180 / 255], atol=0.02)


def test_large_images_are_kept_small(tmp_path) -> None:
    ramp = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (200, 1))
    Image.fromarray(ramp).save(tmp_path / "big.png")
    sources = {source.sample_id: source for source in find_sources(tmp_path)}
    examples = [Example("big.png", "dark", "g", "train")]
    sha256, _ = digest_images(sources, examples)
    room = 4 * 64 * 32
    big = Part(examples, CLASSES, TARGETS, sources=sources, sha256=sha256, size_px=32, channels=3, augment=None, seed=0,
               cache_bytes=3 * room)  # fmt: skip
    image = big.item(0, 0)[0]
    assert image.shape == (3, 32, 32)
    assert torch.allclose(image[0, 16], torch.linspace(0, 1, 32), atol=0.03)
    made = big.make((0, [0]))
    assert (made.sizes_px, made.spacing_mm) == (((200, 400),), (None,))
    (tmp_path / "big.png").unlink()
    assert torch.equal(big.item(0, 0)[0], image)  # the working copy of 32 x 64 just fits the cache


def test_a_file_that_changes_or_cannot_be_read_stops_the_run(tmp_path) -> None:
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "dark00.png")
    sources = {source.sample_id: source for source in find_sources(tmp_path)}
    example = EXAMPLES[0]
    settings = {"sources": sources, "size_px": 32, "channels": 1, "augment": None, "seed": 0, "cache_bytes": 0}
    one = Part([example], CLASSES, TARGETS, sha256=digest_images(sources, [example])[0], **settings)
    assert one.item(0, 0)[0].sum() == 0
    Image.fromarray(np.ones((40, 40), np.uint8)).save(tmp_path / "dark00.png")
    with pytest.raises(CorruptError, match=r"'dark00\.png'"):
        one.item(0, 0)[0]
    (tmp_path / "dark00.png").write_bytes(b"no image")
    with pytest.raises(DecodeError, match=r"'dark00\.png'") as caught:
        one.item(0, 0)[0]
    assert "take its row out" in caught.value.hint


def test_the_digest_of_images_is_of_ids_and_bytes(images, tmp_path) -> None:
    sources = {source.sample_id: source for source in find_sources(images)}
    expected = digest_images(sources, EXAMPLES)[1]
    assert digest_images(sources, EXAMPLES[::-1])[1] == expected
    assert digest_images(sources, EXAMPLES[1:])[1] != expected
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "other.png")
    swapped = {**sources, "dark00.png": replace(sources["dark00.png"], path=tmp_path / "other.png")}
    assert digest_images(swapped, EXAMPLES)[1] != expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 1000), st.integers(0, 10_000))
def test_crops_stay_inside_and_keep_their_range(height, width, low, seed) -> None:
    pixels = np.random.default_rng(seed).random((1, height, width), np.float32)
    words = uniform_u32("test", seed, "sample", 0, 6)
    plain = AugmentConfig(crop_scale=(low, 1000), brightness_milli=0, contrast_milli=0)
    cut, view = augment_image(pixels, plain, words)
    top, left, bottom, right = (round(share * side) for share, side in zip(
        (view.top, view.left, view.bottom, view.right), (height, width) * 2, strict=True))  # fmt: skip
    window = pixels[:, top:bottom, left:right]
    np.testing.assert_array_equal(cut, window[:, :, ::-1] if view.flip else window)
    out, again = augment_image(pixels, AugmentConfig(crop_scale=(low, 1000)), words)
    assert again == view
    assert out.dtype == np.float32
    assert 0 <= out.min() <= out.max() <= 1
    assert max(1, isqrt(height**2 * low // 1000)) <= out.shape[1] <= height
    assert max(1, isqrt(width**2 * low // 1000)) <= out.shape[2] <= width


def test_augmentation_that_is_off_changes_nothing_and_a_flip_is_a_mirror() -> None:
    pixels = np.arange(12, dtype=np.float32).reshape(1, 3, 4) / 12
    off = AugmentConfig(crop_scale=(1000, 1000), flip=False, brightness_milli=0, contrast_milli=0)
    words = np.full(6, 0xFFFFFFFF, np.uint32)
    np.testing.assert_array_equal(augment_image(pixels, off, words)[0], pixels)
    flipped = augment_image(pixels, off.model_copy(update={"flip": True}), words)[0]
    np.testing.assert_array_equal(flipped, pixels[:, :, ::-1])
    brighter = augment_image(pixels, off.model_copy(update={"brightness_milli": 100}), words)[0]
    np.testing.assert_allclose(brighter, np.minimum(pixels + 0.1, 1), atol=1e-6)


def test_channels() -> None:
    colour = np.stack([np.full((2, 2), value, np.float32) for value in (1.0, 0.5, 0.0)])
    np.testing.assert_allclose(convert_channels(colour, 1), np.full((1, 2, 2), 0.299 + 0.2935), atol=1e-6)
    assert convert_channels(colour[:1], 3).shape == (3, 2, 2)
    assert convert_channels(colour, 3) is colour
