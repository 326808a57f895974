"""The planted grounder against answers computed another way."""

import numpy as np
import pytest

from shared.errors import PromptError
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.planted import Planted


def spot(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    image = np.full((1, height, width), 0.1, np.float32)
    image[0, rows, columns] = 0.9
    return image


def locate(image: np.ndarray, *texts: str, **options: int) -> Detections:
    grounder = Planted(Planted.Options(**options))
    regions = [Region(f"r{i}", (text,)) for i, text in enumerate(texts)]
    grounder.check(regions)
    return grounder.locate(Batch([image], ["a"]), regions)[0]


def test_a_disc_has_the_area_and_centre_of_the_bright_part() -> None:
    image = spot(100, 200, slice(20, 60), slice(100, 180))  # 40 x 80 of 100 x 200: 16 % around (0.7, 0.4)
    found = locate(image, "disc", score_milli=500)
    disc = found.probability[0]
    assert disc is not None
    assert found.score.tolist() == [0.5]
    assert disc.mean() == pytest.approx(0.16, abs=0.002)
    rows, columns = np.nonzero(disc)
    assert (columns.mean() + 0.5) / 256 == pytest.approx(0.7, abs=0.002)
    assert (rows.mean() + 0.5) / 256 == pytest.approx(0.4, abs=0.002)
    radius = (0.16 / np.pi) ** 0.5
    expected = [(0.7 - radius) * 200, (0.4 - radius) * 100, (0.7 + radius) * 200, (0.4 + radius) * 100]
    np.testing.assert_allclose(found.box_xyxy_px[0], expected, rtol=1e-5)


def test_a_cone_has_a_third_of_the_disc() -> None:
    found = locate(spot(64, 64, slice(20, 40), slice(20, 40)), "disc", "cone")
    disc, cone = found.probability
    assert disc is not None
    assert cone is not None
    assert cone.sum() / disc.sum() == pytest.approx(1 / 3, abs=0.01)
    assert not cone[disc == 0].any()
    assert found.region.tolist() == [0, 1]


def test_boxes_leave_the_pixels_to_a_segmenter() -> None:
    found = locate(spot(64, 64, slice(0, 9), slice(0, 9)), "box", "nothing")
    assert found.probability == [None]
    assert found.box_xyxy_px.min() >= 0
    assert Planted(Planted.Options()).needs_segmenter([Region("a", ("disc", "box"))])
    assert not Planted(Planted.Options()).needs_segmenter([Region("a", ("disc", "nothing"))])


def test_a_constant_image_holds_nothing() -> None:
    assert len(locate(np.full((3, 8, 8), 0.5, np.float32), "disc", "box")) == 0


def test_other_words_are_refused_with_the_vocabulary() -> None:
    with pytest.raises(PromptError, match="'heart' is not in the vocabulary") as caught:
        locate(np.zeros((1, 8, 8), np.float32), "heart")
    assert "disc, cone, box, nothing" in str(caught.value.hint)
