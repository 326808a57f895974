"""Rows made again: to the bit where parts and images are the same, refused by name where they are not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.errors import IncompatibleError, InputMissingError
from shared.regions import RegionStore, open_region_store
from stage1_localize.contracts import Detections, Region
from stage1_localize.grounders.planted import Planted
from stage1_localize.recompute import Recomputer, _difference, differs_by, same
from tests.stage1_localize.planted_corpus import planted_store, write_images


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RegionStore, Path]:
    return planted_store(tmp_path_factory.mktemp("recompute"))


def test_every_row_is_made_again_to_the_bit(made):
    store, images = made
    again = Recomputer(store, images)
    for sample in store.samples:
        if sample.status == "ok":
            found = again.make(sample.row)
            assert found.problem is None
            assert same(found.answer, sample)


def test_a_row_that_depends_on_its_neighbours_is_made_with_them(made, monkeypatch):
    store, images = made
    places = []
    locate = Planted.locate

    def upset(self, batch, regions):
        places.append([bool(image.any()) for image in batch.images])
        found = locate(self, batch, regions)
        if sum(places[-1]) == 1:  # alone among blanks
            for each in found:
                each.score[:] = 0.5
        return found

    monkeypatch.setattr(Planted, "locate", upset)
    row = store.row("009.png")
    found = Recomputer(store, images).make(row)
    assert same(found.answer, store.samples[row])
    assert found.whole
    assert [sum(each) for each in places] == [1, len(places[1])]
    assert len(places[1]) == store.card.identity.spec["numeric"]["micro_batch"]


def test_a_neighbour_that_is_gone_is_said_where_it_may_matter(made, monkeypatch, tmp_path):
    store, images = made
    poor = shutil.copytree(images, tmp_path / "images")
    (poor / "008.png").unlink()
    monkeypatch.setattr(Planted, "locate", lambda self, batch, regions: [Detections.none() for _ in batch.images])
    found = Recomputer(store, poor).make(store.row("009.png"))
    assert not found.whole
    assert Recomputer(store, images).make(store.row("009.png")).whole


def test_an_image_that_is_gone_or_another_is_said(made, tmp_path):
    store, images = made
    copy = shutil.copytree(images, tmp_path / "images")
    (copy / "003.png").unlink()
    shutil.copy(copy / "005.png", copy / "004.png")
    again = Recomputer(store, copy)
    assert again.make(store.row("003.png")).problem == "its image is not there"
    assert again.make(store.row("004.png")).problem == "its image has other bytes than were localized"
    assert again.make(store.row("005.png")).answer is not None
    (tmp_path / "none").mkdir()
    with pytest.raises(InputMissingError, match="none of the 22 samples"):
        Recomputer(store, write_images(tmp_path / "others" / "deeper", 1).parent)


def test_other_parts_than_made_the_store_are_named(made, monkeypatch):
    store, images = made
    monkeypatch.setattr(Planted, "version", 7)
    with pytest.raises(IncompatibleError, match=r"its grounder.version is 1, here it would be 7"):
        Recomputer(store, images)


def test_a_setting_that_differs_is_named_by_its_whole_path():
    then = {"grounder": {"name": "planted", "options": {"level_milli": 800, "near": {"a": 1}}}}
    now = {"grounder": {"name": "planted", "options": {"level_milli": 700, "near": {"a": 1}}}}
    assert _difference("grounder", then, now) == "its grounder.options.level_milli is 800, here it would be 700"
    now["grounder"]["options"] = {"level_milli": 800, "near": {}}
    assert _difference("grounder", then, now) == "its grounder.options.near.a is 1, here it would be nothing"
    assert _difference("fusion", {"fusion": 1}, {}) == "its fusion is 1, here it would be nothing"


def test_other_regions_can_be_asked_of_the_same_rows(made):
    store, images = made
    again = Recomputer(store, images)
    row = store.row("002.png")
    disc = again.ask(row, [Region("any", ("disc",))])
    assert np.array_equal(disc.maps[0], store.maps([row])[0][store.regions.index("spot")])
    assert not again.ask(row, [Region("none", ("nothing",))]).maps.any()


def test_the_settings_come_from_the_card_even_if_the_recipe_is_lost(made, tmp_path):
    store, images = made
    copy = shutil.copytree(store.path, tmp_path / "store")
    (copy / "resolved.yaml").write_text("grounder: {name: planted, options: {level_milli: 3}}")
    assert same(Recomputer(open_region_store(copy), images).make(0).answer, store.samples[0]), "the card decides"
    (copy / "resolved.yaml").write_text("regions: {spot: [")
    assert same(Recomputer(open_region_store(copy), images).make(0).answer, store.samples[0])


def test_differences_are_measured(made):
    store, images = made
    row = store.row("001.png")
    answer = Recomputer(store, images).make(row).answer
    kept = store.maps([row])[0].copy(), *store.boxes(row)
    assert differs_by(kept, answer) == (1.0, 0, 1.0, None)
    kept[0][0, :4, :64] += 3  # 256 of 131072 pixels
    within, most, iou, detections = differs_by(kept, answer)
    assert (within, most, iou, detections) == (1 - 256 / 131072, 3, 1.0, None)
    shifted = kept[0], kept[1] + 32, kept[2], kept[3]
    assert "2.0 px" in differs_by(shifted, answer)[3]
    fewer = kept[0], kept[1][:1], kept[2][:1], kept[3][:1]
    assert differs_by(fewer, answer)[3] == "2 detections, 1 were published"
    assert json.dumps(differs_by(kept, answer))
