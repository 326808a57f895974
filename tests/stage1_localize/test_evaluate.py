"""Scores of answers that are known."""

import numpy as np
import pytest

from shared.errors import PromptError
from stage1_localize.contracts import Batch, Detections
from stage1_localize.evaluate import Case, answer_with, dice, evaluate, mask_box, match

SQUARE = np.zeros((256, 256), bool)
SQUARE[64:128, 32:96] = True
BOX = np.array([[16, 32, 48, 64]], np.float32)
"""The same square in an image of 128 x 128 px."""


def detections(boxes, scores, region=0, maps=None) -> Detections:
    n = len(scores)
    return Detections(
        np.array(boxes, np.float32).reshape(n, 4),
        np.array(scores, np.float32),
        np.full(n, region, np.int64),
        np.zeros(n, np.int64),
        list(maps) if maps else [None] * n,
    )


class Square:
    """Finds the square under the word 'square' in every image, and refuses 'blob'."""

    version = 1

    def check(self, regions):
        for region in regions:
            if region.texts == ("blob",):
                raise PromptError("no")

    def identity(self):
        return {}

    def locate(self, batch, regions):
        for r, region in enumerate(regions):
            if region.texts == ("square",):
                return [detections(BOX, [0.9], r, [SQUARE.astype(np.float32)])]
        return [Detections.none()]


class Never:
    version = 1

    def identity(self):
        return {}

    def segment(self, batch, found):
        return [np.zeros((len(part), 256, 256), np.float32) for part in found]


def case(group, *, there=True, **changes) -> Case:
    image = np.zeros((1, 128, 128), np.float32)
    masks = {"thing": SQUARE} if there else {}
    return Case(group, image, masks, {}, frozenset() if there else frozenset({"thing"}), **changes)


def run(cases, words):
    return evaluate(cases, {"thing": words}, answer_with(Square(), Never(), lambda case: Batch([case.image])))["thing"]


def test_a_perfect_answer_scores_one():
    scores = run([case("a"), case("b")], ("square",))
    assert scores["precision"] == scores["recall"] == scores["f1"] == scores["dice"] == [1, 1, 1]
    assert (scores["images"], scores["groups"]) == (2, 2)
    assert "false_regions" not in scores


def test_a_refused_or_silent_wording_is_a_miss():
    for word in ("blob", "circle"):
        scores = run([case("a"), case("b")], (word,))
        assert scores["recall"][0] == scores["dice"][0] == 0


def test_wordings_take_turns_and_groups_are_resampled_whole():
    scores = run([case("a"), case("b"), case("a"), case("b")], ("square", "circle"))
    assert scores["dice"] == [0.5, 0, 1]


def test_absent_concepts_count_as_false_where_they_are_found():
    scores = run([case("a", there=False), case("b", there=False)], ("square",))
    assert scores["false_regions"] == [1, 1, 1]
    assert scores["false_pixels"][0] == pytest.approx(SQUARE.mean(), abs=1e-4)
    assert scores["images_without"] == 2
    assert run([case("a", there=False)], ("circle",))["false_regions"] == [0, 0, 0]


def test_rival_truth_is_scored_too():
    both = case("a")
    both = Case("a", both.image, {"thing": SQUARE, "other": ~SQUARE}, {}, frozenset())
    answer = answer_with(Square(), Never(), lambda case: Batch([case.image]))
    scores = evaluate(
        [both, case("b")], {"thing": ("square",), "other": ("circle",)}, answer, rivals={"thing": "other"}
    )
    assert scores["thing"]["rival_dice"][0] == 0
    assert "rival_dice" not in scores["other"]


def test_ignored_pixels_do_not_count():
    wrong = SQUARE.copy()
    wrong[200:] = True
    assert dice(wrong, SQUARE) < 0.5
    ignore = np.zeros_like(SQUARE)
    ignore[200:] = True
    assert dice(wrong, SQUARE, ignore) == 1
    assert dice(SQUARE & False, SQUARE & False) == 1


def test_each_true_box_is_hit_once():
    assert match(detections([BOX[0], BOX[0], [0, 0, 4, 4]], [0.5, 0.9, 0.8]), BOX) == 1
    assert match(detections([BOX[0]], [0.5]), np.zeros((0, 4), np.float32)) == 0


def test_the_box_of_a_mask_in_the_image_frame():
    assert np.array_equal(mask_box(SQUARE, (128, 128)), BOX)
    assert mask_box(SQUARE & False, (128, 128)).shape == (0, 4)
