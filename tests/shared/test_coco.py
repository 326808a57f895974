"""COCO labels: every fault is told at once, by ids; what is said of a sample decides the digest, nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.coco import CocoLabels, read_coco
from shared.errors import InputMissingError, UsageError
from shared.images import find_sources
from tests.stage1_localize.coco_files import HEIGHT, WIDTH, change, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    return write_corpus(tmp_path)


def read(corpus: tuple[Path, Path]) -> CocoLabels:
    return read_coco(corpus[1], find_sources(corpus[0]))


def with_annotation(labels: Path, **fields: Any) -> None:
    body = json.loads(labels.read_text())
    given = {"id": 90, "image_id": 0, "category_id": 7, "bbox": [1, 2, 30, 40], **fields}
    change(labels, annotations=[*body["annotations"], {k: v for k, v in given.items() if v is not None}])


def test_boxes_and_outlines_arrive_with_their_images(corpus: tuple[Path, Path]) -> None:
    labels = read(corpus)
    assert labels.regions == ("square",)
    assert labels.outlined == {"square"}
    assert [item.source.sample_id for item in labels.images] == [f"{n}.png" for n in range(6)]
    assert labels.images[2].things[0].box_xyxy_px == (28, 20, 52, 44)
    assert labels.images[5].things == ()
    assert labels.warnings == ()


def test_order_ids_and_unused_keys_do_not_change_the_digest_but_a_box_does(corpus: tuple[Path, Path]) -> None:
    before = read(corpus).sha256
    body = json.loads(corpus[1].read_text())
    renumbered = [{**row, "id": row["id"] + 100} for row in reversed(body["annotations"])]
    change(corpus[1], annotations=renumbered, images=body["images"][::-1], info={"year": 2020})
    assert read(corpus).sha256 == before
    renumbered[0]["bbox"][0] += 1
    change(corpus[1], annotations=renumbered)
    assert read(corpus).sha256 != before


def test_every_fault_is_told_at_once_with_its_id(corpus: tuple[Path, Path]) -> None:
    body = json.loads(corpus[1].read_text())
    rows = body["annotations"]
    wrong = [
        {"id": 50, "image_id": 99, "category_id": 7, "bbox": [1, 1, 5, 5]},
        {"id": 51, "image_id": 0, "category_id": 8, "bbox": [1, 1, 5, 5]},
        {"id": 52, "image_id": 0, "category_id": 7, "bbox": [1, 1, 0, 5]},
        {"id": 53, "image_id": 0, "category_id": 7, "bbox": [60, 1, 60, 5]},
        {"id": 54, "image_id": 0, "category_id": 7, "bbox": [1, 1, float("nan"), 5]},
        {"id": 55, "image_id": 0, "category_id": 7},
        {**rows[0], "id": 56},
        {**rows[1]},
        {"id": 58, "image_id": 0, "category_id": 7, "bbox": [1, 1, 9, 9], "segmentation": [[1, 1, 2]]},
        {"id": 59, "image_id": 0, "category_id": 7, "bbox": [1, 1, 9, 9], "segmentation": {"size": [96, 80]}},
        {
            "id": 60, "image_id": 0, "category_id": 7, "bbox": [1, 1, 9, 9],
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": [1, 2]},
        },
        {
            "id": 61, "image_id": 0, "category_id": 7, "bbox": [1, 1, 9, 9],
            "segmentation": [[40, 40, 60, 40, 60, 60]],
        },
        {
            "id": 62, "image_id": 0, "category_id": 7,
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]},
        },
        "x",
    ]  # fmt: skip
    images = [
        {"id": 70, "file_name": "../secret.png", "width": 5, "height": 5},
        {"id": 71, "file_name": "/etc/Jane Doe.png", "width": 5, "height": 5},
        {"id": 72, "file_name": "Jane Doe.png", "width": 5, "height": 5},
        {"id": 73, "file_name": "0.png", "width": WIDTH, "height": HEIGHT},
        {"id": 0, "file_name": "1.png", "width": WIDTH, "height": HEIGHT},
        {"id": 75, "file_name": "1.png", "width": 0, "height": HEIGHT},
        {"id": "76", "file_name": "1.png", "width": WIDTH, "height": HEIGHT},
    ]
    change(corpus[1], annotations=[*rows, *wrong], images=[*body["images"], *images])
    with pytest.raises(UsageError) as caught:
        read(corpus)
    told = caught.value.message
    assert told.startswith("labels coco.json: 22 problems: ")
    for expected in (
        "image 70: file_name is not a path inside",
        "image 71: file_name is not a path inside",
        "image 72: its file_name is not among the images",
        "image 73: the same file_name as image 0",
        "image 0: given twice",
        "image 75: width and height 0 x 80",
        "image '76': expected a whole number as id",
        "annotation 50: image_id 99 is no image",
        "annotation 51: category_id 8 is no category",
        "annotation 52: box of zero area",
        "annotation 53: box [60, 1, 120, 6] (x0, y0, x1, y1) lies outside image 0 of 96 x 80 px",
        "annotation 54: bbox: expected four finite numbers",
        "annotation 55: bbox: expected four finite numbers",
        "annotation 56: the same as another annotation of image 0",
        "annotation 1: id given twice",
        "annotation 58: segmentation: expected polygons",
        "annotation 59: segmentation size [96, 80], expected [height, width]",
        "annotation 60: run lengths cover 3 px of 7680",
        "annotation 1: the same as another annotation of image 1",
        "annotation 62: its segmentation holds no pixel",
        "annotation at place 18: expected an object",
        "annotation 61: box [1, 1, 10, 10] and segmentation [40, 40, 60, 60] do not agree",
    ):
        assert expected in told, expected
    assert "Jane" not in told + str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"images": []}', "no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "no category; no image|no image; no category"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "A"}]}',
            "category 2: a name that another category has",
        ),
    ],
)
def test_what_is_no_coco_is_refused(corpus: tuple[Path, Path], text: str, match: str) -> None:
    corpus[1].write_text(text)
    with pytest.raises(UsageError, match=match):
        read(corpus)


def test_a_flood_of_faults_is_cut_but_counted(corpus: tuple[Path, Path]) -> None:
    change(corpus[1], annotations=[0] * 150)
    with pytest.raises(UsageError, match=r"150 problems: annotation at place 0: .*place 99: [^;]*; and 50 more$"):
        read(corpus)


def test_a_missing_file_is_named(corpus: tuple[Path, Path]) -> None:
    with pytest.raises(InputMissingError, match="no such file"):
        read_coco(corpus[1].with_name("none.json"), find_sources(corpus[0]))


def test_a_box_may_come_from_its_outline_and_border_rounding_is_cut_off(corpus: tuple[Path, Path]) -> None:
    with_annotation(corpus[1], bbox=None, segmentation=[[2, 3, 9, 3, 5, 12]])
    assert read(corpus).images[0].things[1].box_xyxy_px == (2, 3, 9, 12)
    with_annotation(corpus[1], id=91, bbox=[-0.5, 70, 97, 10.4])
    assert read(corpus).images[0].things[2].box_xyxy_px == (0, 70, WIDTH, HEIGHT)


def test_outlines_count_only_where_all_have_one_that_is_more_than_the_box(corpus: tuple[Path, Path]) -> None:
    with_annotation(corpus[1])
    labels = read(corpus)
    assert not labels.outlined
    assert "1 of 6 annotations have no outline; boxes alone are used" in labels.warnings[0]
    body = json.loads(corpus[1].read_text())
    body["annotations"][-1]["segmentation"] = [[1, 2, 31, 2, 31, 42, 1, 42]]
    change(corpus[1], annotations=body["annotations"])
    labels = read(corpus)
    assert not labels.outlined
    assert "1 of 6 outlines are only their boxes" in labels.warnings[0]


def test_a_crowd_makes_its_region_unknown_in_that_image(corpus: tuple[Path, Path]) -> None:
    with_annotation(corpus[1], image_id=5, iscrowd=1)
    labels = read(corpus)
    assert labels.images[5].unknown == {"square"}
    assert labels.images[5].things == ()
    assert "1 images have crowd annotations" in labels.warnings[0]
