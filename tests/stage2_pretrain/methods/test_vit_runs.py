"""A ViT under MAE from end to end: trained, cut off and continued, exported, read by timm, audited."""

from pathlib import Path

import pytest
import timm
import torch
import yaml

from shared.artifact import Artifact
from shared.backbones import load_encoder
from shared.regions import open_region_store
from stage2_pretrain.witness import redraw
from tests.stage2_pretrain.methods.promises import cut_off
from tests.stage2_pretrain.stores import write_discs, write_store
from tests.stage2_pretrain.test_train import run

SETTINGS = {
    "method": {"name": "mae", "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "backbone": "vit_tiny_patch16_224",
    "backbone_options": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "size_px": 64,
    "epochs": 12,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_discs(folder / "images", 8)
    write_store(folder / "images", folder / "regions")
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(corpus, tmp_path_factory.mktemp("whole") / "out", **SETTINGS)


def test_training_lowers_the_loss_and_plain_timm_loads_the_export(whole: Artifact) -> None:
    metrics = whole.card.provenance.metrics
    assert metrics["loss_last_epoch"] < 0.95 * metrics["loss_first_epoch"]
    theirs = timm.create_model(f"local-dir:{whole.path / 'encoder'}", pretrained=True).eval()
    ours = load_encoder(whole.path / "encoder")
    image = torch.rand(2, 1, 64, 64)
    assert torch.equal(theirs(image), ours.model.eval()(image))
    assert theirs.pos_embed.requires_grad  # fixed while pretraining; a finetuned one learns them


def test_masks_are_on_the_vits_grid_and_draw_again(whole: Artifact, corpus: Path) -> None:
    spec = whole.card.identity.spec
    assert spec["mask"]["grid"] == [8, 8]
    assert spec["method"] == {**SETTINGS["method"], "norm_target": True, "positions": "sincos", "version": 1}
    found = redraw(open_region_store(str(corpus / "regions")), spec, whole.path)
    assert found.mismatches == ()


def test_what_ran_is_what_is_on_disk(corpus: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "method": "simmim", "backbone_options": "auto", "epochs": 1, "warmup_epochs": 0}
    made = run(corpus, tmp_path / "out", **settings)
    resolved = yaml.safe_load((made.path / "resolved.yaml").read_text())
    assert resolved["backbone_options"] == {}
    assert resolved["method"] == {"name": "simmim"}
    assert load_encoder(made.path / "encoder").model_args == {"img_size": 64}


def test_cut_off_and_continued_has_the_same_id(
    whole: Artifact, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(monkeypatch, lambda: run(corpus, tmp_path / "out", **SETTINGS))
    assert run(corpus, tmp_path / "out", **SETTINGS).card.artifact_id == whole.card.artifact_id
