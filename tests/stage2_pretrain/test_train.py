"""`pretrain` from end to end: one id however it was cut off, witnesses that draw again, nothing silent."""

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from shared.artifact import Artifact, read_card, verify
from shared.backbones import load_encoder
from shared.checkpoint import latest_state
from shared.config import load
from shared.errors import ConfigError, CorruptError, InputMissingError, InterruptedRun, SpecMismatchError, UsageError
from shared.regions import open_region_store
from shared.runlog import read_metrics, read_timings
from stage2_pretrain import train
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.kernels import choice
from stage2_pretrain.masking.sampler import MaskSampler
from stage2_pretrain.pictures import read_examples
from stage2_pretrain.redraw import redraw_one
from stage2_pretrain.run import prepare, resolve
from stage2_pretrain.train import pretrain
from stage2_pretrain.witness import pack, read_witnesses, redraw
from tests.shared.event_files import pictures, points
from tests.stage2_pretrain.stores import write_discs, write_store

ROOT = Path(__file__).parents[2]
COUNT, EPOCHS = 9, 4
RECIPE = {
    "method": {"name": "spark", "decoder_width": 32},
    "backbone": "resnet18",
    "backbone_options": {"output_stride": 16, "layers": [1, 1, 1, 1], "channels": [8, 8, 12, 12]},
    "size_px": 64,
    "epochs": EPOCHS,
    "batch_size": 4,
    "warmup_epochs": 1,
    "lr": 0.003,
    "threads": 1,
    "device": "cpu",
    "save_every_steps": 2,
    "pictures": 2,
}
STEPS = EPOCHS * 2


def config(**changes) -> PretrainConfig:
    return load(PretrainConfig, {**RECIPE, **changes})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_discs(folder / "images", COUNT)
    write_store(folder / "images", folder / "regions", quarantined=(5,))
    return folder


def run(corpus: Path, out: Path, **changes) -> Artifact:
    return pretrain(config(**changes), images=corpus / "images", regions=str(corpus / "regions"), out=out)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory) -> Artifact:
    return run(corpus, tmp_path_factory.mktemp("whole") / "out")


def test_what_is_published(whole: Artifact, corpus: Path) -> None:
    assert not verify(whole.path, whole.card)
    names = {path.name for path in whole.path.iterdir()}
    assert names == {
        "artifact.json",
        "encoder",
        "report.html",
        "resolved.yaml",
        "run",
        "witnesses.json",
        "witnesses.safetensors",
        "examples.safetensors",
    }
    identity = whole.card.identity
    assert (identity.kind, identity.inputs[0].role) == ("encoder", "regions")
    assert identity.inputs[0].artifact_id == read_card(corpus / "regions").artifact_id
    assert identity.spec["numeric"] == {"device": "cpu", "dtype": "float32", "threads": 1}
    assert identity.spec["mask"]["policy"]["options"]["hide_inside"] == 800
    outputs = identity.outputs
    assert (outputs["samples"], outputs["absent"], outputs["draws"]) == (COUNT - 1, 1, EPOCHS * (COUNT - 1))
    assert outputs["witness_draws"] == outputs["draws"]
    resolved = yaml.safe_load((whole.path / "resolved.yaml").read_text())
    assert resolved["impl"] == "cpu"
    assert resolved["policy"]["overall"] == 600
    assert load(PretrainConfig, whole.path / "resolved.yaml") == config(
        impl="cpu",
        loader_workers=0,
        method={**RECIPE["method"], "decoder": "published", "patch_px": None, "execution": "packed"},
    )
    report = (whole.path / "report.html").read_text()
    assert report.count("reconstruction") >= 2
    assert "1 samples of the region store have no maps" in report
    assert str(corpus) not in report + (whole.path / "run/run.log").read_text()


def test_the_encoder_is_timms_and_learned_something(whole: Artifact) -> None:
    theirs = timm.create_model(f"local-dir:{whole.path / 'encoder'}", pretrained=True).eval()
    ours = load_encoder(whole.path / "encoder")
    image = torch.rand(1, 1, 64, 64)
    assert torch.equal(theirs(image), ours.model.eval()(image))
    assert theirs(image).shape == (1, 12)
    assert whole.card.provenance.metrics["loss_last_epoch"] < whole.card.provenance.metrics["loss_first_epoch"]
    assert ours.model.bn1.num_batches_tracked == STEPS


def test_every_mask_draws_again(whole: Artifact, corpus: Path) -> None:
    found = redraw(open_region_store(corpus / "regions"), whole.card.identity.spec, whole.path)
    assert (found.checked, found.draws, found.mismatches) == (EPOCHS * (COUNT - 1), EPOCHS * (COUNT - 1), ())


def test_epochs_tell_what_was_hidden(whole: Artifact) -> None:
    rows = [row for row in read_metrics(whole.path) if "epoch" in row]
    assert [(row["epoch"], row["step"]) for row in rows] == [(e, e * 2) for e in range(1, EPOCHS + 1)]
    for row in rows:
        assert row["hidden_share"] == 10 / 16  # 600 thousandths of 16 patches, rounded
        assert row["hidden_inside_share"] > row["hidden_outside_share"]


def test_epochs_tell_how_fast_they_were_and_the_report_draws_it(whole: Artifact) -> None:
    rows = read_timings(whole.path)
    assert [(row["epoch"], row["step"]) for row in rows] == [(e, e * 2) for e in range(1, EPOCHS + 1)]
    assert all(row["images_per_s"] > 0 and 0 <= row["data_wait_share"] < 1 for row in rows)
    found = points(whole.path)
    for name in ("images_per_s", "data_wait_share"):
        assert found[name] == [(row["step"], np.float32(row[name])) for row in rows]
    report = (whole.path / "report.html").read_text()
    for label in ("images a second", "time lost to data, %"):
        assert f"{label} over epoch" in report


def same_events(out: Path, other: Path) -> None:
    """TensorBoard shows the same points and pictures of both runs, but for how fast they were."""
    one, two = points(out), points(other)
    for name in ("img_per_s", "images_per_s", "data_wait_share"):
        assert [step for step, _ in one.pop(name)] == [step for step, _ in two.pop(name)]
    assert one == two
    (strip,) = pictures(out)
    for (step, mine), (theirs, shown) in zip(pictures(out)[strip], pictures(other)[strip], strict=True):
        assert step == theirs
        assert np.array_equal(mine, shown)


def test_tensorboard_shows_the_run_and_changes_nothing(
    whole: Artifact, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = points(whole.path)
    for name in ("loss", "lr", "grad_norm", "img_per_s"):
        assert [step for step, _ in found[name]] == [*range(1, STEPS + 1)]
    losses = [np.float32(row["loss"]) for row in read_metrics(whole.path) if "loss" in row]
    assert [value for _, value in found["loss"]] == losses
    assert [step for step, _ in found["hidden_inside_share"]] == [2, 4, 6, 8]
    (strip,) = pictures(whole.path).values()
    assert [step for step, _ in strip] == [2, 4, 8]
    first, last = strip[0][1], strip[-1][1]
    assert first.shape == (3 * 224, 4 * 224, 3)
    image, _, mask, drawn = np.split(last[:224], 4, axis=1)
    assert not np.array_equal(image, drawn)
    assert not np.array_equal(image, mask)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    assert run(corpus, tmp_path / "out").card.artifact_id == whole.card.artifact_id
    assert not (tmp_path / "out/run/tb").exists()


def test_again_is_done_and_another_spec_is_refused(whole: Artifact, corpus: Path) -> None:
    before = (whole.path / "artifact.json").stat().st_mtime_ns
    assert run(corpus, whole.path, pictures=0, save_every_s=5.0).card == whole.card  # runtime fields do not matter
    assert (whole.path / "artifact.json").stat().st_mtime_ns == before
    with pytest.raises(SpecMismatchError, match=r"spec\.lr"):
        run(corpus, whole.path, lr=0.004)
    with pytest.raises(SpecMismatchError, match="hide_inside"):
        run(corpus, whole.path, policy={"name": "region", "hide_inside": 700})


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import shared.loop as loop
from stage2_pretrain import train
from tests.stage2_pretrain.test_train import run
def killed(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
save = loop.save_state
def save_and_die(folder, step, *args, **options):
    save(folder, step, *args, **options)
    if step >= int(sys.argv[3]):
        killed()
if sys.argv[3].isdigit():
    loop.save_state = save_and_die
else:
    setattr(train, sys.argv[3], killed)
run(Path(sys.argv[1]), Path(sys.argv[2]), **json.loads(sys.argv[4]))
"""


def test_a_lost_metrics_line_moves_no_epoch() -> None:
    losses = {2: 4.0, 3: 2.0, 4: 1.0}  # of two epochs of two steps; the first line was lost
    assert [train._epoch_loss(losses, epoch, 2) for epoch in (1, 2, 3)] == [4.0, 1.5, None]


def run_and_die(corpus: Path, out: Path, where: str, **changes) -> None:
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(out), where, json.dumps(changes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["2", "5", "export_encoder", "publish"])
def test_killed_and_continued_has_the_same_id(where: str, whole: Artifact, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_and_die(corpus, out, where)
    assert not (out / "artifact.json").exists()
    made = run(corpus, out)
    assert made.card.artifact_id == whole.card.artifact_id
    assert not verify(out, made.card)
    assert read_metrics(out) == read_metrics(whole.path)
    same_events(out, whole.path)
    assert "continuing from step" in (out / "run/run.log").read_text()


def test_a_signal_saves_and_exits_75(whole: Artifact, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    add = train.Tally.add

    def add_and_signal(self, step, visible):
        add(self, step, visible)
        if step.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Tally, "add", add_and_signal)
    with pytest.raises(InterruptedRun, match="state saved") as caught:
        run(corpus, tmp_path / "out")
    assert caught.value.exit_code == 75
    monkeypatch.undo()
    assert run(corpus, tmp_path / "out").card.artifact_id == whole.card.artifact_id
    same_events(tmp_path / "out", whole.path)


def test_lost_states_are_never_a_silent_new_run(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train, "export_encoder", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(corpus, tmp_path / "out")
    for path in (tmp_path / "out/run/state").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(CorruptError, match="none is usable"):
        run(corpus, tmp_path / "out")


def test_what_the_seed_and_threads_do(whole: Artifact, corpus: Path, tmp_path: Path) -> None:
    other = run(corpus, tmp_path / "a", seed=1).card.identity.outputs
    mine = whole.card.identity.outputs
    assert other["weights"] != mine["weights"]
    assert other["witnesses"] != mine["witnesses"]
    uniform = run(corpus, tmp_path / "b", policy="uniform").card.identity
    assert uniform.outputs["draws"] == mine["draws"]
    assert uniform.outputs["weights"] != mine["weights"]


def test_a_schedule_is_on_the_card_and_seen_by_the_trainer(corpus: Path, tmp_path: Path) -> None:
    made = run(corpus, tmp_path / "out", schedule={"first": {"overall": 250}}, loader_workers=1)
    shares = [row["hidden_share"] for row in read_metrics(made.path) if "epoch" in row]
    assert shares == [4 / 16, 5 / 16, 8 / 16, 10 / 16]  # 250, 338, 513, 600 thousandths of 16 patches
    assert redraw(open_region_store(str(corpus / "regions")), made.card.identity.spec, made.path).mismatches == ()
    with pytest.raises(ConfigError, match=r"schedule.first.overal: .*Did you mean 'overall'"):
        run(corpus, tmp_path / "other", schedule={"first": {"overal": 250}})


def test_the_average_of_the_weights_is_what_is_published(whole: Artifact, corpus: Path, tmp_path: Path) -> None:
    changes = {"optimizer": "lamb", "weight_decay_end": 0.2}
    last, averaged = (run(corpus, tmp_path / str(ema), ema=ema, **changes) for ema in (None, 0.9))
    assert verify(averaged.path, averaged.card) == []
    one, other = (load_encoder(made.path / "encoder").model.state_dict() for made in (last, averaged))
    assert last.card.identity.outputs["weights"] not in (
        whole.card.identity.outputs["weights"],
        averaged.card.identity.outputs["weights"],
    )
    state = latest_state(averaged.path / "run/state")[1]
    for name, value in other.items():
        assert torch.equal(value, state[f"ema/encoder.{name}"]), name
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_masks_by_another_sample_s_maps_draw_again(whole: Artifact, corpus: Path, tmp_path: Path) -> None:
    made = run(corpus, tmp_path / "out", policy="shuffled", loader_workers=1)
    store, spec = open_region_store(str(corpus / "regions")), made.card.identity.spec
    found = redraw(store, spec, made.path)
    assert (found.mismatches, found.draws) == ((), (COUNT - 1) * EPOCHS)
    assert made.card.identity.outputs["witnesses"] != whole.card.identity.outputs["witnesses"]
    masks = [redraw_one(store, spec, made.path, f"{row:02}.png", epoch=-1, view=0) for row in range(COUNT) if row != 5]
    assert all((mask.bits == mask.recorded).all() for mask in masks)
    assert sorted(mask.maps_of for mask in masks) == [f"{row:02}.png" for row in range(COUNT) if row != 5]
    assert masks[0].maps_of != "00.png"
    assert (masks[0].maps == store.maps([store.row(masks[0].maps_of)])[0]).all()


def test_a_list_takes_a_part_of_a_store_and_its_masks_draw_again(whole: Artifact, corpus: Path, tmp_path: Path) -> None:
    listed = tmp_path / "some.csv"
    listed.write_text("group,sample_id\n" + "".join(f"g,{row:02}.png\n" for row in (7, 0, 1, 2)))
    made = run(corpus, tmp_path / "out", subset=str(listed), policy="shuffled")
    spec = made.card.identity.spec
    assert (spec["rows"], made.card.identity.outputs["samples"]) == ("0-2,7", 4)
    assert "subset" not in spec
    opened = open_region_store(str(corpus / "regions"))
    found = redraw(opened, spec, made.path)
    assert (found.mismatches, found.draws) == ((), 4 * EPOCHS)
    masks = [redraw_one(opened, spec, made.path, f"{row:02}.png", epoch=-1, view=0) for row in (0, 7)]
    assert all((mask.bits == mask.recorded).all() for mask in masks)
    assert {mask.maps_of for mask in masks} <= {"00.png", "01.png", "02.png", "07.png"}
    with pytest.raises(UsageError, match="took no part"):
        redraw_one(opened, spec, made.path, "03.png", epoch=-1, view=0)
    assert "rows" not in whole.card.identity.spec
    listed.rename(tmp_path / "moved.csv")
    moved = str(tmp_path / "moved.csv")
    assert run(corpus, tmp_path / "out", subset=moved, policy="shuffled").card == made.card  # it is the rows that count


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, InputMissingError, "no such file"),
        ("sample_id\n05.png\n00.png\n", InputMissingError, r"1 of 2 samples have no maps .*'05\.png'"),
        ("name\n00.png\n", UsageError, "with the column sample_id"),
        ("sample_id\n", UsageError, "no rows"),
    ],
)
def test_a_list_that_cannot_be_taken_is_refused(text, error, message, corpus: Path, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "some.csv").write_text(text)
    with pytest.raises(error, match=message):
        run(corpus, tmp_path / "out", subset=str(tmp_path / "some.csv"))


def test_masks_drawn_on_the_device_of_the_encoder_are_the_same(
    whole: Artifact, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for the device: the operator's own code for a CPU draws."""
    with pytest.raises(ConfigError, match="impl: fused, but device is cpu; expected cuda"):
        run(corpus, tmp_path / "refused", impl="fused")
    monkeypatch.setattr(choice, "_against_fused", lambda device, patches: None)
    monkeypatch.setattr(MaskSampler, "cover", None)  # the loader pools nothing
    made = run(corpus, tmp_path / "out", loader_workers=1)
    assert yaml.safe_load((made.path / "resolved.yaml").read_text())["impl"] == "fused"
    assert made.card.artifact_id == whole.card.artifact_id
    assert read_examples(made.path)[0].hidden.tolist() == read_examples(whole.path)[0].hidden.tolist()


def test_masks_that_follow_a_teacher_draw_again_and_survive_a_kill(corpus: Path, tmp_path: Path) -> None:
    changes = {"policy": {"name": "hard"}, "schedule": {"first": {"share": 0}}, "ema": 0.5}
    made = run(corpus, tmp_path / "out", **changes)
    found = redraw(open_region_store(str(corpus / "regions")), made.card.identity.spec, made.path)
    assert (found.mismatches, found.checked, found.unrecomputable) == ((), (COUNT - 1) * EPOCHS, 0)
    recorded, known = read_witnesses(made.path)
    for example in read_examples(made.path):  # pictures show what was trained on, not what the last teacher would hide
        bits = recorded["bits"][-1, 0, known["witnesses"].index(example.sample_id)]
        assert (pack(example.hidden.reshape(1, -1)) == bits).all()
    levels = recorded["levels"][:, 0]
    assert levels.sum(-1).tolist() == [[0] * 8, [1] * 8, [4] * 8, [5] * 8]  # 0, 125, 375, 500 thousandths of 10
    assert len({row.tobytes() for row in levels[-1]}) > 1  # by image
    run_and_die(corpus, tmp_path / "other", "4", **changes)
    assert run(corpus, tmp_path / "other", **changes).card.artifact_id == made.card.artifact_id


def test_a_policy_that_follows_a_teacher_has_one(corpus: Path, tmp_path: Path) -> None:
    made = run(corpus, tmp_path / "out", policy="attention")
    assert made.card.identity.spec["ema"] is None  # the weights are published: to average them is another choice
    state = latest_state(made.path / "run/state")[1]
    found = load_encoder(made.path / "encoder").model.state_dict()
    assert all(torch.equal(value, state[f"module/encoder.{name}"]) for name, value in found.items())
    moved = [value for name, value in found.items() if not torch.equal(value, state[f"ema/encoder.{name}"])]
    assert moved


def test_parts_of_a_step_count_by_their_hidden_patches(corpus: Path, tmp_path: Path) -> None:
    """Without batch norms, a step in parts is the step: the encoder has none, and the decoder's are held still."""
    options = {"output_stride": 8, "depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12]}
    changes = {"backbone": "convnext_atto", "backbone_options": options}
    changes |= {"policy": {"name": "region", "budget": "per-sample", "hide_inside": 900, "hide_outside": 300}}
    stores = {"images": corpus / "images", "store": open_region_store(str(corpus / "regions")), "out": tmp_path}
    losses, gradients = [], []
    for accumulate in (1, 3):
        made = prepare(resolve(config(**changes, accumulate=accumulate)), **stores)
        method = made.method.eval()
        with closing(made.steps.begin(0)) as steps:
            batch, _ = next(steps)
        parts, visible, _ = made.step(batch)
        assert visible.flatten(1).sum(1).unique().numel() > 1
        each = []
        for part in parts:
            part["loss"].backward()
            each.append(part["loss"].item())
        assert len(each) == accumulate
        losses.append(sum(each))
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_run_in_parts_and_bfloat16(whole: Artifact, corpus: Path, tmp_path: Path) -> None:
    made = run(corpus, tmp_path / "out", accumulate=2, precision="bf16")
    assert made.card.identity.spec["numeric"]["dtype"] == "bf16"
    assert verify(made.path, made.card) == []
    assert made.card.identity.outputs["witnesses"] == whole.card.identity.outputs["witnesses"]
    exact = run(corpus, tmp_path / "exact", accumulate=2, epochs=1, warmup_epochs=0)
    first, other = (read_metrics(path)[0]["loss"] for path in (made.path, exact.path))
    assert first != other
    assert first == pytest.approx(other, rel=0.01)
    assert other == pytest.approx(read_metrics(whole.path)[0]["loss"], rel=0.1)  # batch norms see a part
    state = latest_state(made.path / "run/state")[1]
    assert {value.dtype for name, value in state.items() if name.startswith("module/") and "num_b" not in name} == {
        torch.float32
    }


def test_colour_images_and_three_channels(corpus: Path, tmp_path: Path) -> None:
    made = run(corpus, tmp_path / "out", channels=3, epochs=1, warmup_epochs=0)
    assert load_encoder(made.path / "encoder").in_chans == 3


def test_a_coarse_grid_is_warned_of(corpus: Path, tmp_path: Path) -> None:
    options = {**RECIPE["backbone_options"], "output_stride": 32}
    run(corpus, tmp_path / "out", backbone_options=options, epochs=1, warmup_epochs=0)
    assert "warning: 4 patches: a grid that coarse can't tell a region" in (tmp_path / "out/run/run.log").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_px": 72}, "size_px: 72 is no multiple of the encoder's stride 16"),
        ({"backbone": "vit_tiny_patch16_224", "backbone_options": "auto"}, "the network is a VisionTransformer, which"),
        ({"method": "mae"}, "resnet18 is a ResNet, expected a plain VisionTransformer"),
        ({"size_px": 1600}, "grid: 100 patches along .* pixels of the region map"),
        ({"method": {"name": "sparks"}}, "unknown method 'sparks'"),
        ({"method": {"name": "spark", "decoder_widht": 8}}, "decoder_widht: unknown key. Did you mean 'decoder_width'"),
        ({"policy": {"name": "region", "hide_insde": 8}}, "hide_insde: unknown key. Did you mean 'hide_inside'"),
        ({"policy": {"name": 8}}, "policy.name: required"),
        ({"accumulate": 5}, "accumulate: 5 parts of a step, and its smallest share is 4 images: expected at least one"),
        (
            {"policy": "oracle"},
            "policy oracle: regions of grounder 'None', expected those of grounder 'oracle': labels",
        ),
        ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs must be below epochs"),
        ({"threads": 0}, "expected 1 or more"),
        ({"threads": 100_000}, "threads: 100000, expected 1 to .* on this machine of"),
        ({"loader_workers": -1}, "loader_workers: .* greater than or equal to 0"),
        ({"backbone_options": {"channels": [8, 4, 8, 8]}}, "layer3.0.downsample.0 is a 1x1 convolution of stride 2"),
        ({"coverage": {"weights": {"disk": 1}}}, "coverage.weights.disk: no such region"),
    ],
)
def test_refused_before_anything_is_computed(changes: dict, message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(corpus, tmp_path / "out", **changes)
    assert not (tmp_path / "out/run/spec.json").exists()


def test_one_sample_is_too_few(tmp_path: Path) -> None:
    write_discs(tmp_path / "images", 2)
    write_store(tmp_path / "images", tmp_path / "regions", quarantined=(0,))
    with pytest.raises(ConfigError, match="1 sample with maps; a batch needs 2"):
        run(tmp_path, tmp_path / "out")


def test_a_changed_image_is_found(tmp_path: Path) -> None:
    write_discs(tmp_path / "images", 4)
    write_store(tmp_path / "images", tmp_path / "regions")
    Image.fromarray(np.zeros((70, 90), np.uint8)).save(tmp_path / "images/00.png")
    with pytest.raises(CorruptError, match=r"00\.png"):
        run(tmp_path, tmp_path / "out", epochs=1, warmup_epochs=0)
