"""What every grounder and every segmenter promises, whatever it finds. Planted words serve the planted one."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections, Region
from stage1_localize.grounders import GROUNDERS
from stage1_localize.segmenters import SEGMENTERS

WORDS = {"planted": ("disc", "box"), "lite": ("brain", "white blood cell"), "oracle": ("left blob", "Right Blob")}
ALL_GROUNDERS, ALL_SEGMENTERS = sorted(GROUNDERS), sorted(SEGMENTERS)


@cache
def part(kind: str, name: str) -> Any:
    chosen = {"grounder": GROUNDERS, "segmenter": SEGMENTERS}[kind].load(name)
    if name == "oracle":
        with TemporaryDirectory() as folder:
            labels = Path(folder) / "labels.json"
            labels.write_text(json.dumps(LABELS))
            told = chosen(chosen.Options(labels=str(labels)))
            told.check(regions_for(name))
        return told
    return chosen(chosen.Options())


def blob(height: int, width: int, x: int, y: int, channels: int = 1) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    image = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 300)
    return np.tile(image.astype(np.float32), (channels, 1, 1))


LABELS = {
    "images": [
        {"id": 0, "file_name": "x", "width": 90, "height": 120},
        {"id": 1, "file_name": "y", "width": 200, "height": 64},
        {"id": 2, "file_name": "z", "width": 40, "height": 40},
    ],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 0, "bbox": [10, 20, 30, 40]},
        {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[50, 60, 80, 60, 80, 110]]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [150, 10, 50, 40]},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5.5, 64]},
    ],
    "categories": [{"id": 0, "name": "left blob"}, {"id": 1, "name": "right blob"}],
}
IMAGES = (blob(120, 90, 40, 70), blob(64, 200, 150, 30, channels=3), np.full((1, 40, 40), 0.5, np.float32))


def regions_for(name: str) -> list[Region]:
    first, second = WORDS.get(name, ("brain", "tumour"))
    return [Region("a", (first,)), Region("b", (second, first))]


def same(one: Detections, other: Detections) -> bool:
    arrays = ("box_xyxy_px", "score", "region", "text")
    if not all(np.array_equal(getattr(one, key), getattr(other, key)) for key in arrays):
        return False
    pairs = zip(one.probability, other.probability, strict=True)
    return all((a is None and b is None) or np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ALL_GROUNDERS)
def test_a_grounder_answers_in_the_frames_it_promises(name: str) -> None:
    grounder, regions = part("grounder", name), regions_for(name)
    grounder.check(regions)
    found = grounder.locate(Batch(IMAGES, ["x", "y", "z"]), regions)
    assert len(found) == len(IMAGES)
    for image, each in zip(IMAGES, found, strict=True):
        n = len(each)
        assert each.box_xyxy_px.shape == (n, 4)
        assert each.box_xyxy_px.dtype == each.score.dtype == np.float32
        assert len(each.region) == len(each.text) == len(each.probability) == n
        assert ((each.score >= 0) & (each.score <= 1)).all()
        low, high = each.box_xyxy_px[:, :2], each.box_xyxy_px[:, 2:]
        assert (low >= 0).all()
        assert (low < high).all()
        assert (high <= [image.shape[2], image.shape[1]]).all()
        assert all(text < len(regions[region].texts) for region, text in zip(each.region, each.text, strict=True))
        for own in each.probability:
            assert own is None or (own.shape == (MAP_SIZE_PX, MAP_SIZE_PX) and own.dtype == np.float32)
            assert own is None or (own.min() >= 0 and own.max() <= 1)


@pytest.mark.parametrize("name", ALL_GROUNDERS)
def test_an_answer_depends_on_its_own_image_and_region_only(name: str) -> None:
    grounder, (first, second) = part("grounder", name), regions_for(name)
    together = grounder.locate(Batch(IMAGES, ["x", "y", "z"]), [first, second])
    for sample_id, image, both in zip("xy", IMAGES[:2], together, strict=False):
        # Only labels know an image by its name.
        (alone,) = grounder.locate(Batch([image], [sample_id if name == "oracle" else "elsewhere"]), [second])
        kept = np.flatnonzero(both.region == 1)
        part_of_both = Detections(
            both.box_xyxy_px[kept],
            both.score[kept],
            np.zeros(len(kept), np.int64),
            both.text[kept],
            [both.probability[i] for i in kept],
        )
        assert same(alone, part_of_both)


@pytest.mark.parametrize("name", ALL_SEGMENTERS)
def test_a_segmenter_answers_each_box_by_itself(name: str) -> None:
    segmenter = part("segmenter", name)
    boxes = np.array([[10, 50, 70, 90], [0, 0, 90, 120], [39, 69, 42, 72]], np.float32)

    def found(chosen: list[int]) -> Detections:
        n = len(chosen)
        zeros = np.zeros(n, np.int64)
        return Detections(boxes[chosen], np.ones(n, np.float32), zeros, zeros, [None] * n)

    if name == "none":  # it refuses boxes, and has a test of its own
        chosen: list[int] = []
    else:
        chosen = [0, 1, 2]
    whole, nothing = segmenter.segment(Batch(IMAGES[:2], ["x", "y"]), [found(chosen), Detections.none()])
    assert whole.shape == (len(chosen), MAP_SIZE_PX, MAP_SIZE_PX)
    assert nothing.shape == (0, MAP_SIZE_PX, MAP_SIZE_PX)
    assert whole.dtype == np.float32
    assert not chosen or (whole.min() >= 0 and whole.max() <= 1)
    (turned,) = segmenter.segment(Batch([IMAGES[0]], ["elsewhere"]), [found(chosen[::-1])])
    assert np.array_equal(turned[::-1], whole)


@pytest.mark.parametrize(
    ("kind", "name"), [*(("grounder", n) for n in ALL_GROUNDERS), *(("segmenter", n) for n in ALL_SEGMENTERS)]
)
def test_an_identity_is_json_without_floats(kind: str, name: str) -> None:
    def floats(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(floats, value.values()))
        return any(map(floats, value)) if isinstance(value, list) else isinstance(value, float)

    identity = part(kind, name).identity()
    assert json.loads(json.dumps(identity)) == identity
    assert not floats(identity)
    assert isinstance(part(kind, name).version, int)
