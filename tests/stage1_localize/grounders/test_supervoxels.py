"""Random anatomy: whole segments, the area asked, and no word read."""

import numpy as np
import pytest

from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.slic import superpixels
from stage1_localize.grounders.supervoxels import Supervoxels, to_grey

REGIONS = [Region("tumour", ("brain tumour", "lesion")), Region("other", ("anything",))]


def image() -> np.ndarray:
    """A head of noise-free tissue on a black ground, wider than high."""
    rows, columns = np.mgrid[:120, :160]
    grey = np.where(np.hypot((columns - 80) / 1.2, rows - 60) < 50, 0.4 + columns / 400, 0)
    grey[np.hypot(columns - 100, rows - 50) < 12] = 0.95
    return grey.astype(np.float32)[None]


def locate(regions: list[Region] = REGIONS, **options: int) -> Detections:
    return Supervoxels(Supervoxels.Options(**options)).locate(Batch([image()]), regions)[0]


def drawn(found: Detections, region: int, text: int = 0) -> np.ndarray:
    chosen = [
        p for p, r, t in zip(found.probability, found.region, found.text, strict=True) if (r, t) == (region, text)
    ]
    return np.sum(chosen, axis=0)


def test_a_region_is_whole_segments_of_the_area_asked() -> None:
    grey = to_grey(image())
    assert grey is not None
    labels = superpixels(grey, 100, 20, (160, 120))
    for cover in (100, 400):
        region = drawn(locate(cover_milli=cover), 0)
        assert set(np.unique(region)) == {0, 1}
        shares = [region[labels == i].mean() for i in range(labels.max() + 1)]
        assert set(shares) == {0, 1}
        front = [i for i in range(labels.max() + 1) if grey[labels == i].mean() >= 25.5]
        foreground = np.isin(labels, front)
        assert not region[~foreground].any()
        largest = max((labels == i).sum() for i in front) / foreground.sum()
        assert cover / 1000 <= region.sum() / foreground.sum() <= cover / 1000 + largest
    assert drawn(locate(cover_milli=1000, foreground_milli=0), 0).all()


def test_boxes_are_of_the_image() -> None:
    found = locate()
    for box, inside in zip(found.box_xyxy_px, found.probability, strict=True):
        assert inside is not None
        rows, columns = np.nonzero(inside)
        expected = [columns.min() * 160, rows.min() * 120, (columns.max() + 1) * 160, (rows.max() + 1) * 120]
        np.testing.assert_allclose(box, np.array(expected) / 256)


def test_words_are_not_read_but_region_and_seed_choose() -> None:
    found = locate()
    assert np.array_equal(drawn(found, 0, 0), drawn(found, 0, 1))
    said_otherwise = locate([Region("tumour", ("sitting on a chair",))])
    assert np.array_equal(drawn(found, 0), drawn(said_otherwise, 0))
    assert not np.array_equal(drawn(found, 0), drawn(found, 1))
    assert not np.array_equal(drawn(found, 0), drawn(locate(seed=1), 0))
    assert Supervoxels(Supervoxels.Options()).identity()["reads_words"] is False


def test_two_images_with_the_same_segments_are_drawn_apart() -> None:
    one, other = image(), image()
    other[0, 0, 0] = 1e-4
    grounder = Supervoxels(Supervoxels.Options())
    regions = [drawn(found, 0) for found in grounder.locate(Batch([one, other]), REGIONS)]
    assert not np.array_equal(*regions)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_image_holds_nothing(value: float) -> None:
    grounder = Supervoxels(Supervoxels.Options())
    assert len(grounder.locate(Batch([np.full((1, 30, 40), value, np.float32)]), REGIONS)[0]) == 0
