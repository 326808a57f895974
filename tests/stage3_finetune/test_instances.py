"""Labels of detection: read whole, refused whole, placed exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import ConfigError, InputMissingError, UsageError
from shared.images import find_sources
from stage3_finetune.annotations import pack, unpack
from stage3_finetune.contracts import WHOLE, View
from stage3_finetune.instances import InstanceTargets, Things, place
from stage3_finetune.labels import Labels, load_labels
from stage3_finetune.tasks.detect import DetectOptions

from .scenes import SIDE, squares, voc, write_coco, write_images, write_table


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("scenes"))


def load(images: Path, path: Path, masks: object = "auto", classes=None) -> tuple[InstanceTargets, Labels]:
    sources = {source.sample_id: source for source in find_sources(images)}
    targets = InstanceTargets(path, options=DetectOptions(masks=masks), sources=sources)
    labels = load_labels(
        path,
        targets,
        known={name: source.group for name, source in sources.items()},
        classes=classes,
        val_milli=200,
        test_milli=250,
        fraction_milli=1000,
        seed=0,
    )
    return targets, labels


def test_every_form_says_the_same_boxes(images, tmp_path) -> None:
    found = {}
    for name, path in (
        ("xml", write_table(tmp_path / "x.csv", ".xml")),
        ("png", write_table(tmp_path / "p.csv", ".png")),
        ("coco", write_coco(tmp_path / "c.json")),
        ("boxes", write_coco(tmp_path / "b.json", outlines=False)),
    ):
        targets, labels = load(images, path)
        assert targets.options.masks is (name in ("png", "coco"))
        assert labels.classes == (("thing",) if name == "png" else ("bright", "dim"))
        things = {row.sample_id: targets.load(row, labels.classes, (SIDE, SIDE)) for row in labels.examples}
        found[name] = {key: sorted(map(tuple, one.boxes.tolist())) for key, one in things.items()}
        assert all((one.masks is None) != targets.options.masks for one in things.values())
    expected = {f"i{n:02d}.png": sorted(tuple(100 * side for side in box) for box in squares(n)) for n in range(16)}
    assert all(one == expected for one in found.values())
    assert expected["i03.png"] == []


def test_a_table_brings_groups_and_parts_and_coco_gets_them(images, tmp_path) -> None:
    _, labels = load(images, write_table(tmp_path / "x.csv", ".xml"))
    assert labels.grouped
    assert [row.group for row in labels.part("test")] == ["g6", "g6", "g7", "g7"]
    listed = tmp_path / "list.csv"
    listed.write_text(
        "image,group\n" + "".join(f"{path.name},q{n // 4}\n" for n, path in enumerate(sorted(images.iterdir())))
    )
    for path in images.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    _, coco = load(listed, write_coco(tmp_path / "c.json"))
    assert coco.grouped
    assert {row.group for row in coco.examples} == {"q0", "q1", "q2", "q3"}
    assert {row.split for row in coco.examples} == {"train", "val", "test"}
    _, alone = load(images, write_coco(tmp_path / "c.json"))
    assert not alone.grouped


def test_labels_digests_cover_what_targets_say(images, tmp_path) -> None:
    path = write_table(tmp_path / "x.csv", ".xml")
    first = load(images, path)[1].sha256
    assert load(images, path)[1].sha256 == first
    target = tmp_path / "targets" / "t00.xml"
    target.write_text(voc([(1, 1, 9, 9)], ("bright",)))
    assert load(images, path)[1].sha256 != first


def test_masks_are_decided_or_asked_for(images, tmp_path) -> None:
    png = write_table(tmp_path / "p.csv", ".png")
    targets, labels = load(images, png, masks=False)
    assert targets.load(labels.examples[0], labels.classes, (SIDE, SIDE)).masks is None
    with pytest.raises(ConfigError, match="masks: true, but not every thing"):
        load(images, write_table(tmp_path / "x.csv", ".xml"), masks=True)


def test_classes_are_held_against_what_is_there(images, tmp_path) -> None:
    xml = write_table(tmp_path / "x.csv", ".xml")
    assert load(images, xml, classes=("dim", "bright"))[1].classes == ("dim", "bright")
    with pytest.raises(ConfigError, match="'classes' does not name: 'dim'"):
        load(images, xml, classes=("bright",))
    with pytest.raises(ConfigError, match="no thing of the classes 'huge'"):
        load(images, xml, classes=("bright", "dim", "huge"))
    png = write_table(tmp_path / "p.csv", ".png")
    assert load(images, png, classes=("tumour",))[1].classes == ("tumour",)
    with pytest.raises(ConfigError, match="index maps hold one class, 'classes' names 2"):
        load(images, png, classes=("a", "b"))
    for number in range(8):  # the training images
        (tmp_path / "targets" / f"t{number:02d}.xml").write_text(voc([(1, 1, 9, 9)], ("bright",)))
    with pytest.raises(ConfigError, match="classes without a thing in a training image: 'dim'"):
        load(images, xml)


def test_faults_of_all_targets_are_told_at_once(images, tmp_path) -> None:
    xml = write_table(tmp_path / "x.csv", ".xml")
    (tmp_path / "targets" / "t00.xml").write_text("<annotation>")
    (tmp_path / "targets" / "t01.xml").write_text(voc([(1, 1, 99, 9)]))
    (tmp_path / "targets" / "t02.xml").unlink()
    with pytest.raises(ConfigError) as caught:
        load(images, xml)
    for told in ("3 faults", "'i00.png': not XML", "'i01.png': object 1: box", "'i02.png': no such file"):
        assert told in str(caught.value)
    small = voc([]).replace(f"<width>{SIDE}", "<width>60")
    (tmp_path / "targets" / "t02.xml").write_text(small)
    for name in ("t00.xml", "t01.xml"):
        (tmp_path / "targets" / name).write_text(voc([]))
    with pytest.raises(ConfigError, match=r"'i02\.png': its target is of 60 x 64 px, the image of 64 x 64"):
        load(images, xml)


def test_tables_that_make_no_sense_are_refused(images, tmp_path) -> None:
    xml = write_table(tmp_path / "x.csv", ".xml")
    text = xml.read_text()
    xml.write_text(text.replace("targets/t00.xml", "targets/t00.txt"))
    with pytest.raises(ConfigError, match=r"targets that end in \.txt, \.xml"):
        load(images, xml)
    xml.write_text(text.replace("targets/t00.xml", "../t00.xml"))
    with pytest.raises(ConfigError, match=r"'i00\.png': "):
        load(images, xml)
    xml.write_text(text.replace("i00.png", "none.png"))
    with pytest.raises(InputMissingError, match=r"'none\.png'"):
        load(images, xml)
    xml.write_text(text)
    for target in (tmp_path / "targets").iterdir():
        target.write_text(voc([]))
    with pytest.raises(ConfigError, match="no thing in any of 16 images"):
        load(images, xml)


def test_faulty_coco_is_refused(images, tmp_path) -> None:
    path = write_coco(tmp_path / "c.json")
    body = json.loads(path.read_text())
    body["annotations"][0]["bbox"] = [0, 0, 500, 5]
    path.write_text(json.dumps(body))
    with pytest.raises(UsageError, match="annotation 1: box"):
        load(images, path)
    write_coco(path)
    body = json.loads(path.read_text())
    body["annotations"][0] |= {"iscrowd": 1}
    path.write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="image 0: crowd annotations"):
        load(images, path)


def test_pngs_turned_by_exif_are_measured_upright(tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(6):
        Image.fromarray(np.zeros((30, 50), np.uint8)).save(folder / f"i{number}.jpg", exif=exif)
    index = np.zeros((50, 30), np.uint8)
    index[3:9, 4:8] = 1
    Image.fromarray(index).save(tmp_path / "t.png")
    path = tmp_path / "labels.csv"
    splits = ["train", "train", "val", "val", "test", "test"]
    path.write_text("image,target,split\n" + "".join(f"i{n}.jpg,t.png,{split}\n" for n, split in enumerate(splits)))
    assert len(load(folder, path)[1].examples) == 6


# An image of 20 x 40 px (height, width): a thing at x 4..12, y 2..10, of which the left lower corner lacks.
def corner() -> Things:
    inside = np.zeros((20, 40), bool)
    inside[2:10, 4:12] = True
    inside[6:10, 4:8] = False
    return Things((20, 40), np.array([[400, 200, 1200, 1000]]), np.array([1]), (pack(inside),))


def test_the_whole_image_is_stretched_to_the_square() -> None:
    placed = place(corner(), WHOLE, 40)
    assert placed["boxes"].tolist() == [[4, 4, 12, 20]]
    assert placed["labels"].tolist() == [2]
    expected = np.repeat(unpack(corner().masks[0], (20, 40)), 2, axis=0)
    np.testing.assert_array_equal(placed["masks"][0].numpy().astype(bool), expected)
    assert placed["masks"].dtype == torch.uint8


def test_flips_and_windows_move_boxes_and_masks() -> None:
    flipped = place(corner(), View(0, 0, 1, 1, True), 40)
    assert flipped["boxes"].tolist() == [[28, 4, 36, 20]]
    np.testing.assert_array_equal(flipped["masks"][0], place(corner(), WHOLE, 40)["masks"][0].flip(1))
    # Columns 0 to 20, rows 0 to 10: all of the thing, twice and four times as large.
    window = place(corner(), View(0, 0, 0.5, 0.5, False), 40)
    assert window["boxes"].tolist() == [[8, 8, 24, 40]]
    assert int(window["masks"].sum()) == 48 * 2 * 4
    # Columns 0 to 8: the upper left quarter is seen, 16 of 48 px; what is left of the box is that quarter.
    cut = place(corner(), View(0, 0, 1, 0.2, False), 40)
    assert cut["boxes"].tolist() == [[20, 4, 40, 12]]
    assert int(cut["masks"].sum()) == 16 * 5 * 2
    turned = place(corner(), View(0, 0, 1, 0.2, True), 40)
    assert turned["boxes"].tolist() == [[0, 4, 20, 12]]


def test_a_thing_is_dropped_below_a_quarter_of_it() -> None:
    # Columns 7 to 40, rows 0 to 20: more than a quarter of it stays; columns 11 to 40: 8 of 48 px.
    assert len(place(corner(), View(0, 7 / 40, 1, 1, False), 40)["labels"]) == 1
    gone = place(corner(), View(0, 11 / 40, 1, 1, False), 40)
    assert gone["boxes"].shape == (0, 4)
    assert gone["masks"].shape == (0, 40, 40)
    boxes = Things((20, 40), corner().boxes, np.array([0]), None)
    assert place(boxes, View(0, 10 / 40, 1, 1, False), 40)["boxes"].tolist() == [
        pytest.approx([0, 4, 2 * 40 / 30, 20], abs=1e-5)
    ]
    assert len(place(boxes, View(0, 10.1 / 40, 1, 1, False), 40)["boxes"]) == 0
    assert "masks" not in place(boxes, WHOLE, 40)


def test_a_mask_too_small_for_the_square_keeps_a_pixel() -> None:
    inside = np.zeros((100, 100), bool)
    inside[50, 51] = True
    one = Things((100, 100), np.array([[5100, 5000, 5200, 5100]]), np.array([0]), (pack(inside),))
    placed = place(one, WHOLE, 32)
    assert int(placed["masks"].sum()) == 1
    assert placed["masks"][0, 16, 16] == 1
    assert (placed["boxes"][:, 2:] > placed["boxes"][:, :2]).all()


def test_an_image_without_things_is_a_negative() -> None:
    none = Things((20, 40), np.zeros((0, 4), np.int64), np.zeros(0, np.int64), ())
    placed = place(none, WHOLE, 40)
    assert {name: tuple(value.shape) for name, value in placed.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, 40, 40),
    }
    assert placed["boxes"].dtype == torch.float32
    assert placed["labels"].dtype == torch.int64
