"""Weights of timm's as a start: all of them, with their own normalisation, or an error; never random ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import stage3_finetune.train as train
from shared.errors import ConfigError, CorruptError, InputMissingError
from stage3_finetune import timm_weights
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.rescore import rescore
from stage3_finetune.start import start_from

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a user has from timm: three channels, a classifier of ten."""
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=10)
    save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config["pretrained_cfg"] |= {"mean": MEAN, "std": STD}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    return tmp_path / "theirs"


def settings(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"size_px": 32, **changes})


def test_three_channels_are_kept_or_made_one_as_timm_does(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    three, grey = start_from(settings(), str(folder)), start_from(settings(channels=1), str(folder))
    assert (three.backbone.in_chans, three.mean, three.std, three.kind) == (3, MEAN, STD, "weights")
    assert all(torch.equal(value, stored[name]) for name, value in three.backbone.model.state_dict().items())
    assert "all 90 tensors kept but the 2 of its classifier" in three.line
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, in_chans=1).state_dict()
    ours = grey.backbone.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert grey.mean == pytest.approx((sum(MEAN) / 3,))
    assert grey.weights["sha256"] != three.weights["sha256"]


@pytest.mark.parametrize("change", ["absent", "unknown", "shape", "text", "architecture"])
def test_weights_that_are_not_whole_are_refused(folder: Path, change: str) -> None:
    state = load_file(folder / "model.safetensors")
    last = "layer1.0.conv1.weight"
    if change == "absent":
        del state[last]
    elif change == "unknown":
        state["more.weight"] = torch.ones(1)
    elif change == "shape":
        state[last] = torch.ones(3)
    save_file(state, folder / "model.safetensors")
    if change == "text":
        (folder / "model.safetensors").write_text("no tensors")
    if change == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architecture": "resnet19"}))
    with pytest.raises((CorruptError, ConfigError), match=r"layer1|more\.weight|SafetensorError|unknown backbone"):
        start_from(settings(), str(folder))


def test_channels_that_cannot_be_had_and_another_backbone_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="backbone: resnet18, the weights are of test_resnet"):
        start_from(settings(backbone="resnet18"), str(folder))
    save_for_hf(timm.create_model("test_resnet", in_chans=4), tmp_path / "four", safe_serialization=True)
    with pytest.raises(ConfigError, match="channels: auto, the weights are for 4"):
        start_from(settings(), str(tmp_path / "four"))
    save_for_hf(timm.create_model("test_resnet", in_chans=1), tmp_path / "one", safe_serialization=True)
    with pytest.raises(ConfigError, match="channels: 3, the weights are for 1"):
        start_from(settings(channels=3), str(tmp_path / "one"))


def test_a_run_names_them_by_digest_and_its_scores_compute_again(
    folder: Path, images: Path, table: Callable[..., Path], quick: Callable[..., Any], tmp_path: Path
) -> None:
    config = quick(backbone="auto", epochs=1, layer_decay_milli=500)
    made = train.finetune(config, images=images, labels=table(), encoder=str(folder), out=tmp_path / "out")
    spec, outputs = made.card.identity.spec, made.card.identity.outputs
    digest = start_from(settings(), str(folder)).weights["sha256"]
    assert spec["weights"] == {"source": "a folder of timm's format", "architecture": "test_resnet", "sha256": digest}
    assert (outputs["tensors_kept"], outputs["tensors_new"]) == (90, 2)
    assert made.card.provenance.metrics["start"] == "weights"
    assert rescore(made.path, made.card) == []
    assert str(tmp_path) not in (made.path / "artifact.json").read_text()


def test_a_name_that_timm_does_not_know_or_cannot_fetch_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown backbone 'resnet19'"):
        start_from(settings(), "timm:resnet19")
    with pytest.raises(InputMissingError, match="timm has no such weights"):
        start_from(settings(), "timm:resnet18.no_such_tag")

    real = timm.create_model

    def offline(name: str, *, pretrained: bool = False, **more: Any) -> Any:
        if pretrained:
            raise ConnectionError("no route to host\nand more")
        return real(name, **more)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputMissingError, match=r"cannot be fetched: ConnectionError: no route to host$") as caught:
        start_from(settings(), "timm:resnet18.a1_in1k")
    assert "save_for_hf" in str(caught.value.hint)
    with pytest.raises(ConfigError, match=r"backbone 'resnet18' cannot be built with .*no_such"):
        start_from(settings(backbone_options={"no_such": 1}), "timm:resnet18.a1_in1k")

    def of_another_shape(name: str, *, pretrained: bool = False, **more: Any) -> Any:
        model = real(name, **more)
        if pretrained:
            model.load_state_dict({"conv1.weight": torch.zeros(1)})
        return model

    monkeypatch.setattr(timm, "create_model", of_another_shape)
    with pytest.raises(ConfigError, match=r"its weights do not fit \{\}: Error\(s\) in loading state_dict"):
        start_from(settings(), "timm:resnet18.a1_in1k")


def test_weights_by_name_are_taken_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def cached(name: str, *, pretrained: bool = False, seed: int = 9, **more: Any) -> Any:
        if not pretrained:
            return real(name, pretrained=False, **more)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return real(name, pretrained=False, **more)

    monkeypatch.setattr(timm, "create_model", cached)
    start = start_from(settings(channels=1), "timm:test_resnet.r160_in1k")
    assert start.weights["source"] == "timm:test_resnet.r160_in1k"
    assert start.backbone.in_chans == 1
    assert "3 channels made 1" in start.line
    # timm fills up what a file lacks with what it drew: two draws tell.
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained=False, **more: real(name, **more))
    with pytest.raises(CorruptError, match="its weights lack conv1"):
        start_from(settings(), "timm:test_resnet.r160_in1k")
    assert timm_weights.PREFIX == "timm:"
