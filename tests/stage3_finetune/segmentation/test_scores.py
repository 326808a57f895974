"""Scores of segmentations: by hand, with the conventions for what is empty, and resampled as a loop does it."""

import numpy as np
import pytest

from stage3_finetune.intervals import draw_groups
from stage3_finetune.segmentation.drawn import IGNORE
from stage3_finetune.segmentation.scores import SegmentScores, dice_of, overlaps, score

CLASSES = ("a", "b")


def label(*rows: str) -> np.ndarray:
    return np.array(
        [[int(digit.replace("x", "0")) if digit != "x" else IGNORE for digit in row] for row in rows], np.uint8
    )


PAIRS = [
    (label("1100", "1100"), label("0110", "0110")),  # a: Dice .5, IoU 1/3
    (label("0022", "0000"), label("0000", "0000")),  # b missed; a in neither
    (label("0000", "0000"), label("0000", "0001")),  # a found, and not there
    (label("111x", "22xx"), label("1112", "2211")),  # what is ignored counts nowhere: both perfect
]


def scores(pairs=PAIRS, group="wxyz", spacing=None, resamples=200) -> SegmentScores:
    return score(iter(pairs), spacing or [None] * len(pairs), list(group), classes=CLASSES, seed=3, resamples=resamples)


def test_by_hand_and_what_is_empty() -> None:
    found = scores()
    a, b = found.by_class["a"], found.by_class["b"]
    assert (a.shown, a.both_empty, a.one_empty) == (2, 1, 1)
    assert (b.shown, b.both_empty, b.one_empty) == (2, 2, 1)
    assert a.dice.value == pytest.approx((0.5 + 0 + 1) / 3)
    assert a.iou.value == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert b.dice.value == b.iou.value == 0.5
    assert found.mean.dice.value == pytest.approx((a.dice.value + b.dice.value) / 2)
    assert a.hd95.value == pytest.approx((1 + 0) / 2)  # the image where one is empty has no distance
    assert a.assd.value == pytest.approx(0.25)
    assert b.hd95.value == 0
    assert (found.mean.one_empty, found.mean.both_empty, found.unit) == (2, 3, "px")
    assert "without a distance 2" in found.lines()[0]
    assert found.lines()[1] == "95 % intervals by group: 4 samples in 4 groups"


def test_distances_are_in_mm_where_every_image_tells_its_spacing() -> None:
    spacing = [(1.0, 0.5), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0)]
    found = scores(spacing=spacing)
    assert (found.unit, found.by_class["a"].hd95.value) == ("mm", pytest.approx(0.25))
    mixed = scores(spacing=[*spacing[:3], None])
    assert (mixed.unit, mixed.by_class["a"].hd95.value) == ("px", pytest.approx(0.5))


def test_intervals_are_those_of_a_loop_over_resamples() -> None:
    group = "xxyz"
    found = scores(group=group)
    known = dice_of(overlaps(PAIRS, 2))
    drawn = draw_groups(3, 200, 3)
    values = []
    for counts in drawn:
        rows = [place for place, name in enumerate(group) for _ in range(counts["xyz".index(name)])]
        means = [known[rows, k][np.isfinite(known[rows, k])] for k in range(2)]
        kept = [float(mean.mean()) for mean in means if len(mean)]
        values.append(np.mean(kept) if kept else np.nan)
    low, high = np.nanpercentile(values, (2.5, 97.5))
    assert found.mean.dice.low == pytest.approx(low)
    assert found.mean.dice.high == pytest.approx(high)


def test_nothing_anywhere_is_undefined_and_one_group_has_no_interval() -> None:
    empty = label("00")
    found = scores([(empty, empty)], "g")
    assert found.mean.dice.value is None
    assert found.lines()[1] == "no intervals: 1 samples in 1 group"
    assert scores([PAIRS[0], PAIRS[3]], "gg").mean.dice.low is None
    with pytest.raises(ValueError, match="no sample"):
        scores([], "")


def test_the_report_has_a_line_a_class_and_named_scores_are_shares() -> None:
    found = scores()
    (section,) = found.sections()
    assert section.body.count("<tr>") == 4
    assert "HD95, px" in section.body
    assert list(found.named()) == ["Dice", "IoU", "Dice: a", "Dice: b"]
    told = found.as_dict()
    assert told["by_class"]["a"]["dice"]["value"] == found.by_class["a"].dice.value
    assert (told["classes"], told["samples"], told["distance_unit"]) == (["a", "b"], 4, "px")
