"""Probes: features computed once give the result of the slow way; neighbours vote; heads come back from disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import interpolate

import stage3_finetune.features as features
import stage3_finetune.run as run_parts
import stage3_finetune.train as train
from shared.artifact import Artifact
from shared.errors import ConfigError, CorruptError
from shared.images import find_sources, read_image
from shared.runlog import read_metrics
from stage3_finetune.contracts import Batch
from stage3_finetune.data import plain_order
from stage3_finetune.heads import Neighbours
from stage3_finetune.predictions import ClassPredictions
from stage3_finetune.tasks.classify import Classify

Run = Callable[..., Artifact]


@pytest.fixture
def run(images: Path, table: Callable[..., Path], quick: Callable[..., Any], encoder: Path, tmp_path: Path) -> Run:
    def go(out: str = "out", start: Path | None = encoder, **changes: object) -> Artifact:
        settings = quick(**{"backbone": "auto", "freeze": True, "lr": 0.02, **changes})
        given = str(start) if start else None
        return train.finetune(settings, images=images, labels=table(), encoder=given, out=tmp_path / out)

    return go


def predicted(made: Artifact) -> ClassPredictions:
    return ClassPredictions.load(made.path / "predictions.csv")


@pytest.mark.parametrize("head", ["linear", "attention"])
def test_features_computed_once_give_what_the_slow_way_gives(head: str, run: Run, monkeypatch) -> None:
    seen: list[int] = []
    embed = Classify.embed

    def watched(self: Classify, image: torch.Tensor) -> torch.Tensor:
        seen.append(len(image))
        return embed(self, image)

    # Adam makes much of the last bits of small gradients, of which attention has some.
    options, lr, tolerance = {"head": head}, *((0.02, 1e-5) if head == "linear" else (0.002, 1e-3))
    with monkeypatch.context() as patched:
        patched.setattr(Classify, "embed", watched)
        fast = run("fast", options=options, epochs=4, lr=lr)
    assert sum(seen) == 54  # each image of three parts, once
    with monkeypatch.context() as patched:
        patched.setattr(run_parts.Run, "keeps_features", property(lambda self: False))
        slow = run("slow", options=options, epochs=4, lr=lr)
    np.testing.assert_allclose(predicted(fast).probability, predicted(slow).probability, atol=tolerance)
    losses = [[row["loss"] for row in read_metrics(made.path) if "loss" in row] for made in (fast, slow)]
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], atol=tolerance)
    assert predicted(fast).probability.std() > 0.01
    assert set(fast.card.identity.outputs) == set(slow.card.identity.outputs)


def test_features_that_memory_does_not_hold_lie_in_a_file_and_change_nothing(run: Run, monkeypatch) -> None:
    maps: list[object] = []
    memmap = np.memmap
    monkeypatch.setattr(features.np, "memmap", lambda *a, **k: maps.append(a) or memmap(*a, **k))
    first, other = run("a", cache_mib=64), run("b", cache_mib=0, loader_workers=0)
    assert len(maps) == 3
    assert first.card.artifact_id == other.card.artifact_id
    assert not list((other.path / "run").glob("tmp*"))


def test_augmented_images_are_seen_anew_and_unless_asked_a_frozen_encoder_sees_none(run: Run) -> None:
    plain, augmented = run("plain"), run("augmented", augment={"use": True})
    told = [(made.path / "run/run.log").read_text() for made in (plain, augmented)]
    assert "computed once" in told[0]
    assert "computed once" not in told[1]
    assert plain.card.identity.spec["config"]["augment"]["use"] is False


def test_neighbours_vote_as_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    known, asked = (generator.normal(size=(count, 5)).astype(np.float32) for count in (40, 12))
    label = generator.integers(0, 3, 40)
    neighbours = Neighbours(7, 0.07)
    neighbours.remember(torch.from_numpy(known), torch.eye(3)[torch.from_numpy(label)])
    expected = KNeighborsClassifier(7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected.fit(known, label)
    np.testing.assert_allclose(neighbours(torch.from_numpy(asked)).numpy(), expected.predict_proba(asked), atol=1e-5)


def test_knn_makes_no_step_chooses_k_on_val_and_comes_back(run: Run, images: Path) -> None:
    made = run(options={"head": "knn"}, freeze=False)
    spec, outputs = made.card.identity.spec["config"], made.card.identity.outputs
    assert spec["freeze"] is True
    assert outputs["k"] in (1, 5, 10, 20)
    assert not (made.path / "run/state").exists()
    assert {"val", "test"} <= set(made.card.provenance.metrics)
    assert made.card.provenance.metrics["test"]["accuracy"]["value"] > 0.5
    assert run("three", options={"head": "knn", "k": 3}).card.identity.outputs["k"] == 3
    check_loaded(made, images)


def test_an_attention_head_comes_back_and_timm_refuses_it(run: Run, images: Path) -> None:
    made = run(options={"head": "attention"})
    check_loaded(made, images)
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{made.path / 'model'}", pretrained=True, num_classes=0)


def check_loaded(made: Artifact, images: Path) -> None:
    """The published folder predicts what the published table says."""
    opened, table = Classify.restore(made.path / "model"), predicted(made)
    assert opened.classes == table.classes
    sources = {source.sample_id: source for source in find_sources(images)}
    pixels = [torch.from_numpy(read_image(sources[row.sample_id]).pixels)[None] for row in table.examples]
    small = torch.cat([interpolate(one, size=(32, 32), mode="bilinear", antialias=True) for one in pixels])
    count = len(small)
    batch = Batch(small, None, ("",) * count, (None,) * count, ((40, 40),) * count)
    with torch.no_grad():
        np.testing.assert_allclose(opened.predict(batch), table.probability, atol=1e-5)


def test_what_contradicts_a_probe_is_refused(run: Run, tmp_path: Path) -> None:
    for changes, says in (
        ({"options": {"head": "knn", "mixup_milli": 200}}, "mixup_milli: for training"),
        ({"options": {"head": "knn"}, "augment": {"use": True}}, "augment.use: for training"),
        ({"options": {"head": "knn", "k": 1000}}, "options.k: 1000, but there are 36 training images"),
        ({"options": {"head": "knn", "k": 0}}, "options.k: 0, expected 1 or more"),
        ({"options": {"k": 3}}, "options.k: 3, but the head is 'linear'"),
        ({"options": {"head": "knn"}, "start": None}, "frozen encoder with random weights"),
        ({"options": {"head": "attention"}, "start": None}, "frozen encoder with random weights"),
        ({"options": {"multi_label": True}}, "multi_label: True, but the labels' column is 'label'"),
        ({"options": {"head": "nearest"}}, "head: expected 'linear', 'attention' or 'knn'"),
    ):
        with pytest.raises(ConfigError, match=says):
            run("refused", **changes)


def test_a_damaged_head_is_no_classifier(run: Run) -> None:
    folder = run(options={"head": "attention"}).path / "model"
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"head": "attention"', '"head": 3')
    )
    with pytest.raises(CorruptError, match=r"config\.json: "):
        Classify.restore(folder)


def test_the_order_of_batches_does_not_change_features(run: Run, monkeypatch) -> None:
    kept: list[Any] = []
    real = run_parts.FeaturePart
    monkeypatch.setattr(run_parts, "FeaturePart", lambda *a, **k: kept.append(real(*a, **k)) or kept[-1])
    run()
    part = kept[0]
    once = torch.cat([batch.features for batch in part.batches(plain_order(len(part), 7))])
    turned = torch.cat([batch.features for batch in part.batches([(0, [index]) for index in range(len(part))][::-1])])
    assert torch.equal(once, turned.flip(0))
    assert replace(next(part.batches([(3, [1])])), features=None).epoch == 3
