"""Routes are chosen by what was found on held-out images, and scored by choices made without them."""

import numpy as np
import pytest
import torch

from stage1_localize.choose import Trier, Try, candidates, choose, honest_scores, try_image
from stage1_localize.contracts import Batch, Detections
from stage1_localize.evaluate import Case
from stage1_localize.grounders.lite_head import Answer
from stage1_localize.segmenters.lite_medsam import Encoded, encoder_key


def one(hits: int, found: int, true: int, dice: float | None = None, *, fold: int = 0, group: str = "g") -> Try:
    return Try(group, fold, hits, found, true, dice)


def test_outlines_are_chosen_by_dice_boxes_by_f1_and_silence_counts() -> None:
    assert choose([[one(1, 1, 1, 0.5), one(0, 9, 1, 0.9)]]) == 1, "the map matters, not its box"
    assert choose([[one(1, 3, 2), one(2, 3, 2)]]) == 1
    loud, silent = one(2, 2, 2), one(1, 1, 2)
    assert choose([[loud, silent]]) == 0
    assert choose([[loud, silent], [one(0, 1, 0), one(0, 0, 0)]]) == 1, "found where it is not"
    assert choose([[one(1, 1, 1), one(1, 1, 1)]]) == 0, "of equal ones the first"
    rare = [[one(1, 1, 1, 0.8), one(1, 1, 1, 0.5)]] * 3 + [[one(0, 1, 0), one(0, 0, 0)]]
    assert choose(rare) == 1
    assert choose(rare[:3] * 3 + rare[3:]) == 0, "few images without it outweigh no map"


def test_only_a_region_with_outlines_may_answer_with_its_own_mask() -> None:
    assert {c.route for c in candidates(("a",), True)} == {"mask", "component", "centre"}
    assert {c.route for c in candidates(("a",), False)} == {"component", "centre"}


def test_scores_never_use_a_choice_that_saw_their_images() -> None:
    # Each fold is best served by another candidate; a choice that saw its own fold would reach 1.
    tries = [
        [one(1, 1, 1, 1.0, fold=0, group="a"), one(0, 1, 1, 0.2, fold=0, group="a")],
        [one(0, 1, 1, 0.4, fold=1, group="b"), one(1, 1, 1, 0.9, fold=1, group="b")],
    ]
    scores = honest_scores(tries)
    assert scores["dice"][0] == pytest.approx((0.2 + 0.4) / 2)
    assert scores["f1"][0] == pytest.approx(0, abs=1e-6)
    assert (scores["images"], scores["groups"]) == (2, 2)


def test_nothing_found_has_no_precision_and_absent_images_are_counted() -> None:
    scores = honest_scores([[one(0, 0, 2)], [one(0, 0, 0)], [one(0, 1, 0, fold=1)]])
    assert "precision" not in scores
    assert scores["recall"][0] == pytest.approx(0, abs=1e-6)
    assert scores["false_regions"][0] == 0.5
    assert scores["images_without"] == 2


class PlantedHead:
    """One thing of 20 x 20 px in the middle of the padded input, present or not."""

    def __init__(self, presence: float) -> None:
        self.presence, self.looks = presence, 0

    def look(self, embedding: torch.Tensor, pixels: torch.Tensor) -> str:
        self.looks += 1
        return "seen"

    def ask(self, seen: str, tokens: torch.Tensor, filled: torch.Tensor) -> Answer:
        mask = torch.full((1, 1, 128, 128), -8.0)
        mask[0, 0, 59:69, 59:69] = 8
        return Answer(
            mask, torch.full((1, 1, 64, 64), -8.0), torch.tensor([[self.presence]]), torch.zeros(1, 2, 64, 64)
        )


class BoxPixels:
    """Fills every box; counts them."""

    def __init__(self) -> None:
        self.boxes = 0

    def segment(self, batch: Batch, detections: list[Detections]) -> list[np.ndarray]:
        made = []
        for x0, y0, x1, y1 in detections[0].box_xyxy_px.astype(int):
            self.boxes += 1
            pixels = np.zeros((256, 256), np.float32)
            pixels[y0:y1, x0:x1] = 1
            made.append(pixels)
        return [np.stack(made)]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage1_localize.choose.encode_text", lambda text: np.ones((1, 384), np.float32))


def case_and_batch(image_value: float = 1.0) -> tuple[Case, Batch]:
    image = np.zeros((1, 256, 256), np.float32)
    image[0, 118:138, 118:138] = image_value
    truth = np.zeros((256, 256), bool)
    truth[118:138, 118:138] = True
    batch = Batch([image])
    batch.memo(encoder_key(), lambda: [Encoded(torch.zeros(256, 64, 64), 256, 256, 256, 256)])
    boxes = {"thing": np.array([[118, 118, 138, 138]], np.float32)}
    return Case("g", image, {"thing": truth}, boxes, frozenset({"other"})), batch


def test_an_image_is_looked_at_once_and_a_box_segmented_once(words: None) -> None:
    case, batch = case_and_batch()
    head, pixels = PlantedHead(presence=8.0), BoxPixels()
    tried = {"thing": candidates(("thing",), True), "other": candidates(("other",), False)}
    tries = try_image(Trier(head, pixels), case, batch, tried, fold=2)
    assert head.looks == 1
    assert pixels.boxes == 2, "one a margin, of twelve candidates"
    thing = dict(zip([(c.route, c.margin_px) for c in tried["thing"]], tries["thing"], strict=True))
    assert (thing["mask", 0].hits, thing["component", 0].hits, thing["centre", 0].found) == (1, 1, 0)
    assert thing["mask", 0].dice == pytest.approx(1, abs=0.1)
    assert thing["component", 2].dice < thing["component", 0].dice
    assert all(t.fold == 2 and t.true == 1 for t in tries["thing"])
    assert max(t.found for t in tries["other"]) == 1
    assert all(t.true == 0 and t.dice is None for t in tries["other"])


def test_what_is_neither_there_nor_absent_is_not_asked(words: None) -> None:
    case, batch = case_and_batch()
    tried = {"unknown": candidates(("unknown",), False)}
    assert try_image(Trier(PlantedHead(8.0), BoxPixels()), case, batch, tried, 0) == {}


def test_a_constant_image_is_answered_with_nothing(words: None) -> None:
    _, batch = case_and_batch(image_value=0)
    head = PlantedHead(8.0)
    ((found, drawn),) = Trier(head, BoxPixels()).answer(batch, "thing", candidates(("thing",), True)[:1], maps=True)
    assert len(found) == 0
    assert drawn is not None
    assert not drawn.any()
    assert head.looks == 0
