"""Pictures for fitting `lite`: sides, frames, and who is held out."""

import numpy as np
import pytest

from pipelines.lite_pictures import BLOCK, GAP, mirrored, pictures, template_pictures
from pipelines.lite_words import CONCEPTS, FOREIGN, NEAR, REFUSED, UNSEEN
from stage1_localize.grounders.lite_text import fold
from stage1_localize.pictures import as_example, truth_map

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def by_source(test_data):
    wanted: dict[str, list] = {"br35h": [], "cxrlung": [], "bccd": []}
    for picture in pictures(test_data, "val"):
        if len(wanted[picture.source]) < 6:
            wanted[picture.source].append(picture)
        if all(len(found) == 6 for found in wanted.values()):
            return wanted
    raise AssertionError("a set is missing")


def test_the_left_lung_is_on_the_image_s_right(by_source):
    sided = [picture for picture in by_source["cxrlung"] if "left lung" in picture.masks]
    assert len(sided) >= 3
    for picture in sided:
        left, right = (np.nonzero(picture.masks[f"{side} lung"])[1].mean() for side in ("left", "right"))
        assert left > right + 40
        assert np.array_equal(picture.masks["lungs"] >= picture.masks["left lung"], np.ones((256, 256), bool))


def test_tumour_boxes_enclose_their_mask(by_source):
    for picture in by_source["br35h"]:
        inside = np.zeros_like(picture.masks["tumour"])
        for x0, y0, x1, y1 in picture.boxes["tumour"].astype(int):
            inside[y0:y1, x0:x1] = 1
        assert (picture.masks["tumour"] <= inside).all()
        assert "brain" not in picture.absent, "not labelled is not absent"


def test_cells_are_boxes_in_colour_images(by_source):
    for picture in by_source["bccd"]:
        assert picture.image.shape == (3, 480, 640)
        assert picture.boxes.keys().isdisjoint(picture.absent)
        for boxes in picture.boxes.values():
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert boxes.min() >= 0


def test_a_mirror_twice_is_the_picture(by_source):
    for picture in (by_source["br35h"][0], by_source["bccd"][0]):
        again = mirrored(mirrored(picture))
        assert np.array_equal(again.image, picture.image)
        for name, boxes in picture.boxes.items():
            assert np.allclose(again.boxes[name], boxes)
            assert not np.allclose(mirrored(picture).boxes[name], boxes)


def test_an_example_s_truth_lies_on_the_padded_input(by_source):
    import torch

    from stage1_localize.segmenters.lite_medsam import Encoded, letterbox

    picture = by_source["bccd"][0]
    _, height_px, width_px = letterbox(picture.image)
    example = as_example(picture, Encoded(torch.zeros(256, 64, 64), height_px, width_px, 480, 640))
    assert (height_px, width_px) == (192, 256)
    for name, boxes in picture.boxes.items():
        assert np.allclose(example.boxes[name], boxes / 10, atol=1e-4), "640 px are 64 cells"
        assert not example.masks[name][100:].any(), "no cell lies in the padding"


def test_held_out_blocks_are_no_neighbours_of_training_blocks():
    train, held_out = ([int(p.group[5:]) for p in template_pictures(part)] for part in ("train", "held-out"))
    assert set(train).isdisjoint(held_out)
    assert {block % 2 for block in train} == {0}
    assert max(train.count(block) for block in train) == BLOCK
    assert GAP >= 2
    for picture in template_pictures("train"):
        assert "tumour" not in picture.absent
        assert "lungs" in picture.absent


def test_truth_maps_fill_the_map_frame():
    mask = np.zeros((100, 50), np.float32)
    mask[:50] = 1
    found = truth_map(mask)
    assert found[:126].all()
    assert not found[130:].any()


def test_word_lists_do_not_overlap():
    taught = {fold(text) for texts in CONCEPTS.values() for text in texts}
    unseen = {fold(text) for texts in UNSEEN.values() for text in texts}
    foreign = {fold(text) for text in FOREIGN + NEAR}
    refused = {fold(text) for text in REFUSED}
    assert UNSEEN.keys() == CONCEPTS.keys()
    lists = (taught, unseen, foreign, refused)
    assert len(set().union(*lists)) == sum(len(words) for words in lists)
    assert len(taught) == sum(len(texts) for texts in CONCEPTS.values())
