"""A micro-batch answers row by row; an image that upsets a model is found, the others keep their answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.images import Image, Source, find_sources
from stage1_localize.answer import Answer, Failure, answer, read
from stage1_localize.config import PartConfig
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.parts import Parts, build_parts
from tests.stage1_localize.planted_corpus import disc_map, write_images

REGIONS = (Region("spot", ("disc",)),)
IDS = {row: f"{row:03d}.png" for row in range(4)}


def parts(**options: int) -> Parts:
    return build_parts(PartConfig(name="planted", options=options), PartConfig(name="none"), REGIONS)


@pytest.fixture
def images(tmp_path: Path) -> dict[int, Image]:
    made = {}
    for row, source in enumerate(find_sources(write_images(tmp_path, 4))):
        image = read(source, __import__("hashlib").sha256(source.path.read_bytes()).hexdigest())
        assert isinstance(image, Image)
        made[row] = image
    return made


def maps_of(result: Answer | Failure) -> np.ndarray:
    assert isinstance(result, Answer)
    return result.maps


def test_answers_are_those_planted(images: dict[int, Image]) -> None:
    results = answer(images, IDS, range(4), parts(score_milli=500), REGIONS, 256)
    for row, result in results.items():
        np.testing.assert_array_equal(maps_of(result)[0], disc_map(row, 0.5))
        assert isinstance(result, Answer)
        assert result.scores.tolist() == [32768]
        assert result.boxes.dtype == np.int32


def test_padding_and_blanks_change_no_answer(images: dict[int, Image]) -> None:
    whole = answer(images, IDS, range(4), parts(), REGIONS, 64)
    some = answer({2: images[2]}, IDS, [*range(4), -1, -1], parts(), REGIONS, 64)
    assert list(some) == [2]
    np.testing.assert_array_equal(maps_of(some[2]), maps_of(whole[2]))
    assert answer({}, IDS, range(4), parts(), REGIONS, 64) == {}


class Upset:
    """The planted grounder, but for some images it raises, as a model does on what it was not made for."""

    version = 1

    def __init__(self, of: set[str], how: Exception, inner: Any) -> None:
        self.of, self.how, self.inner = of, how, inner

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        if self.of & set(batch.sample_ids):
            raise self.how
        return self.inner.locate(batch, regions)


@pytest.mark.parametrize(("how", "reason"), [(RuntimeError("top-k"), "model_failed"), (MemoryError(), "out_of_memory")])
def test_one_bad_image_is_left_out(images: dict[int, Image], how: Exception, reason: str) -> None:
    whole = answer(images, IDS, range(4), parts(), REGIONS, 256)
    good = parts()
    upset = Parts(Upset({"001.png"}, how, good.grounder), good.segmenter, {})
    results = answer(images, IDS, range(4), upset, REGIONS, 256)
    failure = results.pop(1)
    assert isinstance(failure, Failure)
    assert (failure.reason, failure.stage) == (reason, "localize")
    assert "top-k" not in failure.message
    for row, result in results.items():
        np.testing.assert_array_equal(maps_of(result), maps_of(whole[row]))


def test_a_broken_part_is_no_images_fault(images: dict[int, Image]) -> None:
    good = parts()
    upset = Parts(Upset({"", *IDS.values()}, RuntimeError("broken"), good.grounder), good.segmenter, {})
    with pytest.raises(RuntimeError, match="broken"):
        answer(images, IDS, range(4), upset, REGIONS, 256)


class Halves:
    """A segmenter that gives one half everywhere and counts what it was asked."""

    version = 1

    def __init__(self) -> None:
        self.asked = 0

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[np.ndarray]:
        self.asked += sum(map(len, detections))
        return [np.full((len(found), 256, 256), 0.5, np.float32) for found in detections]


def test_only_boxes_without_pixels_go_to_the_segmenter(images: dict[int, Image]) -> None:
    halves = Halves()
    both = Parts(parts().grounder, halves, {})
    asked = (Region("box", ("box",)), Region("spot", ("disc",)))
    results = answer(images, IDS, range(4), both, asked, 256)
    assert halves.asked == 4
    for row, result in results.items():
        assert (maps_of(result)[0] == 127).all()
        np.testing.assert_array_equal(maps_of(result)[1], disc_map(row))


def test_other_bytes_than_listed_are_noticed(tmp_path: Path) -> None:
    source = find_sources(write_images(tmp_path, 1))[0]
    changed = read(source, "0" * 64)
    assert isinstance(changed, Failure)
    assert changed.reason == "source_changed"
    gone = read(Source("x.png", tmp_path / "x.png"), "0" * 64)
    assert isinstance(gone, Failure)
    assert gone.reason == "missing"
