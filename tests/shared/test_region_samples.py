"""Samples of a store that stay on disk: what is chosen of them is what a list would hold, and none is kept."""

import gc

import numpy as np
import pytest
from PIL import Image

from shared.errors import UsageError
from shared.region_images import flat_samples
from shared.region_layout import SampleRow
from shared.regions import RegionStore
from tests.shared.planted_stores import plant_store

BAD = ["p1.png", "p4.png"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RegionStore:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "images").mkdir()
    for number in range(9):
        Image.fromarray(np.full((9, 8 + number), number, np.uint8)).save(folder / "images" / f"p{number}.png")
    maps = np.zeros((2, 16, 24), np.uint8)
    return plant_store(folder / "store", folder / "images", lambda *_: maps, without=BAD)


def lines_in_memory() -> int:
    gc.collect()
    return sum(type(item) is SampleRow for item in gc.get_objects())


def test_those_with_maps_are_those_of_a_list(store: RegionStore) -> None:
    wanted = [sample for sample in store.samples if sample.sample_id not in BAD]
    some = flat_samples(store.samples, store.grid)
    assert len(some) == 7
    assert list(some) == wanted
    assert some[-1] == wanted[-1]
    assert some[2:5] == wanted[2:5]
    assert some[5:100] == wanted[5:]
    with pytest.raises(IndexError):
        some[7]


def test_no_line_is_kept_in_memory(store: RegionStore) -> None:
    before = lines_in_memory()
    some = flat_samples(store.samples, store.grid)
    assert sum(sample.row for sample in some)
    assert lines_in_memory() == before


def test_a_store_without_any_is_refused(store: RegionStore) -> None:
    with pytest.raises(UsageError, match="none of its 2 samples has region maps"):
        flat_samples([sample for sample in store.samples if sample.sample_id in BAD], store.grid)
    with pytest.raises(UsageError, match="maps of 3 axes, expected 2"):
        flat_samples(store.samples, (4, 16, 24))
