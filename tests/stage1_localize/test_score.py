"""Scores of planted stores against what geometry or a count by hand says."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage1_localize.score import score_store
from stage1_localize.score_labels import join_labels
from tests.stage1_localize.scored_stores import SIDE, Annotated, Planted, disc, write_labels, write_store

TRUE = disc(28, 30, 12)
PIXELS = SIDE * SIDE


def score(
    folder: Path,
    images: Sequence[Planted],
    things: Sequence[Annotated],
    *,
    regions: Sequence[str] = ("spot",),
    categories: Sequence[str] = ("spot",),
    crowds: Sequence[tuple[int, str]] = (),
    ignore: Sequence[str] = (),
    exhaustive: bool = False,
) -> dict[str, Any]:
    """Scores of the region 'spot'."""
    store = write_store(folder / "store", images, regions)
    labels = write_labels(folder / "coco.json", len(images), things, categories, crowds)
    truth = join_labels(store, labels, ignore=ignore)
    return score_store(store, truth, exhaustive=exhaustive)[0]["spot"]


@pytest.mark.parametrize("shift", [0, 6, 12, 24])
def test_a_shifted_disc_overlaps_as_geometry_says(tmp_path: Path, shift: int) -> None:
    found = disc(28 + shift, 30, 12)
    told = score(tmp_path, [Planted({"spot": found})], [(0, "spot", TRUE)])
    both = sum(bool(a and b) for a, b in zip(found.ravel(), TRUE.ravel(), strict=True))
    each = int(TRUE.sum())
    assert told["dice"][0] == pytest.approx(both / each, abs=1e-4)
    assert told["iou"][0] == pytest.approx(both / (2 * each - both), abs=1e-4)
    assert told["soft_dice"][0] == told["dice"][0]  # a map of 0 and 1
    assert told["found_share"][0] == pytest.approx(both / each, abs=1e-4)
    assert told["outside_share"][0] == pytest.approx(1 - both / each, abs=1e-4)
    assert told["coverage"][0] == told["true_coverage"][0] == pytest.approx(each / PIXELS, abs=1e-4)
    half = shift / 24
    lens = (math.acos(half) - half * math.sqrt(1 - half**2)) * 2 / math.pi if half < 1 else 0.0
    assert told["dice"][0] == pytest.approx(lens, abs=0.02)
    assert all(row[1] == told["dice"][0] for row in told["dice_by_threshold"])


def test_a_map_counts_from_one_half_on_and_softly_by_its_values(tmp_path: Path) -> None:
    core, halo = disc(28, 30, 8), disc(28, 30, 16)
    graded = np.where(core, 0.5, np.where(halo, 0.3, 0)).astype(np.float32)
    told = score(tmp_path, [Planted({"spot": graded})], [(0, "spot", TRUE)])
    assert told["dice"][0] == pytest.approx(2 * core.sum() / (core.sum() + TRUE.sum()), abs=1e-4)
    stored = np.floor(254 * graded + 0.5) / 254
    assert told["soft_dice"][0] == pytest.approx(2 * stored[TRUE].sum() / (stored.sum() + TRUE.sum()), abs=1e-4)
    curve = {row[0]: row[1] for row in told["dice_by_threshold"]}
    assert curve[0.3] == pytest.approx(2 * TRUE.sum() / (halo.sum() + TRUE.sum()), abs=1e-4)
    assert curve[0.35] == curve[0.5] == told["dice"][0]
    assert curve[0.55] == 0


def test_dice_is_the_mean_over_images_not_over_pixels(tmp_path: Path) -> None:
    small = disc(10, 10, 4)
    told = score(tmp_path, [Planted({"spot": TRUE}), Planted()], [(0, "spot", TRUE), (1, "spot", small)])
    assert told["dice"][0] == 0.5
    assert told["outside_share"][0] == 0  # of the one image that has a map
    assert told["images"] == 2


def test_a_calibrated_map_has_no_calibration_error_and_an_overconfident_one_has_all_of_it(tmp_path: Path) -> None:
    # Half of each map's pixels are true: said with 0.5 that is right, said with 1 it is too sure.
    columns = np.indices((SIDE, SIDE))[1]
    wide = np.abs(columns - 31.5) < 16
    true = wide & ((columns + np.indices((SIDE, SIDE))[0]) % 2 == 0)
    share = wide.sum() / PIXELS
    calm = score(tmp_path, [Planted({"spot": wide * 0.5})], [(0, "spot", true)])
    assert calm["pixel_ece"][0] == 0
    assert calm["pixel_brier"][0] == pytest.approx(0.25 * share, abs=1e-4)
    assert calm["pixel_reliability"] == [[0.0, 0.0, PIXELS - wide.sum()], [0.5, 0.5, wide.sum()]]
    (tmp_path / "sure").mkdir()
    sure = score(tmp_path / "sure", [Planted({"spot": wide * 1.0})], [(0, "spot", true)])
    assert sure["pixel_ece"][0] == pytest.approx(0.5 * share, abs=1e-4)
    assert sure["pixel_brier"][0] == pytest.approx(0.5 * share, abs=1e-4)


def test_boxes_by_hand(tmp_path: Path) -> None:
    a, b, far = (4, 4, 20, 20), (30, 30, 50, 50), (40, 2, 60, 12)
    images = [
        Planted(boxes=[(a, 0.95, "spot"), (far, 0.85, "spot"), (b, 0.75, "spot"), (far, 1.0, "other")]),
        Planted(boxes=[(far, 0.65, "spot")]),
    ]
    things = [(0, "spot", a), (0, "spot", b), (1, "spot", a)]
    told = score(tmp_path, images, things, regions=("spot", "other"))
    assert told["precision"][0] == 0.5
    assert told["recall"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert told["f1"][0] == pytest.approx(4 / 7, abs=1e-4)
    # Precision 1 to a recall of 1/3 (0.00 to 0.33), 2/3 to 2/3 (0.34 to 0.66), then none: of 101 recalls.
    assert told["average_precision"][0] == pytest.approx((34 + 33 * 2 / 3) / 101, abs=1e-4)
    assert told["box_brier"][0] == pytest.approx((0.05**2 + 0.85**2 + 0.25**2 + 0.65**2) / 4, abs=1e-4)
    assert told["box_ece"][0] == pytest.approx((0.05 + 0.85 + 0.25 + 0.65) / 4, abs=1e-4)
    assert sum(told["box_scores"]) == 4
    assert "dice" not in told  # boxes alone have no pixels


def test_a_box_is_hit_once_and_only_at_half_overlap(tmp_path: Path) -> None:
    true = (0, 0, 20, 20)
    images = [
        Planted(boxes=[(true, 0.9, "spot"), (true, 0.8, "spot")]),
        Planted(boxes=[((0, 0, 20, 10), 0.9, "spot")]),  # IoU of one half
        Planted(boxes=[((0, 0, 20, 9), 0.9, "spot")]),
    ]
    told = score(tmp_path, images, [(n, "spot", true) for n in range(3)])
    assert told["precision"][0] == 0.5
    assert told["recall"][0] == pytest.approx(2 / 3, abs=1e-4)


def test_precision_at_a_recall_is_the_best_at_that_or_more(tmp_path: Path) -> None:
    a, b, far = (4, 4, 20, 20), (30, 30, 50, 50), (40, 2, 60, 12)
    boxes = [(far, 0.9, "spot"), (a, 0.8, "spot"), (b, 0.7, "spot")]  # precision 1/2 at a recall of 1/2, then 2/3
    told = score(tmp_path, [Planted(boxes=boxes)], [(0, "spot", a), (0, "spot", b)])
    assert told["average_precision"][0] == pytest.approx(2 / 3, abs=1e-4)


def test_equal_scores_have_no_order(tmp_path: Path) -> None:
    true, far = (4, 4, 20, 20), (40, 40, 60, 60)
    for place, boxes in enumerate(([true, far], [far, true])):
        folder = tmp_path / str(place)
        folder.mkdir()
        told = score(folder, [Planted(boxes=[(box, 0.5, "spot") for box in boxes])], [(0, "spot", true)])
        assert told["average_precision"][0] == 0.5


def test_an_image_without_annotation_is_unknown_unless_the_labels_name_all_there_is(tmp_path: Path) -> None:
    images = [
        Planted({"spot": TRUE}, [((16, 18, 40, 42), 1, "spot")]),
        Planted({"spot": TRUE}, [((16, 18, 40, 42), 1, "spot")]),
        Planted(),
    ]
    told = score(tmp_path, images, [(0, "spot", TRUE)])
    assert (told["images"], told["images_without"], told["images_unknown"]) == (1, 0, 2)
    assert told["precision"][0] == 1
    assert "false_regions" not in told
    (tmp_path / "all").mkdir()
    told = score(tmp_path / "all", images, [(0, "spot", TRUE)], exhaustive=True)
    assert (told["images"], told["images_without"], told["images_unknown"]) == (1, 2, 0)
    assert told["false_regions"][0] == 0.5
    assert told["false_pixels"][0] == pytest.approx(TRUE.sum() / PIXELS / 2, abs=1e-4)
    assert told["precision"][0] == 0.5
    assert told["dice"][0] == 1  # of the image that has it


def test_a_crowd_makes_its_image_unknown_even_where_labels_are_exhaustive(tmp_path: Path) -> None:
    images = [Planted({"spot": TRUE}), Planted({"spot": TRUE})]
    told = score(tmp_path, images, [(0, "spot", TRUE)], crowds=[(1, "spot")], exhaustive=True)
    assert (told["images"], told["images_without"], told["images_unknown"]) == (1, 0, 1)


def test_ignored_places_count_neither_way(tmp_path: Path) -> None:
    scar = disc(50, 50, 9)
    found = Planted({"spot": TRUE | scar}, [((16, 18, 40, 42), 0.9, "spot"), ((41, 41, 59, 59), 0.9, "spot")])
    things = [(0, "spot", TRUE), (0, "scar", scar)]
    told = score(tmp_path, [found], things, categories=("spot", "scar"))
    assert told["dice"][0] < 1
    assert told["precision"][0] == 0.5
    (tmp_path / "less").mkdir()
    told = score(tmp_path / "less", [found], things, categories=("spot", "scar"), ignore=["scar"])
    assert told["dice"][0] == told["precision"][0] == told["average_precision"][0] == 1
    assert told["coverage"][0] == pytest.approx(TRUE.sum() / (PIXELS - scar.sum()), abs=1e-4)


def test_a_thing_that_is_ignored_as_a_whole_is_no_perfect_answer(tmp_path: Path) -> None:
    images = [Planted({"spot": disc(28, 30, 6)}), Planted()]
    things = [(0, "spot", TRUE), (1, "spot", TRUE), (1, "scar", disc(28, 30, 13))]
    told = score(tmp_path, images, things, categories=("spot", "scar"), ignore=["scar"])
    inner = disc(28, 30, 6).sum()
    assert told["dice"][0] == pytest.approx(2 * inner / (inner + TRUE.sum()), abs=1e-4)


def test_intervals_resample_groups_not_images(tmp_path: Path) -> None:
    def told(name: str, groups: list[str]) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        images = [
            Planted({"spot": TRUE} if n % 2 else {}, group=group) for n, group in enumerate(groups)
        ]  # every second one right
        return score(tmp_path / name, images, [(n, "spot", TRUE) for n in range(len(images))])

    one = told("one", ["a"] * 12)
    assert (one["groups"], one["dice"]) == (1, [0.5, 0.5, 0.5])
    two = told("two", ["a", "b"] * 6)
    assert (two["groups"], two["dice"]) == (2, [0.5, 0.0, 1.0])
    many = told("many", [str(n) for n in range(12)])
    assert many["groups"] == 12
    assert 0.1 < many["dice"][1] < 0.5 < many["dice"][2] < 0.9
    assert many["dice"] == told("again", [str(n) for n in range(12)])["dice"]
