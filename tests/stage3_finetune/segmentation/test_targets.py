"""Targets: read, checked all at once, and moved exactly as their images are."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.errors import ConfigError
from shared.images import find_sources
from shared.rng import uniform_u32
from stage3_finetune.config import AugmentConfig
from stage3_finetune.contracts import WHOLE, Example, View
from stage3_finetune.data import augment_image, image_size, squash
from stage3_finetune.segmentation.drawn import IGNORE
from stage3_finetune.segmentation.options import SegmentOptions
from stage3_finetune.segmentation.targets import MaskTargets, read_values

LUNG = SegmentOptions(values={"lung": 255, "heart": (3, 4)}, ignore=(127,))
PLAIN = MaskTargets(Path("labels.csv"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of 6 x 5 px in three groups, with targets: both, heart, both, none."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    drawn = [np.zeros((5, 6), np.uint8) for _ in range(4)]
    drawn[0][:, :2] = drawn[2][:, :1] = 255
    drawn[1][3:] = 3
    drawn[2][4, 5] = drawn[0][4, 5] = 4
    drawn[2][0, 5] = 127
    for number, values in enumerate(drawn):
        Image.fromarray(np.full((5, 6), 40 * number, np.uint8)).save(tmp_path / f"images/{number}.png")
        Image.fromarray(values).save(tmp_path / f"masks/{number}.png")
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "target", "group", "split"])
        writer.writerows([f"{n}.png", f"masks/{n}.png", "ggxy"[n], ("train", "test")[n > 2]] for n in range(4))
    return tmp_path


def targets(folder: Path, options: SegmentOptions = LUNG) -> MaskTargets:
    sources = {source.sample_id: source for source in find_sources(folder / "images")}
    return MaskTargets(folder / "labels.csv", options=options, sources=sources)


def read(one: MaskTargets) -> list[Example]:
    return one.read({f"{n}.png": None for n in range(4)})[0]


def test_values_become_classes_in_the_order_of_their_names(folder: Path) -> None:
    one = targets(folder)
    rows = read(one)
    assert one.classes(rows, None) == ("lung", "heart")
    assert one.classes(rows, ["heart", "lung"]) == ("heart", "lung")
    both = one.load(rows[2], ("lung", "heart"), (5, 6))
    assert (both[0, 0], both[4, 5], both[0, 5], both[2, 2]) == (1, 2, IGNORE, 0)
    assert one.load(rows[2], ("heart", "lung"), (5, 6))[0, 0] == 2
    assert [one.strata(row) for row in rows] == ["lung", "heart", "lung", "background"]  # the rarer one
    one.check(rows, ("lung", "heart"))
    again = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(again.load(rows[2], ("lung", "heart"), (5, 6)), both)
    with pytest.raises(ConfigError, match=r"'2\.png': target 6 x 5 px, image 5 x 6 px"):
        one.load(rows[2], ("lung", "heart"), (6, 5))


def test_without_names_every_value_is_a_class(folder: Path) -> None:
    one = targets(folder, SegmentOptions())
    rows = read(one)
    assert one.classes(rows, None) == ("value 3", "value 4", "value 127", "value 255")
    assert targets(folder, SegmentOptions(ignore=(127,))).read({})[0][1].label == rows[1].label
    with pytest.raises(ConfigError, match="but the targets have value 3, value 4, value 127, value 255"):
        one.classes(rows, ["a", "b"])


def test_a_label_is_a_digest_of_what_is_drawn_not_of_the_file(folder: Path) -> None:
    before = [row.label for row in read(targets(folder))]
    path = folder / "masks/0.png"
    Image.open(path).save(path, compress_level=0)
    assert [row.label for row in read(targets(folder))] == before
    values = np.asarray(Image.open(path)).copy()
    values[4, 5] = 255
    Image.fromarray(values).save(path)
    after = [row.label for row in read(targets(folder))]
    assert [left == right for left, right in zip(before, after, strict=True)] == [False, True, True, True]


def test_every_fault_is_told_at_once(folder: Path) -> None:
    (folder / "masks/0.png").unlink()
    Image.fromarray(np.zeros((6, 5), np.uint8)).save(folder / "masks/1.png")
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(folder / "masks/2.png")
    Image.fromarray(np.full((5, 6), 9, np.uint8)).save(folder / "masks/3.png")
    with pytest.raises(ConfigError) as caught:
        read(targets(folder))
    message = str(caught.value)
    assert "1 targets do not exist: '0.png'" in message
    assert "1 targets have another size than their image: '1.png' (target 5 x 6 px, image 6 x 5 px)" in message
    assert "1 targets cannot be read: '2.png' (RGB colours, expected one channel" in message
    assert "value 9 in 1 targets, which 'values' does not name: '3.png'" in message
    assert "lung 255" in caught.value.hint
    with pytest.raises(ConfigError, match="row 4") as caught:
        targets(folder).read({}, names={"x": "y"})
    assert ".png" not in str(caught.value).split(": ", 1)[1]  # where ids are pseudonyms, rows are told


@pytest.mark.parametrize("damage", ["cut", "end", "flip", "jpeg"])
def test_a_damaged_target_is_refused(folder: Path, damage: str) -> None:
    path = folder / "masks/0.png"
    raw = bytearray(path.read_bytes())
    if damage == "jpeg":
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(path, format="JPEG")
    else:
        raw[-20] ^= damage == "flip"
        kept = {"cut": len(raw) // 2, "end": len(raw) - 12}.get(damage, len(raw))
        path.write_bytes(raw[:kept])
    with pytest.raises(ConfigError, match=r"1 targets cannot be read: '0\.png'"):
        read(targets(folder))


def test_classes_that_are_nowhere_or_not_in_training_are_refused(folder: Path) -> None:
    named = SegmentOptions(values={"lung": 255, "heart": [3, 4], "rib": 7}, ignore=[127])
    one = targets(folder, named)
    with pytest.raises(ConfigError, match="no target has the classes 'rib'"):
        one.classes(read(one), None)
    for number in range(4):
        Image.fromarray(np.zeros((5, 6), np.uint8)).save(folder / f"masks/{number}.png")
    one = targets(folder, SegmentOptions())
    with pytest.raises(ConfigError, match="every target is background, expected 1 to 254 classes"):
        one.classes(read(one), None)
    Image.fromarray(np.full((5, 6), 255, np.uint8)).save(folder / "masks/3.png")
    one = targets(folder, SegmentOptions(values={"lung": 255}))
    rows = read(one)
    with pytest.raises(ConfigError, match="no training image shows: 'lung'"):
        one.check(rows, one.classes(rows, None))
    ramp = np.arange(256 * 2).reshape(2, 256).astype(np.uint16)
    Image.fromarray(np.resize(ramp, (5, 6)) * 9).save(folder / "masks/3.png")
    Image.fromarray(ramp).save(folder / "masks/2.png")
    Image.fromarray(ramp.astype(np.uint8)).save(folder / "images/2.png")
    one = targets(folder, SegmentOptions())
    with pytest.raises(ConfigError, match="values in the targets, expected 1 to 254"):
        one.classes(read(one), None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": {"lung": 0}}, {"values": {"lung": 1, "heart": 1}}, {"values": {"lung": 1}, "ignore": [1]},
        {"values": {" lung": 1}}, {"values": {"background": 1}}, {"values": {"lung": []}}, {"ignore": [70000]},
        {"dice_weight_milli": 0, "cross_entropy_weight_milli": 0}, {"width": 12},
    ],
)  # fmt: skip
def test_settings_that_clash_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"values|ignore|weight|width"):
        SegmentOptions(**wrong)


def test_values_are_those_stored(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    palette = Image.fromarray(values, mode="P")
    palette.putpalette([200, 10, 10] * 256)
    palette.save(tmp_path / "p.png", bits=2)
    np.testing.assert_array_equal(read_values(tmp_path / "p.png"), values)
    Image.fromarray(values.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_values(tmp_path / "deep.png"), values.astype(int) * 300)
    Image.fromarray(values > 1).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_values(tmp_path / "bit.png"), values > 1)
    (tmp_path / "small.png").write_bytes(_grey_of_two_bits())
    np.testing.assert_array_equal(read_values(tmp_path / "small.png"), [[0, 1, 2, 3]])


def _grey_of_two_bits() -> bytes:
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, 0b00011011]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_sizes_are_those_of_the_image_as_it_is_read(tmp_path: Path) -> None:
    turned = Image.fromarray(np.zeros((4, 9), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    (source,) = find_sources(tmp_path)
    assert image_size(source) == (9, 4)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 1000), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_a_window_cuts_the_labels_as_it_cuts_the_image(height: int, width: int, low: int, seed: int) -> None:
    """Where nothing is resampled, labels are the image's own pixels."""
    label = np.random.default_rng(seed).integers(0, 200, (height, width), dtype=np.uint8)
    words = uniform_u32("test", seed, "sample", 0, 6)
    plain = AugmentConfig(crop_scale=(low, 1000), brightness_milli=0, contrast_milli=0)
    cut, view = augment_image(label[None].astype(np.float32) / np.float32(255), plain, words)
    expected = np.round(cut[0] * 255).astype(np.uint8)
    if cut.shape[1] == cut.shape[2]:
        np.testing.assert_array_equal(PLAIN.place(label, view, cut.shape[1]), expected)
    by_hand = [
        expected[(2 * i + 1) * cut.shape[1] // 14][(np.arange(7) * 2 + 1) * cut.shape[2] // 14] for i in range(7)
    ]
    shown = PLAIN.place(label, View(view.top, view.left, view.bottom, view.right, False), 7)
    np.testing.assert_array_equal(shown[:, ::-1] if view.flip else shown, PLAIN.place(label, view, 7))
    if not view.flip:
        np.testing.assert_array_equal(shown, by_hand)


def test_edges_lie_where_the_image_has_them() -> None:
    """Halves of an image that is resampled to a square: the label's edge is the image's, to a pixel's half."""
    label = np.zeros((60, 90), np.uint8)
    label[20:, 33:] = 1
    for view in (WHOLE, View(1 / 6, 0.2, 0.9, 0.8, False), View(1 / 6, 0.2, 0.9, 0.8, True)):
        rows, columns = (slice(round(a * n), round(b * n)) for a, b, n in (
            (view.top, view.bottom, 60), (view.left, view.right, 90)))  # fmt: skip
        window = label[rows, columns][:, :: -1 if view.flip else 1].astype(np.float32)
        image = squash(np.ascontiguousarray(window)[None], 32)[0].numpy()
        placed = PLAIN.place(label, view, 32)
        sure = np.abs(image - 0.5) > 0.45
        np.testing.assert_array_equal(placed[sure], image[sure] > 0.5)
        assert abs(float(placed.mean()) - float(image.mean())) < 0.03
    large = PLAIN.place(label, WHOLE, 180)
    np.testing.assert_array_equal(large, np.repeat(np.repeat(label, 3, axis=0), 2, axis=1))
