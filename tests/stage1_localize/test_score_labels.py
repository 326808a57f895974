"""What joins labels with a store, and what is refused: one line that names the thing, and a hint."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.errors import InputMissingError, UsageError
from shared.images import Source
from stage1_localize.score_labels import join_labels, true_pixels, truth_map
from tests.stage1_localize.coco_files import change
from tests.stage1_localize.scored_stores import SIDE, Planted, disc, write_labels, write_store

TRUE = disc(28, 30, 12)


def test_names_that_are_alike_belong_together_and_the_rest_is_told(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [Planted(), Planted(None)], ["Left_Lung", "heart"])
    things = [(0, "left  lung", TRUE), (2, "rib", TRUE)]
    labels = write_labels(tmp_path / "coco.json", 3, things, ["left  lung", "rib"])
    truth = join_labels(store, labels)
    assert truth.categories == {"Left_Lung": ("left  lung",)}
    assert (list(truth.rows), truth.quarantined, truth.elsewhere) == ([0], 1, 1)
    told = " | ".join(truth.warnings)
    assert "not scored, for no category of the labels has their name: heart" in told
    assert "no region is compared with: rib" in told
    assert "1 of 3 labelled images are not in the store" in told
    assert "1 labelled images were quarantined" in told
    assert truth.outlined("Left_Lung")


def test_a_map_unites_categories_and_one_without_outlines_leaves_boxes_alone(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [Planted()])
    labels = write_labels(tmp_path / "coco.json", 1, [(0, "a", TRUE), (0, "b", (1, 1, 9, 9))], ["a", "b"])
    assert join_labels(store, labels, mapping=["spot=A"]).categories == {"spot": ("a",)}
    truth = join_labels(store, labels, mapping=["spot=a", " spot = b ", "spot=a"])
    assert truth.categories == {"spot": ("a", "b")}
    assert not truth.outlined("spot")


def test_labels_may_name_files_that_the_store_knows_by_pseudonym(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [Planted(), Planted()])
    labels = write_labels(tmp_path / "coco.json", 1, [(0, "spot", TRUE)])
    body = json.loads(labels.read_text())
    change(labels, images=[{**body["images"][0], "file_name": "scans/anna.dcm"}])
    with pytest.raises(UsageError, match="none of their 1 images is a sample with maps"):
        join_labels(store, labels)
    sources = [Source("01.png", tmp_path / "anna.dcm", known_as="scans/anna.dcm")]
    assert list(join_labels(store, labels, sources=sources).rows) == [1]


def test_truth_is_what_covers_a_map_pixel_by_half_or_more(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [Planted()])
    labels = write_labels(tmp_path / "coco.json", 1, [(0, "spot", TRUE), (0, "spot", disc(45, 30, 12))])
    item = join_labels(store, labels).rows[0]
    union = TRUE | disc(45, 30, 12)
    assert (true_pixels(item.things, item, (SIDE, SIDE)) == union).all()
    assert not true_pixels([], item, (SIDE, SIDE)).any()
    coarse = truth_map(item.things, item, (SIDE // 4, SIDE // 4))
    assert coarse.mean() == pytest.approx(union.mean(), abs=0.005)
    blocks = union.reshape(16, 4, 16, 4).mean(axis=(1, 3))
    assert coarse[(blocks == 0) | (blocks == 1)] == pytest.approx(blocks[(blocks == 0) | (blocks == 1)], abs=0.25)


@pytest.mark.parametrize(
    ("mapping", "ignore", "told", "hint"),
    [
        (
            ["spot"],
            [],
            "--map 'spot': expected region=category",
            "regions: spot; categories: tumour, scar",
        ),
        (["spto=tumour"], [], "region 'spto': no such region", "did you mean 'spot'?"),
        (["spot=tumor"], [], "category 'tumor': not in the labels", "did you mean 'tumour'?"),
        (["spot=Tumuor"], [], "category 'Tumuor': not in the labels", "did you mean 'tumour'?"),
        (["spot=zzz"], [], "category 'zzz': not in the labels", "known: tumour, scar"),
        (["spot=tumour"], ["scra"], "--ignore 'scra': not in the labels", "did you mean 'scar'?"),
        (["spot=tumour"], ["tumour"], "category 'tumour' is both scored and ignored", ""),
        ([], [], "no region (spot) is a category of the labels", "--map 'spot=tumour'"),
    ],
)
def test_names_that_are_not_known_are_told_with_what_is_near(
    tmp_path: Path, mapping: list[str], ignore: list[str], told: str, hint: str
) -> None:
    store = write_store(tmp_path / "store", [Planted()])
    labels = write_labels(tmp_path / "coco.json", 1, [(0, "tumour", TRUE)], ["tumour", "scar"])
    with pytest.raises(UsageError) as caught:
        join_labels(store, labels, mapping=mapping, ignore=ignore)
    assert told in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")
    assert "Tumor" not in (caught.value.hint or "")  # no names of another data set


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [Planted(), Planted(None)])
    with pytest.raises(InputMissingError, match="no such file"):
        join_labels(store, tmp_path / "absent.json")
    (tmp_path / "empty.json").touch()
    with pytest.raises(UsageError, match=r"empty\.json: not JSON"):
        join_labels(store, tmp_path / "empty.json")
    labels = write_labels(tmp_path / "coco.json", 1, [(0, "spot", TRUE)])
    body = json.loads(labels.read_text())
    change(labels, annotations=[], images=[{**body["images"][0], "height": 32}])
    with pytest.raises(UsageError, match="image 0 is 64x32 px there, 64x64 px in the store"):
        join_labels(store, labels)
    change(labels, images=[{**body["images"][0], "file_name": "01.png"}])
    with pytest.raises(UsageError, match="none of their 1 images is a sample with maps"):
        join_labels(store, labels)  # it was quarantined
    volumes = write_store(tmp_path / "volumes", [Planted({"spot": np.zeros((4, 8, 8))})], grid=(4, 8, 8))
    with pytest.raises(UsageError, match="scores are for images"):
        join_labels(volumes, labels)


def test_labels_without_any_annotation_score_nothing_unless_that_is_what_they_say(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [Planted()])
    labels = write_labels(tmp_path / "coco.json", 1, [])
    with pytest.raises(UsageError, match="no annotation of spot on an image of the store") as caught:
        join_labels(store, labels)
    assert "--exhaustive" in (caught.value.hint or "")
    assert list(join_labels(store, labels, exhaustive=True).rows) == [0]
    only_crowds = write_labels(tmp_path / "crowds.json", 1, [], crowds=[(0, "spot")])
    with pytest.raises(UsageError, match="no annotation of spot"):
        join_labels(store, only_crowds)
