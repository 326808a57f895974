"""Files that say where things are: what they mean, and every way they can be wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as reference

from shared.coco import Labelled, Thing
from shared.images import Source
from shared.outlines import Outline
from stage3_finetune.annotations import FaultyFile, fit_box, from_coco, pack, read_indices, read_voc, unpack

from .scenes import SIDE, voc


@pytest.fixture
def xml(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "t.xml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def png(tmp_path: Path):
    def write(pixels: np.ndarray) -> Path:
        path = tmp_path / "t.png"
        Image.fromarray(pixels).save(path)
        return path

    return write


def test_voc_counts_pixels_from_one_and_includes_the_last(xml) -> None:
    said = read_voc(xml(voc([(4, 2, 10, 8), (0, 0, SIDE, 1)])))
    assert said.size_px == (SIDE, SIDE)
    assert [(thing.name, thing.box, thing.mask) for thing in said.things] == [
        ("bright", (400, 200, 1000, 800), None),
        ("dim", (0, 0, 6400, 100), None),
    ]
    assert read_voc(xml(voc([]))).things == ()


def test_what_is_said_counts_and_not_how(xml) -> None:
    first = read_voc(xml(voc([(4, 2, 10, 8), (0, 0, 9, 9)], ("a", "b")))).sha256
    other = voc([(0, 0, 9, 9), (4, 2, 10, 8)], ("b", "a")).replace("<object>", "<object>\n <pose>Left</pose>")
    assert read_voc(xml(other)).sha256 == first
    assert read_voc(xml(voc([(4, 2, 10, 8), (0, 0, 9, 9)], ("a", "c")))).sha256 != first
    assert read_voc(xml(voc([(4, 2, 10, 8), (0, 0, 9, 8)], ("a", "b")))).sha256 != first


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<annotation><size>", "not XML"),
        ("", "not XML"),
        ("<annotation></annotation>", "no size"),
        (voc([]).replace("<width>64", "<width>nan"), "no size"),
        (voc([(4, 2, 10, 80)]), r"object 1: box \[4, 2, 10, 80\] .* lies outside the image of 64 x 64 px"),
        (voc([(-3, 2, 10, 8)]), "object 1: box .* outside"),
        (voc([(9, 2, 8, 8)]), "object 1: box .* zero area"),
        (voc([(4, 2, 10, 8)], ("",)), "object 1 has no name"),
        (voc([(4, 2, 10, 8)]).replace("<xmin>5</xmin>", ""), "object 1: bndbox needs"),
        (voc([(4, 2, 10, 8), (4, 2, 10, 8)], ("a",)), "'a' is given twice"),
        (voc([(4, 2, 10, 80), (9, 2, 8, 8)]), "object 1: .*, object 2: "),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + voc([]), "document type"),
    ],
)
def test_faults_of_voc_are_told(xml, text: str, told: str) -> None:
    with pytest.raises(FaultyFile, match=told):
        read_voc(xml(text))


def test_an_index_map_holds_a_thing_for_every_value(png) -> None:
    index = np.zeros((20, 30), np.uint8)
    index[2:5, 3:9] = 1
    index[10:20, 29] = 3  # 2 was hidden by others
    said = read_indices(png(index))
    assert said.size_px == (20, 30)
    assert {thing.box for thing in said.things} == {(300, 200, 900, 500), (2900, 1000, 3000, 2000)}
    by_box = {thing.box: thing for thing in said.things}
    mask = by_box[300, 200, 900, 500].mask
    assert mask is not None
    np.testing.assert_array_equal(unpack(mask, (20, 30)), index == 1)
    assert read_indices(png(index.astype(np.uint16) * 300)).sha256 == said.sha256
    assert read_indices(png(index * 0)).things == ()


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (np.full((9, 9), 255, np.uint8), "look like a mask of classes"),
        (np.zeros((9, 9, 3), np.uint8), "mode RGB"),
    ],
)
def test_faults_of_index_maps_are_told(png, pixels: np.ndarray, told: str) -> None:
    with pytest.raises(FaultyFile, match=told):
        read_indices(png(pixels))


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(FaultyFile, match="not a PNG"):
        read_indices(broken)
    for read in (read_voc, read_indices):
        with pytest.raises(FaultyFile, match="no such file"):
            read(tmp_path / "absent")


def labelled(*things: Thing) -> Labelled:
    return Labelled(1, Source("a", Path("a")), 30, 20, things)


def test_coco_outlines_are_drawn_as_coco_draws_them() -> None:
    polygon = (2.5, 3.0, 20.0, 3.5, 11.0, 17.25)
    said = from_coco(
        labelled(Thing("b", (2.5, 3.0, 20.0, 17.25), Outline((polygon,))), Thing("a", (1.0, 1.0, 4.0, 4.0)))
    )
    assert [(thing.name, thing.box) for thing in said.things] == [
        ("a", (100, 100, 400, 400)),
        ("b", (250, 300, 2000, 1725)),
    ]
    assert said.things[0].mask is None
    mask = said.things[1].mask
    assert mask == reference.frPyObjects([list(polygon)], 20, 30)[0]["counts"].decode()
    inside = unpack(mask, (20, 30))
    runs = [
        0,
        *np.diff(np.flatnonzero(np.diff(np.concatenate([[2], inside.ravel(order="F").astype(int), [2]])))).tolist(),
    ]
    if not inside[0, 0]:
        runs = runs[1:]
    again = from_coco(labelled(Thing("b", (2.5, 3.0, 20.0, 17.25), Outline(runs=tuple(runs)))))
    assert again.things[0].mask == mask
    two = Outline(((0.0, 0.0, 5.0, 0.0, 5.0, 5.0, 0.0, 5.0), (10.0, 10.0, 15.0, 10.0, 15.0, 15.0, 10.0, 15.0)))
    both = from_coco(labelled(Thing("b", (0.0, 0.0, 15.0, 15.0), two))).things[0].mask
    assert both is not None
    assert unpack(both, (20, 30)).sum() == 50
    with pytest.raises(FaultyFile, match="holds no pixel"):
        from_coco(labelled(Thing("b", (2.0, 3.0, 2.3, 3.3), Outline(((2.0, 3.0, 2.3, 3.0, 2.2, 3.3),)))))


def test_boxes_are_cut_at_the_border_and_rounded() -> None:
    assert fit_box((-1, -0.3, 30.9, 5.004), (20, 30)) == (0, 0, 3000, 500)
    assert "outside" in str(fit_box((-1.1, 0, 5, 5), (20, 30)))
    assert "zero area" in str(fit_box((2, 2, 2.004, 5), (20, 30)))


def test_masks_pack_and_unpack() -> None:
    mask = np.random.default_rng(0).random((17, 23)) > 0.5
    np.testing.assert_array_equal(unpack(pack(mask), (17, 23)), mask)
    assert pack(mask) == reference.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
