"""finetune with the detection task: from labels of every form to a published model whose scores can be had again."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import stage3_finetune.train as train
from shared.artifact import Artifact, read_card, verify
from shared.errors import InterruptedRun
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.rescore import prediction_faults, rescore
from stage3_finetune.tasks.detect import Detect

from .scenes import write_coco, write_images, write_table

SMALL = {"width": 16, "head_width": 32, "mask_width": 16, "proposals": 20, "candidates": 50, "sampled": 16}
Run = Callable[..., Artifact]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def run(images, tmp_path) -> Run:
    def go(labels: Path, out: str = "out", **changes: object) -> Artifact:
        base: dict[str, object] = {
            "task": "detect",
            "options": SMALL,
            "backbone": "test_resnet",
            "size_px": 64,
            "epochs": 2,
            "warmup_epochs": 0,
            "batch_size": 4,
            "threads": 1,
            "device": "cpu",
            "resamples": 100,
        }
        config = FinetuneConfig.model_validate({**base, **changes})
        return train.finetune(config, images=images, labels=labels, encoder=None, out=tmp_path / out)

    return go


def test_a_run_on_index_maps_publishes_masks_that_are_scored_again(run, tmp_path) -> None:
    made = run(write_table(tmp_path / "p.csv", ".png"), classes=["square"])
    card = read_card(made.path, "model")
    assert verify(made.path, card) == []
    assert card.identity.spec["config"]["options"]["masks"] is True
    assert (card.identity.outputs["train"], card.identity.outputs["test"]) == (8, 4)
    assert {path.name for path in made.path.iterdir()} == {
        "artifact.json",
        "model",
        "predictions.jsonl",
        "predictions_best_on_val.jsonl",
        "report.html",
        "resolved.yaml",
        "run",
    }
    assert rescore(made.path, card) == []
    assert list(prediction_faults(made.path, card)) == []
    metrics = card.provenance.metrics["test"]
    assert 0 <= metrics["mask"]["ap"]["value"] <= 1
    assert list(metrics["box"]["ap_by_class"]) == ["square"]
    report = (made.path / "report.html").read_text()
    assert "Average precision by class" in report
    assert "Most wrong" in report
    assert Detect.restore(made.path / "model").classes == ("square",)
    path = made.path / "predictions.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[-2])
    row["truth"][0]["box_xyxy_px"][0] += 1
    path.write_text("\n".join([*lines[:-2], json.dumps(row), lines[-1]]) + "\n")
    assert [fault for _, fault in prediction_faults(made.path, card)] == [
        "other labels, groups or parts than the artifact's id",
        "other labels, groups or parts than predictions.jsonl",
    ]


def test_boxes_of_voc_and_coco_train_a_box_detector(run, tmp_path) -> None:
    voc = run(write_table(tmp_path / "x.csv", ".xml"), "voc")
    coco = run(write_coco(tmp_path / "c.json", outlines=False), "coco")
    for made in (voc, coco):
        assert made.card.identity.spec["config"]["options"]["masks"] is False
        assert made.card.provenance.metrics["test"]["mask"] is None
        assert list(made.card.provenance.metrics["test"]["things"]) == ["bright", "dim"]


def test_a_run_that_was_interrupted_ends_with_the_same_id(run, tmp_path, monkeypatch) -> None:
    labels = write_table(tmp_path / "p.csv", ".png")
    expected = run(labels, "whole")

    loss = Detect.loss

    def stopping(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Detect, "loss", stopping)
        with pytest.raises(InterruptedRun):
            run(labels, "cut")
    torch.rand(3)  # what the process drew beside does not matter
    assert run(labels, "cut").card.artifact_id == expected.card.artifact_id
