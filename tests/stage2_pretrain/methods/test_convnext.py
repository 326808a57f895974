"""ConvNeXt under SparK: trained, exported, cut off and continued; its norms see a site at a time."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers.norm import LayerNorm2d
from torch import nn

from shared.artifact import Artifact
from shared.backbones import build, load_encoder
from stage2_pretrain.methods.spark import SparK, SparKOptions
from stage2_pretrain.methods.sparse import Sites, sparse
from tests.stage2_pretrain.methods.promises import cut_off
from tests.stage2_pretrain.methods.test_spark import example, randomise
from tests.stage2_pretrain.stores import write_discs, write_store
from tests.stage2_pretrain.test_train import run

ARGS = {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12]}
SETTINGS = {"backbone": "convnext_atto", "backbone_options": ARGS, "size_px": 96, "epochs": 12}


def method(**args: object) -> SparK:
    backbone = build("convnext_atto", in_chans=1, model_args={**ARGS, "ls_init_value": 0.5, **args}, seed=1)
    made = SparK(SparKOptions(decoder_width=32), backbone, size_px=64, seed=1).double()
    randomise(made)
    return made.train()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_discs(folder / "images", 8)
    write_store(folder / "images", folder / "regions")
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(corpus, tmp_path_factory.mktemp("whole") / "out", **SETTINGS)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_no_hidden_pixel_reaches_an_encoders_gradient(conv_mlp: bool) -> None:
    made = method(conv_mlp=conv_mlp)
    image, visible = example(made)
    other = torch.where(Sites(visible).active(64, 64), image, torch.rand_like(image) * 9 - 4)
    seen = []
    for pixels in (image, other):
        made.zero_grad()
        features = made.encode(pixels, Sites(visible))
        sum((feature * feature.detach().cos()).sum() for feature in features).backward()
        seen.append({name: value.grad for name, value in made.encoder.named_parameters() if value.grad is not None})
    assert len(seen[0]) > 30
    for name, gradient in seen[0].items():
        assert torch.equal(gradient, seen[1][name]), name
        assert gradient.abs().max() > 0, name


def test_the_decoder_learns_hidden_pixels_from_the_loss_only() -> None:
    made = method()
    image, visible = example(made)
    other = torch.where(Sites(visible).active(64, 64), image, torch.rand_like(image))
    assert torch.equal(made(image, visible), made(other, visible))
    assert made.loss(image, visible)["loss"] != made.loss(other, visible)["loss"]


def test_a_norm_sees_one_visible_site_at_a_time() -> None:
    made = method(conv_mlp=False)  # both kinds of LayerNorm
    image, visible = example(made)
    sites, seen = Sites(visible), []

    def check(norm: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        first = isinstance(norm, LayerNorm2d)  # channels first
        before, after = (value.permute(0, 2, 3, 1) if first else value for value in (inputs[0], output))
        active = sites.active(*before.shape[1:3])[:, 0]
        rows = before[active]
        centred = rows - rows.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
        torch.testing.assert_close(after[active], normed * norm.weight + norm.bias)
        assert not after[~active].any()
        seen.append(first)

    for module in made.encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(check)
    with sparse(made.encoder, sites):
        made.backbone.features(sites.multiply(image))
    assert (seen.count(True), seen.count(False)) == (4, 4)


def test_training_lowers_the_loss_and_plain_timm_loads_the_export(whole: Artifact) -> None:
    metrics = whole.card.provenance.metrics
    assert metrics["loss_last_epoch"] < 0.95 * metrics["loss_first_epoch"]
    theirs = timm.create_model(f"local-dir:{whole.path / 'encoder'}", pretrained=True).eval()
    ours = load_encoder(whole.path / "encoder")
    image = torch.rand(2, 1, 96, 96)
    assert torch.equal(theirs(image), ours.model.eval()(image))
    for one, other in zip(
        theirs.forward_intermediates(image, intermediates_only=True), ours.features(image), strict=True
    ):
        assert torch.equal(one, other)
    start = build("convnext_atto", in_chans=1, model_args=ARGS).model.state_dict()
    same = [name for name, value in theirs.state_dict().items() if torch.equal(value, start[name])]
    assert set(same) <= {"head.norm.weight", "head.norm.bias"}


def test_cut_off_and_continued_has_the_same_id(
    whole: Artifact, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, lambda: run(corpus, tmp_path / "out", **SETTINGS))
    assert run(corpus, tmp_path / "out", **SETTINGS).card.artifact_id == whole.card.artifact_id
