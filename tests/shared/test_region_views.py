"""A region store in a notebook: maps by id, pictures, a page, a torch dataset for spawned workers."""

import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from shared.errors import CorruptError, InputMissingError, UsageError
from shared.figures import REGION_COLOURS
from shared.region_dataset import RegionMaps
from shared.regions import RegionStore, open_region_store
from tests.conftest import ROOT
from tests.shared.planted_stores import plant_store

NAMES = [f"p{number}.png" for number in range(5)]
BAD = "p3.png"


def halves(number: int) -> np.ndarray:
    """Two regions: the left half with a value of its own, the lower half."""
    maps = np.zeros((2, 16, 24), np.uint8)
    maps[0, :, :12] = 254 - number
    maps[1, 8:] = 254
    return maps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    (folder / "images").mkdir()
    for number, name in enumerate(NAMES):
        values = np.random.default_rng(number).integers(0, 256, (20 + number, 30), dtype=np.uint8)
        Image.fromarray(values).save(folder / "images" / name)
    plant_store(
        folder / "store",
        folder / "images",
        lambda source, _: halves(int(source.sample_id[1])),
        regions=("left", "<low>"),
        without=[BAD],
    )
    return folder


@pytest.fixture
def store(root: Path) -> RegionStore:
    return open_region_store(root / "store")


def test_maps_by_id_are_probabilities(store: RegionStore) -> None:
    maps = store.maps("p2.png")
    assert maps.dtype == np.float32
    assert maps.shape == (2, 16, 24)
    np.testing.assert_array_equal(maps, halves(2) / np.float32(254))
    assert store.maps([2]).dtype == np.uint8
    np.testing.assert_array_equal(store.maps([2, 0]), np.stack([halves(2), halves(0)]))
    with pytest.raises(UsageError, match="not in region store"):
        store.maps("p9.png")
    with pytest.raises(UsageError, match="has no maps, quarantined for decode_failed"):
        store.maps(BAD)


def test_an_overlay_is_a_picture_that_notebooks_show(store: RegionStore, root: Path, tmp_path: Path) -> None:
    drawn = store.overlay("p1.png", root / "images", side_px=90)
    with Image.open(io.BytesIO(drawn._repr_png_())) as image:
        assert image.size == (90, 63)
        np.testing.assert_array_equal(np.asarray(image), drawn.pixels)
    assert dict(drawn.colours) == {"left": REGION_COLOURS[0], "<low>": REGION_COLOURS[1]}
    assert "left #ffb020" in repr(drawn)
    drawn.save(tmp_path / "o.png")
    assert (tmp_path / "o.png").read_bytes() == drawn._repr_png_()
    with Image.open(root / "images" / "p1.png") as image:
        pixels = np.asarray(image, np.float32) / 255
    np.testing.assert_array_equal(store.overlay("p1.png", pixels, side_px=90).pixels, drawn.pixels)
    alone = store.overlay("p1.png", side_px=90, regions=["<low>"]).pixels  # without the image: on grey
    assert alone.shape == (63, 90, 3)
    assert len(np.unique(alone[5, 5:40])) == 1
    assert (alone[50, 40] != alone[10, 40]).any()
    for wrong in ("side_px", "regions"):
        with pytest.raises(UsageError):
            store.overlay("p1.png", **{wrong: 0 if wrong == "side_px" else ["right"]})
    with pytest.raises(UsageError, match="quarantined"):
        store.overlay(BAD)
    with pytest.raises(InputMissingError, match="are not there"):
        store.overlay("p1.png", tmp_path)  # where only o.png is


def test_an_image_that_has_changed_is_not_shown(store: RegionStore, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((21, 30), np.uint8)).save(tmp_path / "p1.png")
    with pytest.raises(CorruptError, match="when it was localized"):
        store.overlay("p1.png", tmp_path)


def test_a_store_shows_itself(store: RegionStore) -> None:
    html = store._repr_html_()
    for needle in ("5 images, 1 of them quarantined", "Not for diagnosis", "4 of 4", store.card.artifact_id[:12]):
        assert needle in html
    assert "&lt;low&gt;" in html
    assert "<low>" not in html
    assert html.count("<img ") == 4
    assert BAD not in html


def halved(item: dict) -> dict:
    """A transform: what it leaves can be collated, whatever the images' sizes."""
    return {"mean": item["image"].mean(), "maps": item["maps"], "sample_id": item["sample_id"]}


@pytest.mark.slow
def test_a_dataset_for_spawned_workers(store: RegionStore, root: Path) -> None:
    data = store.dataset(images=root / "images", transform=halved)
    assert isinstance(data, torch.utils.data.Dataset)
    assert (len(data), data.left_out) == (4, 1)
    assert len(pickle.dumps(data)) < 20_000
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="spawn")
    batches = list(loader)
    assert [name for batch in batches for name in batch["sample_id"]] == [name for name in NAMES if name != BAD]
    maps = torch.cat([batch["maps"] for batch in batches])
    wanted = np.stack([halves(number) for number in (0, 1, 2, 4)]) / np.float32(254)
    np.testing.assert_array_equal(maps.numpy(), wanted)


def test_items(store: RegionStore, root: Path) -> None:
    item = store.dataset(images=root / "images")[3]
    assert (item["sample_id"], item["row"], item["group"]) == ("p4.png", 4, "")
    with Image.open(root / "images" / "p4.png") as image:
        np.testing.assert_array_equal(item["image"].numpy()[0], np.asarray(image, np.float32) / 255)
    assert "image" not in store.dataset()[0]
    with pytest.raises(IndexError):  # what ends a loop over a dataset
        store.dataset()[4]
    assert len(list(store.dataset())) == 4


def test_a_store_without_maps_is_no_dataset(root: Path, tmp_path: Path) -> None:
    empty = plant_store(tmp_path / "s", root / "images", lambda *_: halves(0), without=NAMES)
    with pytest.raises(UsageError, match="none of its 5 samples has region maps"):
        RegionMaps(empty)
    assert "5 of them quarantined" in empty._repr_html_()


def test_a_changed_list_of_quarantined_is_noticed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "store", tmp_path / "s")
    (tmp_path / "s" / "quarantine.jsonl").write_text("")
    with pytest.raises(CorruptError, match="changed since it was published"):
        open_region_store(tmp_path / "s").maps(BAD)


def test_opening_a_store_loads_no_torch_and_draws_nothing(root: Path) -> None:
    code = (
        "import sys\n"
        "from shared.regions import open_region_store\n"
        "open_region_store(sys.argv[1]).maps('p0.png')\n"
        "assert not {'torch', 'zarr', 'PIL', 'shared.region_views', 'shared.region_dataset'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(root / "store")], cwd=ROOT, check=True)
