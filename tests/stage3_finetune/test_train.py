"""finetune: what it publishes, what it refuses, that it continues, and that test is touched once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import stage3_finetune.run as run_parts
import stage3_finetune.train as train
from shared.artifact import Artifact, publish, read_card, verify
from shared.backbones import build
from shared.checkpoint import latest_state
from shared.errors import ConfigError, CorruptError, IncompatibleError, InputMissingError, SpecMismatchError
from shared.images import find_sources, read_image
from shared.runlog import read_metrics
from stage3_finetune.data import Part
from tests.shared.event_files import points

from .conftest import BACKBONE, CLASSES, rows

Run = Callable[..., Artifact]


@pytest.fixture
def run(images, table, quick, tmp_path) -> Run:
    def go(encoder: Path | None = None, out: str = "out", labels: Path | None = None, **changes: object) -> Artifact:
        return train.finetune(
            quick(**changes),
            images=images,
            labels=labels or table(),
            encoder=str(encoder) if encoder else None,
            out=tmp_path / out,
        )

    return go


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def test_publishes_a_model_that_timm_loads_and_that_predicts_what_the_table_says(run, images, encoder) -> None:
    made = run(encoder, epochs=3)
    card = read_card(made.path, "model")
    assert verify(made.path, card) == []
    assert [(item.role, item.kind) for item in card.identity.inputs] == [("encoder", "encoder")]
    assert card.identity.inputs[0].artifact_id == read_card(encoder).artifact_id
    outputs = card.identity.outputs
    assert (outputs["train"], outputs["val"], outputs["test"], outputs["classes"]) == (36, 9, 9, 3)
    assert {path.name for path in made.path.iterdir()} == {
        "artifact.json",
        "model",
        "predictions.csv",
        "predictions_best_on_val.csv",
        "report.html",
        "resolved.yaml",
        "run",
    }
    report = (made.path / "report.html").read_text()
    assert "9 samples in 3 groups" in report
    assert "best on val, epoch" in report

    model = timm.create_model(f"local-dir:{made.path / 'model'}", pretrained=True).eval()
    assert list(model.pretrained_cfg["label_names"]) == list(CLASSES)
    stored = json.loads((made.path / "model/config.json").read_text())["pretrained_cfg"]
    assert (stored["mean"], stored["std"], stored["input_size"]) == ([0.4], [0.3], [1, 32, 32])
    lines = (made.path / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 18
    sources = {source.sample_id: source for source in find_sources(images)}
    for line in (lines[1], lines[-1]):
        sample_id, _, _, label, predicted, *cells = line.split(",")
        pixels = torch.from_numpy(read_image(sources[sample_id]).pixels)[None]
        small = torch.nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", antialias=True)
        with torch.no_grad():
            probability = model((small - 0.4) / 0.3).softmax(dim=1)[0].numpy()
        np.testing.assert_allclose(probability, np.array(cells, np.float32), atol=1e-5)
        assert predicted == CLASSES[int(probability.argmax())]
        assert sample_id.startswith(label)


def test_learns_what_can_be_seen(run) -> None:
    made = run(epochs=12, lr=3e-3, augment={"brightness_milli": 0, "contrast_milli": 0})
    metrics = made.card.provenance.metrics
    assert metrics["test"]["accuracy"]["value"] == 1.0
    assert metrics["test"]["auroc"]["value"] == 1.0
    assert metrics["test"]["groups"] == 3
    assert metrics["best_on_val"]["epoch"] <= 12
    val = [row for row in read_metrics(made.path) if "val_auroc" in row]
    assert [row["epoch"] for row in val] == list(range(1, 13))


def test_an_encoder_changes_the_start_and_freezing_keeps_it(run, encoder) -> None:
    before = build(BACKBONE, in_chans=1, seed=12345).model.state_dict()
    full, frozen, scratch = (
        run(encoder, "full"), run(encoder, "frozen", freeze=True), run(None, "scratch")
    )  # fmt: skip
    assert all(torch.equal(weights(frozen.path)[name], value) for name, value in before.items())
    assert not any(torch.equal(weights(full.path)[name], v) for name, v in before.items() if "conv1.weight" in name)
    assert frozen.card.identity.outputs["tensors_kept"] == len(before)
    assert scratch.card.identity.outputs["tensors_kept"] == 0
    assert scratch.card.identity.inputs == ()
    assert len({made.card.artifact_id for made in (full, frozen, scratch)}) == 3
    assert set(weights(scratch.path)) == set(weights(full.path))


def test_ids_depend_on_what_matters_only(run, table, tmp_path) -> None:
    expected = run(out="a").card.artifact_id
    assert run(out="b", loader_workers=1, cache_mib=0, save_every_s=0.001).card.artifact_id == expected
    assert run(out="c", labels=table(rows()[::-1])).card.artifact_id == expected
    assert run(out="d", seed=1).card.artifact_id != expected
    assert run(out="e", labels=table(rows()[1:])).card.artifact_id != expected


def test_done_is_done_and_another_specification_is_refused(run) -> None:
    made = run()
    assert run().card == made.card
    with pytest.raises(SpecMismatchError, match=r"spec\.config\.lr"):
        run(lr=0.1)
    with pytest.raises(SpecMismatchError, match=r"spec\.labels\.sha256"):
        run(labels=None, classes=list(CLASSES[::-1]))


def test_fresh_keeps_the_old_run_aside(run, quick, images, table, tmp_path) -> None:
    first = run().card.artifact_id
    made = train.finetune(quick(seed=1), images=images, labels=table(), encoder=None, out=tmp_path / "out", fresh=True)
    assert made.card.artifact_id != first
    assert read_card(tmp_path / "out.old-1").artifact_id == first
    with pytest.raises(InputMissingError):
        train.finetune(
            quick(), images=images, labels=tmp_path / "no.csv", encoder=None, out=tmp_path / "out", fresh=True
        )
    assert read_card(tmp_path / "out").artifact_id == made.card.artifact_id  # nothing is moved for a run that cannot be


def test_test_is_opened_after_training_and_never_again(run, monkeypatch, tmp_path) -> None:
    opened: list[str] = []
    asked: list[Part] = []

    class Watched(Part):
        def __init__(self, examples, *others, **more) -> None:
            super().__init__(examples, *others, **more)
            opened.append({example.split for example in examples}.pop())

    fit = train.fit

    def watched_fit(*arguments, **more):
        result = fit(*arguments, **more)
        opened.append("trained")
        return result

    monkeypatch.setattr(run_parts, "Part", Watched)
    predict = run_parts.Run.predict
    monkeypatch.setattr(run_parts.Run, "predict", lambda self, part: asked.append(part) or predict(self, part))
    monkeypatch.setattr(train, "fit", watched_fit)
    with monkeypatch.context() as broken:
        broken.setattr(train, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert opened == ["train", "val", "trained", "test"]
    test = [part for part in asked if part.examples[0].split == "test"]
    assert asked[-2:] == test  # after training: the last epoch, then best on val
    asked.clear()
    opened.clear()
    torn = tmp_path / "out" / ".predictions.csv.1.tmp"
    torn.touch()
    finished = run()
    assert not torn.exists()
    assert opened[:3] == ["train", "val", "trained"]  # then the images of the worst cases, if any is wrong
    assert asked == []
    assert finished.card.artifact_id == run(out="uninterrupted").card.artifact_id


def test_predictions_of_another_run_are_not_published(run, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(train, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run()
    path = tmp_path / "out" / "predictions.csv"
    path.write_text(path.read_text().replace("dark12.png", "dark99.png"))
    with pytest.raises(CorruptError, match="not the predictions of this run"):
        run()


def test_without_a_val_part_there_is_no_best(run, table) -> None:
    made = run(labels=table([row for row in rows() if row["split"] != "val"]))
    assert "best_on_val" not in made.card.provenance.metrics
    assert not (made.path / "predictions_best_on_val.csv").exists()


def test_splits_by_group_where_the_table_has_none(run, table) -> None:
    made = run(labels=table(columns=("sample_id", "label", "group")), val_milli=150, test_milli=200)
    outputs = made.card.identity.outputs
    assert (outputs["train"], outputs["val"], outputs["test"]) == (36, 9, 9)
    groups = {line.split(",")[1] for line in (made.path / "predictions.csv").read_text().splitlines()[1:]}
    assert len(groups) == 6


def test_bad_inputs_leave_no_folder(run, table, encoder, tmp_path) -> None:
    with pytest.raises(InputMissingError, match="labels"):
        run(labels=tmp_path / "absent.csv")
    with pytest.raises(InputMissingError, match="not among the images"):
        run(labels=table([*rows(), {"sample_id": "no.png", "label": "dark", "group": "g", "split": "train"}]))
    with pytest.raises(InputMissingError, match="no such artifact"):
        run(tmp_path / "absent")
    with pytest.raises(IncompatibleError, match="pinned"):
        run(Path(f"{encoder}@sha256:{'0' * 64}"))
    with pytest.raises(ConfigError, match="backbone: resnet18, the encoder's is test_resnet"):
        run(encoder, backbone="resnet18")
    with pytest.raises(ConfigError, match="channels: 3, the encoder's is 1"):
        run(encoder, channels=3)
    with pytest.raises(ConfigError, match="unknown backbone 'resnet19'"):
        run(backbone="resnet19")
    with pytest.raises(ConfigError, match="freeze"):
        run(freeze=True)
    with pytest.raises(ConfigError, match=r"label_smoothing: unknown key. Did you mean 'label_smoothing_milli'"):
        run(options={"label_smoothing": 0.1})
    with pytest.raises(ConfigError, match="unknown task 'detekt'"):
        run(task="detekt")
    with pytest.raises(ConfigError, match="threads: 100000, expected 1 to"):
        run(threads=100_000)
    assert not (tmp_path / "out").exists()


def test_another_kind_of_artifact_is_no_encoder(run, tmp_path) -> None:
    (tmp_path / "other").mkdir()
    publish(tmp_path / "other", kind="corpus", inputs=(), spec={}, outputs={})
    with pytest.raises(IncompatibleError, match="found kind 'corpus', expected kind 'encoder'") as caught:
        run(tmp_path / "other")
    assert caught.value.exit_code == 5


def test_a_flipped_bit_in_the_encoder_is_found(run, encoder, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(encoder, copy)
    path = copy / "encoder/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"encoder/model.safetensors is not what was published"):
        run(copy)


KILLER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import shared.loop as loop, stage3_finetune.train as train
from stage3_finetune.config import FinetuneConfig
moment, number, config, images, labels, encoder, out = sys.argv[1:]
module = loop if moment == "save_state" else train
real, seen = getattr(module, moment), []
def killer(*arguments, **more):
    if moment == "publish":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **more)
    seen.append(1)
    if len(seen) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, moment, killer)
train.finetune(FinetuneConfig.model_validate_json(config), images=Path(images), labels=Path(labels), encoder=encoder,
               out=Path(out))
"""


@pytest.mark.slow
def test_kill_9_five_times_and_the_id_is_the_uninterrupted_ones(run, quick, images, table, encoder, tmp_path) -> None:
    settings = quick(epochs=3, save_every_s=0.001)
    moments = [("save_state", 1), ("save_state", 3), ("_predict_once", 1), ("write_report", 1), ("publish", 1)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    states = []
    for moment, number in moments:
        arguments = [settings.model_dump_json(), images, table(), encoder, tmp_path / "killed"]
        killed = subprocess.run(
            [sys.executable, "-c", KILLER, moment, str(number), *map(str, arguments)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert killed.returncode == -9, killed.stderr
        assert not (tmp_path / "killed/artifact.json").exists()
        found = latest_state(tmp_path / "killed/run/state")
        assert found is not None
        states.append(found[0])
    assert states == [1, 4, 9, 9, 9]
    interrupted = train.finetune(settings, images=images, labels=table(), encoder=str(encoder), out=tmp_path / "killed")
    whole = run(encoder, "whole", epochs=3)
    assert interrupted.card.artifact_id == whole.card.artifact_id
    steps = [row["step"] for row in read_metrics(interrupted.path) if "loss" in row]
    assert steps == list(range(1, 10))
    shown, other = points(interrupted.path), points(whole.path)
    assert [step for step, _ in shown["loss"]] == steps
    assert shown["val_auroc"] == other["val_auroc"] != []
