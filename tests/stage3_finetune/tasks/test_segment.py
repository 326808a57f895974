"""The segmentation task: its losses by hand, answers in the image's frame, its folder, and whole runs."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stage3_finetune.train as train
from shared.artifact import Artifact, file_sha256, verify
from shared.backbones import build
from shared.errors import ConfigError, CorruptError
from stage3_finetune.contracts import Batch, Example
from stage3_finetune.export import Preprocessing
from stage3_finetune.rehearse import rehearse
from stage3_finetune.rescore import prediction_faults, rescore
from stage3_finetune.segmentation.drawn import IGNORE
from stage3_finetune.segmentation.predictions import SegmentPredictions
from stage3_finetune.tasks import TASKS
from stage3_finetune.tasks.segment import Segment, SegmentOptions, dice_loss, mean_ce

ARGS = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}
INPUT = Preprocessing(32, 1, (0.5,), (0.25,))


def task(seed: int = 0, **options: object) -> Segment:
    backbone = build("resnet18", in_chans=1, output_stride=16, model_args=ARGS, seed=7)
    chosen = SegmentOptions.model_validate({"width": 8, **options})
    return Segment(chosen, backbone, classes=("a", "b"), preprocessing=INPUT, seed=seed)


def batch(sizes: tuple[tuple[int, int], ...] = ((32, 32), (20, 50), (64, 33))) -> Batch:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 1, 32, 32, generator=generator)
    target = (image[:, 0] * 3).long().clamp(max=2)
    target[:, :3] = IGNORE
    truth = tuple(np.zeros(size, np.uint8) for size in sizes)
    return Batch(image, target, ("x", "y", "z"), truth, sizes, spacing_mm=(None, (1.0, 2.0), None))


def test_the_table_names_it() -> None:
    assert TASKS.load("segment") is Segment


def test_losses_by_hand_and_what_is_ignored_moves_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    target = torch.randint(0, 3, (2, 4, 5), generator=generator)
    target[0, 1] = IGNORE
    p = logits.softmax(dim=1)
    known = target != IGNORE
    picked = [float(p[b, target[b, y, x], y, x].log()) for b, y, x in known.nonzero().tolist()]
    assert float(mean_ce(logits, target)) == pytest.approx(-np.mean(picked), abs=1e-5)

    def soft(which: list[int]) -> float:
        dice = []
        for k in (1, 2):
            area = sum(float(p[b, k][known[b]].sum()) + float((target[b] == k).sum()) for b in which)
            both = sum(float(p[b, k][target[b] == k].sum()) for b in which)
            dice.append((2 * both + 1) / (area + 1))
        return 1 - float(np.mean(dice))

    assert float(dice_loss(logits, target, per_image=False)) == pytest.approx(soft([0, 1]), abs=1e-5)
    assert float(dice_loss(logits, target, per_image=True)) == pytest.approx(np.mean([soft([0]), soft([1])]), abs=1e-5)
    other = logits.clone()
    other[0, :, 1] += torch.randn(3, 5, generator=generator)
    for loss in (mean_ce, lambda a, b: dice_loss(a, b, per_image=False), lambda a, b: dice_loss(a, b, per_image=True)):
        assert torch.allclose(loss(other, target), loss(logits, target))
    nothing = torch.full_like(target, IGNORE)
    assert float(mean_ce(logits, nothing)) == float(dice_loss(logits, nothing, per_image=True)) == 0


def test_weights_of_the_losses_and_that_it_falls() -> None:
    with torch.no_grad():
        both = {key: float(value) for key, value in task().loss(batch()).items()}
        dice = task(cross_entropy_weight_milli=0, dice_weight_milli=500).loss(batch())
    assert both["loss"] == pytest.approx(both["dice_loss"] + both["cross_entropy"], rel=1e-5)
    assert float(dice["loss"]) == pytest.approx(both["dice_loss"] / 2, rel=1e-5)
    one = task()
    one.model.train()
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss = one.loss(batch())["loss"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.6 * both["loss"]


def test_the_encoder_is_kept_and_the_head_is_what_is_new() -> None:
    encoder = build("resnet18", in_chans=1, output_stride=16, model_args=ARGS, seed=7).model.state_dict()
    state = task().model.state_dict()
    assert {name for name in state if name not in task().head} == {f"encoder.{name}" for name in encoder}
    assert all(torch.equal(state[f"encoder.{name}"], value) for name, value in encoder.items())


def test_answers_are_in_the_frame_of_each_image() -> None:
    one = task()
    one.model.eval()
    with torch.no_grad():
        answers = one.predict(batch())
        logits = one._logits(batch())
    assert [answer.label.shape for answer in answers] == [(32, 32), (20, 50), (64, 33)]
    np.testing.assert_array_equal(answers[0].label, logits[0].argmax(dim=0).numpy())
    assert answers[1].spacing_mm == (1.0, 2.0)
    # A model that draws what it sees draws it where it is, whatever the image's size.
    one._logits = lambda given: torch.cat([0.5 - given.image, given.image - 0.5, -9 + 0 * given.image], dim=1) * 50
    image = torch.zeros(3, 1, 32, 32)
    image[:, :, 8:, 16:] = 1
    drawn = one.predict(replace(batch(((32, 32), (64, 96), (16, 8))), image=image))
    for answer, (top, left) in zip(drawn, ((8, 16), (16, 48), (4, 4)), strict=True):
        expected = np.zeros(answer.label.shape, np.uint8)
        expected[top:, left:] = 1
        np.testing.assert_array_equal(answer.label, expected)


def test_answers_without_truth_are_not_scored() -> None:
    one = task()
    with torch.no_grad():
        answers = one.predict(replace(batch(), truth=(None, None, None), spacing_mm=()))
    with pytest.raises(ValueError, match="without its truth"):
        one.collect([Example("x", "l", "g")] * 3, answers)


def test_a_folder_gives_the_same_model_back_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    one = task(ignore=[9])
    with torch.no_grad():
        for value in one.model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape) * 0.1)
    one.model.eval()
    one.export(tmp_path / "model")
    back = Segment.restore(tmp_path / "model")
    assert (back.classes, back.preprocessing, back.options) == (one.classes, one.preprocessing, one.options)
    with torch.no_grad():
        assert torch.equal(back._logits(batch()), one._logits(batch()))
        assert back.predict(batch()) == one.predict(batch())
    path = tmp_path / "model/config.json"
    config = path.read_text()
    for old, new in (
        ('"segment"', '"classify"'),
        ('"input_size"', '"size"'),
        ('"width": 8', '"width": 16'),
        ("{", "["),
    ):
        path.write_text(config.replace(old, new, 1))
        with pytest.raises(CorruptError, match="model"):
            Segment.restore(tmp_path / "model")


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright discs on dark noise, 40 x 48 px, with targets; eight groups of two."""
    folder = tmp_path_factory.mktemp("discs")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:48]
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "target", "group", "split"])
        for number in range(16):
            disc = (y - noise.integers(12, 28)) ** 2 + (x - noise.integers(12, 36)) ** 2 < noise.integers(6, 11) ** 2
            pixels = np.clip(noise.normal(60, 20, (40, 48)) + 120 * disc, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{number:02d}.png")
            values = np.where(disc, np.uint8(255), np.uint8(0))
            values[:2] = 127
            Image.fromarray(values).save(folder / f"{number:02d}.png")
            split = "train" if number < 10 else "val" if number < 12 else "test"
            writer.writerow([f"{number:02d}.png", f"{number:02d}.png", f"g{number // 2}", split])
    return folder


@pytest.fixture
def run(discs: Path, quick, tmp_path: Path) -> Callable[..., Artifact]:
    def go(out: str = "out", **changes: object) -> Artifact:
        return train.finetune(
            settings(quick, **changes), images=discs / "images", labels=discs / "labels.csv", encoder=None,
            out=tmp_path / out,
        )  # fmt: skip

    return go


def settings(quick, **changes: object):
    base = {
        "task": "segment", "options": {"values": {"disc": 255}, "ignore": [127], "width": 8}, "backbone": "resnet18",
        "backbone_options": {"output_stride": 16, **ARGS}, "batch_size": 5,
    }  # fmt: skip
    return quick(**{**base, **changes})


def test_a_run_learns_what_can_be_seen_and_is_scored_again_from_its_file(run, tmp_path: Path) -> None:
    made = run(epochs=14, lr=1e-2)
    card = made.card
    assert verify(made.path, card) == []
    assert (card.identity.outputs["classes"], card.identity.outputs["test"]) == (1, 4)
    assert card.provenance.metrics["test"]["dice"]["value"] > 0.85
    assert card.provenance.metrics["test"]["groups"] == 2
    assert rescore(made.path, card) == []
    assert list(prediction_faults(made.path, card)) == []
    predictions = SegmentPredictions.load(made.path / "predictions.jsonl.gz")
    assert predictions.rows[0].truth.size_px == (40, 48)
    assert predictions.rows[0].truth.ignore is not None
    report = (made.path / "report.html").read_text()
    assert "Lowest Dice of the test part" in report
    assert "4 samples in 2 groups" in report
    back = Segment.restore(made.path / "model")
    assert back.preprocessing == Preprocessing(32, 1, (0.5,), (0.25,))
    first = predictions.rows[0]
    forged = replace(predictions, rows=(replace(first, answer=predictions.rows[1].answer), *predictions.rows[1:]))
    (made.path / "predictions.jsonl.gz").unlink()
    forged.write(made.path / "predictions.jsonl.gz")
    assert [fault for _, fault in prediction_faults(made.path, card)] == ["other predictions than the artifact's id"]
    assert any("dice" in line for line in rescore(made.path, card))


def test_ids_depend_on_what_matters_only(run, discs: Path) -> None:
    first = run("a").card.artifact_id
    path = discs / "00.png"
    before = path.read_bytes()
    Image.open(path).save(path, compress_level=0)
    assert file_sha256(path) != file_sha256(discs / "01.png")
    assert run("b", loader_workers=1, cache_mib=0).card.artifact_id == first
    path.write_bytes(before)
    named = {"values": {"disc": 255}, "ignore": [127], "width": 8}
    assert run("c", options={**named, "dice_over": "image"}).card.artifact_id != first


def test_a_dry_run_tries_it(discs: Path, quick, tmp_path: Path) -> None:
    forecast, resolved = rehearse(
        settings(quick), images=discs / "images", labels=discs / "labels.csv", encoder=None, out=tmp_path / "x"
    )
    assert forecast.seconds > 0
    assert resolved.options["dice_over"] == "batch"
    assert not (tmp_path / "x").exists()


def test_bad_targets_are_refused_before_anything_is_written(run, discs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="value 127 in 16 targets"):
        run(options={"values": {"disc": 255}})
    assert not (tmp_path / "out").exists()
