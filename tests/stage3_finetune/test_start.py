"""What finetuning starts from where the encoder is a ViT: built for one size, resized to another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

import stage3_finetune.train as train
from shared.artifact import publish
from shared.backbones import build, export_encoder
from shared.errors import ConfigError
from shared.merkle import tensor_digest
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.start import start_from

ARGS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published ViT of 48 px images."""
    folder = tmp_path_factory.mktemp("published") / "encoder"
    backbone = build(NAME, in_chans=1, model_args=ARGS, size_px=48, seed=12345)
    export_encoder(backbone, folder / "encoder", size_px=48, mean=(0.4,), std=(0.3,))
    weights = tensor_digest({name: value.numpy() for name, value in backbone.model.state_dict().items()})
    publish(folder, kind="encoder", inputs=(), spec={"made": "by a test"}, outputs={"weights": weights})
    return folder


def settings(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"size_px": 48, **changes})


def test_a_vit_is_taken_as_it_is_or_resized(vit: Path) -> None:
    same, larger = (start_from(settings(size_px=size), str(vit)) for size in (48, 64))
    stored = load_file(vit / "encoder/model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in same.backbone.model.state_dict().items())
    assert same.line.endswith("all 30 tensors kept, a new classifier on top")
    assert larger.line.endswith("all 30 tensors kept, 48 px made 64 px, a new classifier on top")
    resized = larger.backbone.model.state_dict()
    assert [name for name, value in resized.items() if value.shape != stored[name].shape] == ["pos_embed"]
    assert all(torch.equal(value, stored[name]) for name, value in resized.items() if name != "pos_embed")
    assert (same.backbone.args["img_size"], larger.backbone.args["img_size"]) == (48, 64)


def test_settings_that_are_the_encoders_are_no_contradiction(vit: Path) -> None:
    first = start_from(settings(size_px=64), str(vit))
    told = {"backbone": NAME, "backbone_options": ARGS, "channels": 1, "size_px": 64}
    assert start_from(settings(**told), str(vit)).backbone.args == first.backbone.args
    again = {**told, "backbone_options": first.backbone.args}  # of resolved.yaml
    assert start_from(settings(**again), str(vit)).backbone.args == first.backbone.args
    with pytest.raises(
        ConfigError, match=r"backbone_options: .*'patch_size': 16.*, the encoder's is .*'patch_size': 8"
    ):
        start_from(settings(backbone_options={**ARGS, "patch_size": 16}), str(vit))


@pytest.mark.parametrize("encoder", [True, False])
def test_a_size_that_the_patch_does_not_divide_is_refused(encoder: bool, vit: Path) -> None:
    told = {} if encoder else {"backbone": NAME, "backbone_options": ARGS}
    with pytest.raises(ConfigError, match="size_px: 60 is no multiple of the encoder's stride 8"):
        start_from(settings(size_px=60, **told), str(vit) if encoder else None)


@pytest.mark.parametrize("size_px", [32, 48])
def test_plain_timm_loads_a_finetuned_vit(
    size_px: int, vit: Path, images: Path, table: Callable[..., Path], quick: Callable[..., Any], tmp_path: Path
) -> None:
    config = quick(backbone="auto", size_px=size_px, epochs=1)
    made = train.finetune(config, images=images, labels=table(), encoder=str(vit), out=tmp_path / "out")
    model = timm.create_model(f"local-dir:{made.path / 'model'}", pretrained=True)
    assert model.pos_embed.shape[1] == 1 + (size_px // 8) ** 2
    assert model(torch.rand(2, 1, size_px, size_px)).shape == (2, 3)
    assert (made.card.identity.outputs["tensors_kept"], made.card.identity.outputs["tensors_new"]) == (30, 2)
