"""What every method of the table gives: the same handful of promises, one small encoder each."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from shared import ranks
from shared.backbones import build
from shared.errors import UsageError
from stage2_pretrain.methods import METHODS

VIT = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12]}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fcmae": ("convnextv2_atto", CONVNEXT, {"decoder_width": 16}),
    "mae": ("vit_tiny_patch16_224", VIT, {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}),
    "simmim": ("vit_tiny_patch16_224", VIT, {}),
    "spark": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 12]}, {"decoder_width": 32}),
}
SIZE_PX = 64


def method(name: str) -> Any:
    architecture, args, options = CASES[name]
    stride = None if architecture.startswith("vit") else 16
    backbone = build(architecture, in_chans=1, output_stride=stride, model_args=args, size_px=SIZE_PX, seed=0)
    part = METHODS.load(name)
    return part(part.Options(**options), backbone, size_px=SIZE_PX, seed=0).train()


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.avg_pool2d(torch.rand(4, 1, SIZE_PX, SIZE_PX, generator=generator), 9, 1, 4)
    visible = torch.rand(4, 4, 4, generator=generator) < torch.tensor([0.2, 0.4, 0.6, 0.8]).view(4, 1, 1)
    visible[:, 0, 0], visible[:, 1, 1] = True, False
    return (image - 0.5) / 0.1, visible


def test_there_is_a_case_of_every_method() -> None:
    assert sorted(CASES) == sorted(METHODS)


@pytest.mark.parametrize("name", CASES)
def test_the_encoder_is_timms_own(name: str) -> None:
    made = method(name)
    architecture, args, _ = CASES[name]
    size = {"img_size": SIZE_PX} if architecture.startswith("vit") else {"output_stride": 16}
    theirs = timm.create_model(architecture, num_classes=0, in_chans=1, **args, **size)
    mine = made.encoder.state_dict()
    assert {key: value.shape for key, value in theirs.state_dict().items()} == {k: v.shape for k, v in mine.items()}
    assert made.encoder is made.backbone.model
    assert made.grid == (4, 4)
    assert isinstance(made.version, int)


@pytest.mark.parametrize("name", CASES)
def test_weights_follow_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    one, before = method(name), torch.get_rng_state()
    torch.manual_seed(2)
    two = method(name)
    assert not torch.equal(before, torch.get_rng_state())
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


@pytest.mark.parametrize("name", CASES)
def test_steps_lower_the_loss(name: str) -> None:
    made = method(name)
    image, visible = example()
    optimizer = torch.optim.AdamW([value for value in made.parameters() if value.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        found = made.loss(image, visible)
        found["loss"].backward()
        optimizer.step()
        losses.append(float(found["loss"].detach()))
    assert torch.tensor(losses).isfinite().all()
    assert losses[1] < losses[0]
    assert losses[3] < losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert made.loss(image, visible)["loss"].isfinite()


@pytest.mark.parametrize("name", CASES)
def test_reconstruct_keeps_the_visible_and_the_mode(name: str) -> None:
    made = method(name)
    image, visible = example()
    drawn = made.reconstruct(image, visible)
    assert drawn.shape == image.shape
    seen = visible.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None].expand_as(image)
    assert torch.equal(drawn[seen], image[seen])
    assert not torch.equal(drawn[~seen], image[~seen])
    assert made.training
    assert torch.equal(drawn, made.reconstruct(image, visible))
    assert not drawn.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_errors_of_hidden_patches_average_to_the_loss(name: str) -> None:
    made = method(name)
    image, visible = example()
    loss = made.loss(image, visible)["loss"]
    errors = made.errors(image, visible)
    assert errors.shape == (4, 16)
    torch.testing.assert_close(errors[~visible.flatten(1)].mean(), loss)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_of_each_patch_of_each_image(name: str) -> None:
    made = method(name).eval()
    image, _ = example()
    with torch.no_grad():
        looked = made.attention(image)
        assert looked.shape == (4, 16)
        assert (looked >= 0).all()
        assert not torch.equal(looked[0], looked[1])
        torch.testing.assert_close(made.attention(image[2:3])[0], looked[2])


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_draw_is_an_error(name: str) -> None:
    image, visible = example()
    with pytest.raises(UsageError, match="nothing to learn"):
        method(name).loss(image, torch.ones_like(visible))


@pytest.mark.parametrize("name", ["fcmae", "mae", "simmim"])  # SparK's norms are over the batch: test_ranks
def test_parts_of_two_processes_are_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = method(name).double()
    image, visible = example()
    image = image.double()
    visible[:2] = name == "mae"  # nothing hidden in one process, or nothing visible
    whole = made.loss(image, visible)["loss"]
    whole.backward()
    expected = {key: value.grad.clone() for key, value in made.named_parameters() if value.grad is not None}
    made.zero_grad()
    count = {"visible": int(visible.sum()), "hidden": int((~visible).sum())}
    monkeypatch.setattr(ranks, "size", lambda: 2)
    parts, sets = [], []
    for rows in (slice(0, 2), slice(2, 4)):
        own = {"visible": int(visible[rows].sum()), "hidden": int((~visible[rows]).sum())}
        totals = {own["visible"]: count["visible"], own["hidden"]: count["hidden"]}
        monkeypatch.setattr(ranks, "total", totals.__getitem__)
        before = {key for key, value in made.named_parameters() if value.grad is not None}
        part = made.loss(image[rows], visible[rows])["loss"]
        part.backward()
        parts.append(float(part.detach()))
        sets.append(before | {key for key, value in made.named_parameters() if value.grad is not None})
    assert abs(sum(parts) - float(whole.detach())) < 1e-12
    assert sets[0] == expected.keys()  # gradients of the same parameters in each process, or their sum would hang
    for key, value in made.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, expected[key], rtol=1e-9, atol=1e-12)
