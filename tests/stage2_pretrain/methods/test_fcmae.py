"""FCMAE on ConvNeXt V2: one image at a time, every hidden site multiplied away by hand, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor

from shared.backbones import build
from shared.errors import ConfigError, UsageError
from stage2_pretrain.methods.fcmae import FCMAE, FCMAEOptions
from stage2_pretrain.methods.sparse import Sites
from tests.stage2_pretrain.methods import naive_vit as naive
from tests.stage2_pretrain.methods.promises import check_hidden_unread, check_loss
from tests.stage2_pretrain.methods.test_mae import worst

SMALL = {"depths": [1, 1, 2, 1], "dims": [8, 8, 12, 12]}
TOLERANCE = 1e-10


def method(
    execution: str = "packed", conv_mlp: bool = False, options: dict[str, Any] | None = None, in_chans: int = 1
) -> FCMAE:
    backbone = build("convnextv2_atto", in_chans=in_chans, model_args={**SMALL, "conv_mlp": conv_mlp}, seed=1)
    told = {"decoder_width": 16, "execution": execution, **(options or {})}
    made = FCMAE(FCMAEOptions(**told), backbone, size_px=96, seed=2).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the zeros and ones of a fresh network: GRN begins as nothing
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return made.train()


def example(made: FCMAE) -> tuple[Tensor, Tensor]:
    """Images of 1, 5, 0, 9 and 5 visible patches of 9."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(5, made.backbone.in_chans, 96, 96, generator=generator, dtype=torch.float64)
    visible = torch.zeros(5, 9, dtype=torch.bool)
    for row, count in enumerate((1, 5, 0, 9, 5)):
        visible[row, torch.randperm(9, generator=generator)[:count]] = True
    return image, visible.view(5, 3, 3)


def only(x: Tensor, seen: Tensor) -> Tensor:
    """A feature [C, h, w] of one image, zero at hidden sites."""
    times = x.shape[1] // seen.shape[0]
    return x * seen.repeat_interleave(times, 0).repeat_interleave(times, 1)


def conv(x: Tensor, module: torch.nn.Conv2d) -> Tensor:
    return F.conv2d(x[None], module.weight, module.bias, module.stride, module.padding, 1, module.groups)[0]


def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
    """Of each site over its channels."""
    return naive.norm(x.permute(1, 2, 0), module).permute(2, 0, 1)


def pointwise(x: Tensor, module: torch.nn.Module) -> Tensor:
    return torch.einsum("oc,chw->ohw", module.weight.flatten(1), x) + module.bias[:, None, None]


def block(x: Tensor, module: torch.nn.Module, seen: Tensor) -> Tensor:
    y = norm(only(conv(x, module.conv_dw), seen), module.norm)
    y = only(naive.gelu(pointwise(y, module.mlp.fc1)), seen)
    lengths = [(channel.square().sum() + 0.0) ** 0.5 if channel.any() else channel.sum() for channel in y]
    mean = sum(lengths) / len(lengths)
    grn, rows = module.mlp.grn, []
    for channel, length, weight, bias in zip(y, lengths, grn.weight, grn.bias, strict=True):
        rows.append(channel + bias + weight * channel * (length / (mean + grn.eps)))
    return x + only(pointwise(torch.stack(rows), module.mlp.fc2), seen)


def naive_loss(made: FCMAE, image: Tensor, visible: Tensor) -> Tensor:
    model, p, errors = made.encoder, made.patch_px, []
    for pixels, seen in zip(image, visible, strict=True):
        x = only(norm(only(conv(only(pixels, seen), model.stem[0]), seen), model.stem[1]), seen)
        for stage in model.stages:
            if not isinstance(stage.downsample, torch.nn.Identity):
                x = only(conv(only(norm(x, stage.downsample[0]), seen), stage.downsample[1]), seen)
            for module in stage.blocks:
                x = block(x, module, seen)
        x = torch.where(seen, pointwise(x, made.project), made.token[0])
        for module in made.decoder:
            x = block(x, module, torch.ones_like(seen))
        for i in range(3):
            for j in range(3):
                if not seen[i, j]:
                    drawn = naive.linear(x[:, i, j], made.to_pixels).view(p, p, -1).permute(2, 0, 1)
                    target = naive.window(pixels, i, j, p)
                    target = naive.normalised(target) if made.norm_target else target
                    errors.append(((drawn - target) ** 2).mean())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_it_is_the_loss_of_one_image_at_a_time(execution: str, conv_mlp: bool) -> None:
    options = {"decoder_depth": 1 + conv_mlp, "norm_target": not conv_mlp}
    made = method(execution, conv_mlp, options, in_chans=1 + 2 * conv_mlp)
    image, visible = example(made)
    trained = [(name, value) for name, value in made.named_parameters() if not name.startswith("encoder.head")]
    expected = naive_loss(made, image, visible)
    check_loss(made, image, visible, expected, trained, TOLERANCE)


def test_no_hidden_pixel_is_read() -> None:
    made = method()
    image, visible = example(made)
    check_hidden_unread(made, image, visible, at_least=40)


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_an_image_does_not_know_its_batch(execution: str) -> None:
    made = method(execution)
    image, visible = example(made)
    whole = made.features(image, visible)
    for row in (0, 1, 3):
        alone = made.features(image[row : row + 1], visible[row : row + 1])
        assert worst(whole[row], alone[0]) < TOLERANCE


def test_a_black_image_gives_finite_gradients() -> None:
    made = method()
    _, visible = example(made)
    with torch.no_grad():  # channels that are zero at every site: a norm without a gradient
        for module in made.encoder.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear | torch.nn.LayerNorm):
                module.bias.zero_()
    made.loss(torch.zeros(5, 1, 96, 96, dtype=torch.float64), visible)["loss"].backward()
    assert all(value.grad.isfinite().all() for value in made.parameters() if value.grad is not None)


def test_a_vit_and_a_size_are_refused_by_name() -> None:
    vit = build("vit_tiny_patch16_224", in_chans=1, size_px=96, model_args={"depth": 1})
    with pytest.raises(ConfigError, match="the network is a VisionTransformer, which has no sparse form") as caught:
        FCMAE(FCMAEOptions(), vit, size_px=96, seed=0)
    assert "mae and simmim" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="size_px: 72 is no multiple of the encoder's stride 32"):
        FCMAE(FCMAEOptions(), method().backbone, size_px=72, seed=0)


def test_nothing_hidden_or_nothing_visible_is_an_error() -> None:
    made = method()
    image, visible = example(made)
    with pytest.raises(UsageError, match="nothing to learn"):
        made.loss(image, torch.ones_like(visible))
    with pytest.raises(UsageError, match="no patch of this batch is visible"):
        made.loss(image, torch.zeros_like(visible))


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_masked_a_hidden_site_is_zero_after_a_response_norm_too(conv_mlp: bool) -> None:
    made = method("masked", conv_mlp)
    image, visible = example(made)
    left = []
    for module in made.encoder.modules():
        if isinstance(module, GlobalResponseNorm):
            module.register_forward_hook(lambda norm, inputs, output: left.append((norm.channel_dim, output)))
    made.encode(image, Sites(visible))
    assert len(left) == 5
    for channel, output in left:
        first = output if channel == 1 else output.permute(0, 3, 1, 2)
        active = Sites(visible).active(*first.shape[2:])
        assert not (first * ~active).any()
        assert (first * active).any()
