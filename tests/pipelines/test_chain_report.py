import io

import numpy as np
from PIL import Image

from pipelines.chain import Summary
from pipelines.chain_report import chain_report, opening_picture
from shared.artifact import read_card
from stage2_pretrain.pictures import read_examples
from tests.pipelines.conftest import Chain


def test_the_opening_picture_shows_one_of_the_encoders_examples(finished: Chain) -> None:
    drawn = [opening_picture(finished.out, "bright", index) for index in range(2)]
    pictures = [np.asarray(Image.open(io.BytesIO(raw))) for raw in drawn]
    assert pictures[0].shape[1] > 3 * pictures[0].shape[0]  # five panels
    assert drawn[0] != drawn[1]
    largest = max(read_examples(finished.out / "encoder"), key=lambda item: float(item.maps["bright"].sum()))
    grey = np.asarray(Image.fromarray((largest.image[0] * 255).astype(np.uint8)).resize((340, 340)), np.float32)
    shown = pictures[0][34:374, 34:374, 0].astype(np.float32)
    assert np.abs(shown - grey)[20:-20, 20:-20].mean() < 12  # its first panel is that image


def test_the_page_says_how_long_each_artifact_took(finished: Chain) -> None:
    cards = {name: read_card(finished.out / name) for name in ("regions", "encoder", "scratch")}
    summary = Summary(
        finished.out, cards, {"localize": 61.5, "pretrain": 0.01, "finetune": 9}, {"scratch": 7.25}, {"rows": []}
    )
    page = chain_report(finished.out, summary, template=False)
    assert "How long it took" in page
    assert "<span>61.5 s</span>" in page
    assert "<span>7.2 s</span>" in page
    assert page.count(" s</span>") == 2  # the encoder was there already


def test_each_task_shows_the_scores_that_it_has() -> None:
    from types import SimpleNamespace
    from typing import Any

    from pipelines.chain_report import _rows

    scores = {"dice": {"value": 0.9, "low": 0.8, "high": 1.0}, "iou": {"value": 0.8, "low": None, "high": None}}
    card: Any = SimpleNamespace(provenance=SimpleNamespace(metrics={"test": scores}))
    assert _rows(card) == [("Dice", 0.9, 0.8, 1.0)]
    ap = {"value": 0.4, "low": 0.3, "high": 0.5}
    card.provenance.metrics["test"] = {"mask": {"ap": ap, "ap50": ap}, "box": {"ap": {**ap, "value": 0.45}}}
    assert _rows(card) == [("MaskAP", 0.4, 0.3, 0.5), ("BoxAP", 0.45, 0.3, 0.5)]
    card.provenance.metrics["test"]["mask"] = None  # boxes only
    assert [row[0] for row in _rows(card)] == ["BoxAP"]
