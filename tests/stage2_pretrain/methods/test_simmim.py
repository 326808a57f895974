"""SimMIM: a token at hidden patches, a linear head, absolute errors; one image at a time, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shared.backbones import build
from shared.errors import ConfigError, UsageError
from stage2_pretrain.methods.simmim import SimMIM, SimMIMOptions
from tests.stage2_pretrain.methods import naive_vit as naive
from tests.stage2_pretrain.methods.promises import check_hidden_unread, check_loss
from tests.stage2_pretrain.methods.test_mae import NETS, TINY, TOLERANCE, example


def method(net: str = "plain", in_chans: int = 1) -> SimMIM:
    backbone = build("vit_tiny_patch16_224", in_chans=in_chans, model_args={**TINY, **NETS[net]}, size_px=32)
    made = SimMIM(SimMIMOptions(), backbone, size_px=32, seed=2).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the zeros and ones of a fresh network
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return made.train()


def naive_loss(made: SimMIM, image: Tensor, visible: Tensor) -> Tensor:
    model, p, errors = made.encoder, made.patch_px, []
    for pixels, seen in zip(image, visible, strict=True):
        places = [(i, j) for i in range(4) for j in range(4)]
        rows = naive.first_tokens(model)
        count = len(rows)
        for i, j in places:
            row = naive.embed(model, naive.window(pixels, i, j, p)) if seen[i, j] else made.token
            rows.append(row + naive.position(model, 4 * i + j))
        drawn = naive.linear(naive.encode(model, rows)[count:], made.to_pixels)
        for row, (i, j) in enumerate(places):
            if not seen[i, j]:
                found = drawn[row].view(p, p, -1).permute(2, 0, 1)
                errors.append((found - naive.window(pixels, i, j, p)).abs().mean())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("net", NETS)
def test_it_is_the_loss_of_one_image_at_a_time(net: str) -> None:
    made = method(net, 3 if net == "plain" else 1)
    image, visible = example(made)
    trained = [(name, value) for name, value in made.named_parameters() if "fc_norm" not in name]
    expected = naive_loss(made, image, visible)
    check_loss(made, image, visible, expected, trained, TOLERANCE)


def test_no_hidden_pixel_is_read() -> None:
    made = method()
    image, visible = example(made)
    check_hidden_unread(made, image, visible, at_least=20)


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method()
    image, visible = example(made)
    made.loss(image, visible)
    monkeypatch.setattr(type(made.encoder), "forward_features", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.loss(image, visible)
    assert not any("forward" in vars(module) for module in made.modules())


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_what_is_no_plain_vit_is_refused_by_name(name: str) -> None:
    backbone = build(name, in_chans=1, **({"size_px": 224} if "swin" in name else {}))
    with pytest.raises(ConfigError, match=f"{name} is a .*, expected a plain VisionTransformer"):
        SimMIM(SimMIMOptions(), backbone, size_px=224, seed=0)


def test_attention_of_any_kind_is_dense_here() -> None:
    args: dict[str, Any] = {**TINY, "num_heads": 4, "attn_layer": "diff"}
    backbone = build("vit_tiny_patch16_224", in_chans=1, model_args=args, size_px=32)
    made = SimMIM(SimMIMOptions(), backbone, size_px=32, seed=0).double()
    image, visible = example(method())
    assert made.loss(image, visible)["loss"].isfinite()


def test_nothing_hidden_is_an_error() -> None:
    made = method()
    image, visible = example(made)
    with pytest.raises(UsageError, match="nothing to learn"):
        made.loss(image, torch.ones_like(visible))
