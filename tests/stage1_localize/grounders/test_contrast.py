"""Blobs where blobs were put, whatever the words."""

import numpy as np
import pytest

from stage1_localize.boxes import overlaps
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.contrast import Contrast, response_map


def scene(*blobs: tuple[int, int, int, float], height: int = 200, width: int = 300) -> np.ndarray:
    """Grey .5 with discs: x, y, radius, grey."""
    rows, columns = np.mgrid[:height, :width]
    image = np.full((height, width), 0.5, np.float32)
    for x, y, radius, grey in blobs:
        image[np.hypot(columns - x, rows - y) <= radius] = grey
    return image[None]


def locate(image: np.ndarray, *texts: str, **options: object) -> Detections:
    grounder = Contrast(Contrast.Options.model_validate(options))
    return grounder.locate(Batch([image], ["a"]), [Region("r", texts or ("anything",))])[0]


def test_each_blob_gets_its_box_the_strongest_first() -> None:
    found = locate(scene((60, 50, 12, 1.0), (220, 140, 18, 0.15)))
    assert len(found) == 2
    truth = np.array([[48, 38, 73, 63], [202, 122, 239, 159]], np.float32)
    iou = overlaps(found.box_xyxy_px, truth)
    assert iou.max(axis=0).min() > 0.5
    assert iou.argmax(axis=1).tolist() == [0, 1]
    assert found.score[0] == 1.0
    assert 0.4 < found.score[1] < 1.0
    assert found.probability == [None, None]


@pytest.mark.parametrize(("polarity", "near"), [("bright", (60, 50)), ("dark", (220, 140))])
def test_polarity_chooses(polarity: str, near: tuple[int, int]) -> None:
    found = locate(scene((60, 50, 12, 1.0), (220, 140, 18, 0.15)), polarity=polarity)
    centre = (found.box_xyxy_px[:, :2] + found.box_xyxy_px[:, 2:]) / 2
    assert np.abs(centre[0] - near).max() < 4  # the strongest; a bright blob has a faint dark rim, and the reverse


def test_small_ones_are_left_out_and_only_so_many_kept() -> None:
    blobs = [(40 + 45 * i, 100, 8 + i, 1.0) for i in range(5)]
    assert len(locate(scene(*blobs))) == 5
    assert len(locate(scene(*blobs), boxes_max=2)) == 2
    assert len(locate(scene(blobs[0]), area_min_px=4000)) == 0


def test_words_are_not_read_and_the_card_says_so() -> None:
    image = scene((60, 50, 12, 1.0))
    one, other = locate(image, "tumour"), locate(image, "sitting on a chair")
    assert np.array_equal(one.box_xyxy_px, other.box_xyxy_px)
    assert locate(image, "a", "b").text.tolist() == [0, 1]
    assert Contrast(Contrast.Options()).identity()["reads_words"] is False


def test_contrast_is_of_the_image_not_of_its_exposure() -> None:
    image = scene((60, 50, 12, 1.0), (220, 140, 18, 0.0))
    difference = response_map(image, "both") - response_map(image * 0.25 + 0.5, "both")
    assert np.abs(difference).max() <= 2


def test_a_constant_image_holds_nothing() -> None:
    assert len(locate(np.full((3, 9, 7), 0.4, np.float32))) == 0
