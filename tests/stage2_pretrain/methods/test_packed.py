"""Visible patches alone: the function that masking gives, in float64, for every encoder that has the form."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from shared.backbones import build
from shared.errors import ConfigError, UsageError
from stage2_pretrain.methods.cells import Cells
from stage2_pretrain.methods.packed import _route, _SameConv, check_packed
from stage2_pretrain.methods.spark import SparK, SparKOptions
from stage2_pretrain.methods.sparse import Sites
from tests.stage2_pretrain.methods.test_spark import SMALL, randomise, worst

CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12], "ls_init_value": 0.5}
NETS: dict[str, tuple[str, int | None, dict[str, Any], int]] = {
    "basic": ("resnet18", None, SMALL, 64),
    "basic, dilated": ("resnet18", 16, SMALL, 64),
    "basic, dilated twice": ("resnet18", 8, SMALL, 64),
    "bottleneck": ("resnet50", None, SMALL, 96),
    "deep stem, average shortcut": ("resnet50d", None, {**SMALL, "stem_width": 8}, 64),
    "signed activation before the pool": ("resnet18", None, {**SMALL, "act_layer": "leaky_relu"}, 64),
    "convnext": ("convnext_atto", None, CONVNEXT, 96),
    "convnext, dilated": ("convnext_atto", 16, CONVNEXT, 64),
    "convnext of convolutions": ("convnext_atto", None, {**CONVNEXT, "conv_mlp": True}, 64),
    "convnext v2": ("convnextv2_atto", None, CONVNEXT, 64),
    "convnext v2 of convolutions": ("convnextv2_atto", 16, {**CONVNEXT, "conv_mlp": True}, 64),
}
TOLERANCE = 1e-12
GRADIENT_TOLERANCE = 1e-10
NO_TRUE_GRADIENT = "stages.3.blocks.0.mlp.fc2.bias"
"""Of ConvNeXt's last block: the BatchNorm of the densifying layer takes it away."""


def pair(net: str, in_chans: int = 1, **more: Any) -> tuple[SparK, SparK]:
    """The same method, packed and masked."""
    name, stride, args, size_px = NETS[net]
    made = []
    for execution in ("packed", "masked"):
        backbone = build(name, in_chans=in_chans, output_stride=stride, model_args={**args, **more}, seed=2)
        options = SparKOptions(decoder_width=32, execution=execution)
        method = SparK(options, backbone, size_px=size_px, seed=2).double()
        randomise(method)
        made.append(method.train())
    return made[0], made[1]


def example(method: SparK, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = method.grid[0] * method.patch_px
    image = torch.rand(batch, method.backbone.in_chans, side, side, generator=generator, dtype=torch.float64)
    visible = torch.rand(batch, *method.grid, generator=generator) < torch.rand(batch, 1, 1, generator=generator)
    visible[0, 0, 0], visible[0, 0, 1] = True, False
    visible[-1] = seed % 2 == 0  # none, or all, of one image
    return image, visible


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("net", NETS)
def test_it_is_the_masked_function(net: str, seed: int) -> None:
    packed, masked = pair(net, in_chans=1 + 2 * seed)
    image, visible = example(packed, 3, seed)
    losses = [method.loss(image, visible)["loss"] for method in (packed, masked)]
    assert worst(losses[0], losses[1]) < TOLERANCE
    for loss in losses:
        loss.backward()
    expected = {name: value.grad for name, value in masked.named_parameters() if value.grad is not None}
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in packed.named_parameters():
        if value.grad is not None and not name.endswith(NO_TRUE_GRADIENT):
            # Biases before a norm add up what all but cancels: of them rounding is left, hence the floor.
            assert worst(value.grad, expected.pop(name), 1e-2 * largest) < GRADIENT_TOLERANCE, name
    assert all(name.endswith(NO_TRUE_GRADIENT) for name in expected)
    states = zip(packed.state_dict().items(), masked.state_dict().values(), strict=True)
    for (name, mine), theirs in states:  # the running statistics
        assert worst(mine.double(), theirs.double(), 1e-3) < TOLERANCE, name
    for method in (packed, masked):
        method.eval()
    with torch.no_grad():
        assert worst(packed(image, visible), masked(image, visible)) < TOLERANCE
        where = packed.where(visible)
        features = [where.dense(feature) for feature in packed.encode(image, where)]
        for mine, theirs in zip(features, masked.encode(image, Sites(visible)), strict=True):
            assert mine.shape == theirs.shape
            assert worst(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("net", ["basic, dilated", "bottleneck", "convnext, dilated"])
def test_bfloat16_strays_from_float32_as_masking_does(net: str) -> None:
    loss, direction = [], []
    for lowered in (False, True):
        for method in pair(net):
            method.float()
            image, visible = example(method, 4, 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
                found = method.loss(image.float(), visible)["loss"]
            found.backward()
            assert found.dtype == torch.float32
            loss.append(found.item())
            direction.append(
                torch.cat([value.grad.flatten() for value in method.parameters() if value.grad is not None])
            )
    packed, masked, packed_lowered, masked_lowered = direction
    assert loss[2] == pytest.approx(loss[0], rel=0.02)
    near, peer = (float(F.cosine_similarity(a, b, 0)) for a, b in [(packed, packed_lowered), (masked, masked_lowered)])
    assert near > 0.9
    assert 1 - near < 2 * (1 - peer)


def test_no_hidden_pixel_is_read() -> None:
    packed, _ = pair("bottleneck")
    image, visible = example(packed, 3, 0)
    hidden = ~visible.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    other = torch.where(hidden, torch.nan, image)
    for one, two in zip(*(packed.encode(pixels, packed.where(visible)) for pixels in (image, other)), strict=True):
        assert torch.equal(one, two)


def test_a_path_is_dropped_for_an_image_and_by_the_same_draws() -> None:
    packed, masked = pair("convnext", drop_path_rate=0.6)
    image, visible = example(packed, 5, 0)
    losses = []
    for method in (packed, masked):
        torch.manual_seed(3)
        losses.append(method.loss(image, visible)["loss"])
    assert worst(losses[0], losses[1]) < TOLERANCE
    torch.manual_seed(4)
    assert worst(packed.loss(image, visible)["loss"], losses[0]) > 1e-6


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = pair("basic")
    image, visible = example(packed, 2, 0)
    packed.loss(image, visible)
    assert not any("forward" in vars(module) for module in packed.encoder.modules())
    monkeypatch.setattr(Cells, "halo", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed.encode(image, packed.where(visible))
    assert not any("forward" in vars(module) for module in packed.encoder.modules())


@settings(max_examples=40, deadline=None)
@given(
    side=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([3, 5, 7]),
    dilation=st.integers(1, 3),
    depthwise=st.booleans(),
    kind=st.sampled_from(["tile", "gemm", "dense"]),
    seed=st.integers(0, 1000),
)
def test_every_way_of_a_convolution_gives_the_same(
    side: int, size: int, dilation: int, depthwise: bool, kind: str, seed: int
) -> None:
    if depthwise and kind == "gemm":
        kind = "tile"
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(2, 3, 4, generator=generator) < 0.5
    visible[1, 2, 3] = True
    cells = Cells(visible)
    start = torch.randn(cells.count, 6, side, side, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 1 if depthwise else 6, size, size, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    out = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    seen = []
    for way in (kind, None):
        feature, kernel, shift = (value.clone().requires_grad_() for value in (start, weight, bias))
        if way is None:
            reach = dilation * (size - 1) // 2
            dense = F.conv2d(cells.dense(feature), kernel, shift, 1, reach, dilation, 6 if depthwise else 1)
            rows = dense.permute(0, 2, 3, 1).reshape(-1, 6)[cells.places(side)]
            made = rows.view(cells.count, side, side, 6).permute(0, 3, 1, 2)
        else:
            made = _SameConv.apply(feature, kernel, shift, cells, dilation, way)
        seen.append((made, *torch.autograd.grad((made * out).sum(), (feature, kernel, shift))))
    for mine, theirs in zip(*seen, strict=True):
        assert worst(mine, theirs) < TOLERANCE


def test_every_size_of_a_cell_has_a_way() -> None:
    assert {_route(side, depthwise=False) for side in (1, 2, 4, 8, 16)} == {"tile", "gemm"}
    assert {_route(side, depthwise=True) for side in (1, 2, 4, 8, 16)} == {"tile", "dense"}


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (nn.AvgPool2d(3, 2, 1), "average pooling over neighbours"),
        (nn.Conv2d(8, 8, (3, 1), padding=(1, 0)), "unlike along its axes"),
        (nn.Conv2d(8, 8, 3, padding="same"), "unlike along its axes"),
        (nn.GroupNorm(2, 8), "is a GroupNorm, which has no sparse form"),
    ],
)
def test_what_has_no_packed_form_is_refused_by_name(module: nn.Module, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_packed(nn.Sequential(module))


def test_nothing_visible_and_a_single_site_are_refused() -> None:
    with pytest.raises(UsageError, match="no patch of this batch is visible"):
        Cells(torch.zeros(2, 3, 3, dtype=torch.bool))
    packed, _ = pair("basic")
    visible = torch.zeros(2, *packed.grid, dtype=torch.bool)
    visible[1, 0, 0] = True
    with pytest.raises(UsageError, match="1 visible site in the batch: no variance"):
        packed.loss(torch.rand(2, 1, 64, 64, dtype=torch.float64), visible)
