"""RegionDataset: items by names alone, files checked, image and map cut alike."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import InputMissingError, UsageError
from shared.rng import sample_key
from stage2_pretrain.data import RegionDataset, SourceChangedError, as_stored, view_image
from stage2_pretrain.masking.coverage import pool
from stage2_pretrain.window import WindowOptions, draw_windows
from tests.stage2_pretrain.fake_store import FakeStore, write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path, 6)
    return tmp_path


def build(images: Path, store: Any = None, **changes: Any) -> RegionDataset:
    settings: dict[str, Any] = {"size_px": 32, "channels": 1, "window": WindowOptions(), "seed": 3, **changes}
    return RegionDataset(store or FakeStore(images), images, **settings)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(
        torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one
    )


def test_an_item_is_what_it_says(images: Path) -> None:
    dataset = build(images)
    item = dataset.item(2, 0)
    assert item["image"].shape == (1, 32, 32)
    assert item["image"].dtype == torch.float32
    assert 0 <= item["image"].min() < item["image"].max() <= 1
    assert np.array_equal(item["maps"], dataset.store.maps([2])[0])
    assert item["window"].tolist()[4:6] == dataset.sizes_px[2].tolist()
    assert item["sample_key"] % 2**64 == sample_key("002.png")
    assert (item["row"], item["index"]) == (2, 2)


def test_another_sample_s_maps_come_with_the_own_image_and_window(images: Path) -> None:
    own, other = build(images), build(images, maps_of=lambda samples: (np.arange(samples) + 2) % samples)
    for index in range(6):
        item = other.item(index, 1)
        assert np.array_equal(item.pop("maps"), other.store.maps([(index + 2) % 6])[0])
        plain = own.item(index, 1)
        del plain["maps"]
        assert same(item, plain)


@pytest.mark.parametrize("memory_bytes", [0, 30_000, 1 << 30])
def test_what_is_kept_in_memory_changes_nothing(images: Path, memory_bytes: int) -> None:
    kept = build(images, memory_bytes=memory_bytes)
    for epoch in (0, 1, 0):
        fresh = build(images)
        for index in (5, 0, 3):
            assert same(kept.item(index, epoch), fresh.item(index, epoch))


def test_an_epoch_after_the_first_decodes_nothing(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build(images)
    first = dataset.batch(range(6), 0)
    monkeypatch.setattr("stage2_pretrain.data.read_image", lambda source: pytest.fail("decoded again"))
    assert not same(dataset.batch(range(6), 1), first)
    assert same(dataset.batch(range(6), 0), first)


def test_items_depend_on_seed_sample_and_epoch_only(images: Path) -> None:
    dataset = build(images)
    whole = dataset.batch([0, 1, 2, 3, 4, 5], 4)
    part = dataset.batch([4, 1], 4)
    for key in whole:
        assert torch.equal(whole[key][[4, 1]], part[key]), key
    assert not torch.equal(dataset.batch([4, 1], 5)["window"], part["window"])
    assert not torch.equal(build(images, seed=4).batch([4, 1], 4)["window"], part["window"])


def test_absent_and_unknown_samples_are_left_out_and_counted(images: Path) -> None:
    store = FakeStore(images, quarantined="001.png")
    Image.new("L", (50, 50)).save(images / "new.png")
    dataset = build(images, store)
    assert dataset.sample_ids == ("000.png", "002.png", "003.png", "004.png", "005.png")
    assert dataset.rows == (0, 2, 3, 4, 5)
    assert (len(dataset), dataset.absent, dataset.extra) == (5, 1, 1)
    assert (dataset.batch(range(5), 0)["maps"] < 255).all()


def test_missing_images_are_named(images: Path) -> None:
    store = FakeStore(images)
    (images / "004.png").unlink()
    with pytest.raises(InputMissingError, match=r"1 of 6 .* first '004.png'"):
        build(images, store)


def test_a_store_without_maps_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    with pytest.raises(UsageError, match="none of its 1 samples"):
        build(tmp_path, FakeStore(tmp_path, quarantined="000.png"))
    volumes = FakeStore(tmp_path)
    volumes.grid = (8, 8, 8)
    with pytest.raises(UsageError, match="3 axes"):
        build(tmp_path, volumes)


@pytest.mark.parametrize("damage", ["pixel", "truncated", "size"])
def test_a_changed_file_is_exit_4(images: Path, damage: str) -> None:
    dataset = build(images)
    path = images / "003.png"
    if damage == "pixel":
        with Image.open(path) as image:
            changed = np.array(image)
        changed[0, 0] ^= 1
        Image.fromarray(changed).save(path)
    elif damage == "size":
        # The right file, but not of the size that its maps were made at: a store that lies.
        dataset.sizes_px[3] += 1
    else:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SourceChangedError, match=r"003\.png") as caught:
        dataset.item(3, 0)
    assert caught.value.exit_code == 4
    assert caught.value.kind == "source-changed"


def test_eight_bit_images_stay_eight_bit() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    pixels = values.astype(np.float32) / np.float32(255)
    assert np.array_equal(as_stored(pixels), values)
    assert as_stored(pixels).dtype == np.uint8
    finer = pixels.copy()
    finer[0, 0, 0] = 1e-4
    assert as_stored(finer) is finer
    window = np.array([1, 2, 9, 8, 16, 16, 1, 3], np.int32)
    assert torch.equal(view_image(values, window, 8, 1), view_image(pixels, window, 8, 1))


def test_channels() -> None:
    colour = np.stack([np.full((8, 8), value, np.uint8) for value in (255, 0, 51)])
    whole = np.array([0, 0, 8, 8, 8, 8, 0, 0], np.int32)
    grey = view_image(colour, whole, 4, 1)
    assert torch.allclose(grey, torch.full((1, 4, 4), 0.299 + 0.2 * 0.114))
    assert (
        view_image(colour, whole, 4, 3).tolist() == torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1).expand(3, 4, 4).tolist()
    )
    repeated = view_image(colour[:1], whole, 4, 3)
    assert torch.equal(repeated, torch.ones(3, 4, 4))


def test_image_and_map_are_cut_alike() -> None:
    # An image that is its own region map: what a patch shows must be what its coverage says.
    rng = np.random.default_rng(1)
    pixels = np.kron(rng.integers(0, 255, (16, 16), dtype=np.uint8), np.ones((16, 16), np.uint8))[None]
    options = WindowOptions(crop_scale=(300, 1000), turns=True)
    keys = np.arange(40, dtype=np.uint64)
    windows = draw_windows(np.tile([[256, 256]], (40, 1)), keys, seed=0, epoch=0, options=options)
    assert len(np.unique(windows[:, 6:], axis=0)) == 8
    for window in windows:
        image = view_image(pixels, window, 128, 1).view(8, 16, 8, 16).mean((1, 3)).numpy() * 255
        coverage = pool(pixels[None], window[None], (8, 8)).reshape(8, 8)
        assert np.corrcoef(image.ravel(), coverage.ravel())[0, 1] > 0.99
        assert np.abs(image - coverage).max() < 16
