"""MAE on packed visible tokens: the loss of one image at a time, in float64, for unmodified ViTs of timm."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.backbones import build
from shared.errors import ConfigError, UsageError
from stage2_pretrain.methods.mae import MAE, MAEOptions, sincos
from stage2_pretrain.methods.tokens import Tokens, _attend_by_length, _drop_path, check_vit, looked_at
from tests.stage2_pretrain.methods import naive_vit as naive
from tests.stage2_pretrain.methods.promises import check_hidden_unread, check_loss

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
NETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers without positions, layer scale": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.3},
    "queries and keys normalised": {"qk_norm": True, "qkv_bias": False},
    "any size": {"dynamic_img_size": True},
}
TOLERANCE = 1e-11


def method(net: str = "plain", in_chans: int = 1, options: dict[str, Any] | None = None, **more: Any) -> MAE:
    backbone = build("vit_tiny_patch16_224", in_chans=in_chans, model_args={**TINY, **NETS[net], **more}, size_px=32)
    told = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, **(options or {})}
    made = MAE(MAEOptions(**told), backbone, size_px=32, seed=2).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the zeros and ones of a fresh network
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return made.train()


def example(made: MAE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 1, 7, 0, all, 7 and some visible patches."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(6, made.backbone.in_chans, 32, 32, generator=generator, dtype=torch.float64)
    visible = torch.zeros(6, 16, dtype=torch.bool)
    for row, count in enumerate((1, 7, 0, 16, 7, 3 + seed)):
        visible[row, torch.randperm(16, generator=generator)[:count]] = True
    return image, visible.view(6, 4, 4)


def naive_loss(made: MAE, image: Tensor, visible: Tensor) -> Tensor:
    """One image after another, its visible patches alone."""
    model, p, errors = made.encoder, made.patch_px, []
    for pixels, seen in zip(image, visible, strict=True):
        places = [(i, j) for i in range(4) for j in range(4)]
        shown = [place for place in places if seen[place]]
        first = naive.first_tokens(model)
        rows = [naive.embed(model, naive.window(pixels, i, j, p)) + naive.position(model, 4 * i + j) for i, j in shown]
        drawn = iter(naive.linear(naive.encode(model, first + rows), made.embed)) if first + rows else iter(())
        tokens = [next(drawn) for _ in first]
        for i, j in places:
            row = next(drawn) if (i, j) in shown else made.token
            tokens.append(row + naive.sines(i, j, len(made.token)))
        x = torch.stack(tokens)
        for module in made.decoder:
            x = naive.block(x, module)
        x = naive.linear(naive.norm(x, made.norm), made.to_pixels)[len(first) :]
        for row, (i, j) in enumerate(places):
            if not seen[i, j]:
                target = naive.window(pixels, i, j, p)
                target = naive.normalised(target) if made.norm_target else target
                errors.append(((x[row].view(p, p, -1).permute(2, 0, 1) - target) ** 2).mean())
    return sum(errors) / len(errors)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("norm_target", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_it_is_the_loss_of_one_image_at_a_time(net: str, norm_target: bool) -> None:
    options = {"norm_target": norm_target, "positions": "sincos" if norm_target else "learned"}
    made = method(net, 3 if net == "plain" else 1, options)
    image, visible = example(made)
    trained = [(name, value) for name, value in made.named_parameters() if value.requires_grad]
    unused = {name for name, _ in trained if name.startswith("encoder.fc_norm")}
    assert unused == ({"encoder.fc_norm.weight", "encoder.fc_norm.bias"} if net == "no class token" else set())
    trained = [(name, value) for name, value in trained if name not in unused]
    expected = naive_loss(made, image, visible)
    check_loss(made, image, visible, expected, trained, TOLERANCE)


@pytest.mark.parametrize("net", NETS)
def test_with_everything_visible_it_is_timms_own_network(net: str) -> None:
    made = method(net).eval()
    image, _ = example(made)
    seen = torch.ones(6, 16, dtype=torch.bool)
    tokens = Tokens(seen, made.prefix)
    mine = made.encode(image, tokens, seen).view(6, 16 + made.prefix, -1)
    assert worst(mine, made.encoder.forward_features(image)) < TOLERANCE
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, img_size=32, **TINY, **NETS[net])
    assert made.encoder.state_dict().keys() == fresh.state_dict().keys()


def test_no_hidden_pixel_is_read() -> None:
    made = method("plain")
    image, visible = example(made)
    check_hidden_unread(made, image, visible, at_least=20)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 16), min_size=1, max_size=6), st.integers(0, 1000))
def test_an_image_does_not_know_its_batch(counts: list[int], seed: int) -> None:
    made = method("registers without positions, layer scale").eval()
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(len(counts), 1, 32, 32, generator=generator, dtype=torch.float64)
    visible = torch.zeros(len(counts), 16, dtype=torch.bool)
    for row, count in enumerate([max(counts[0], 1), *counts[1:]]):
        visible[row, torch.randperm(16, generator=generator)[:count]] = True
    whole = made.features(image, visible.view(-1, 4, 4))
    for row in range(len(counts)):
        if visible[row].any():
            alone = made.features(image[row : row + 1], visible[row : row + 1].view(1, 4, 4))
            assert worst(whole[row], alone[0]) < TOLERANCE


def test_the_sequence_is_what_xformers_would_be_told() -> None:
    fmha = pytest.importorskip("xformers.ops").fmha
    made = method("no class token")
    _, visible = example(made)
    tokens = Tokens(visible.flatten(1), 0)
    assert tokens.lengths == [1, 3, 7, 7, 16]
    assert isinstance(tokens.blocks, fmha.attn_bias.BlockDiagonalMask)
    count = len(tokens.image)
    mask = tokens.blocks.materialize((count, count), dtype=torch.float64)
    assert torch.equal(mask == 0, tokens.image[:, None] == tokens.image)
    q, k, v = torch.randn(3, count, 2, 4, dtype=torch.float64).unbind(0)
    scores = torch.einsum("qhk,thk->hqt", q, k) / 2 + mask
    expected = torch.einsum("hqt,thk->qhk", scores.softmax(-1), v)
    assert worst(_attend_by_length(q, k, v, tokens.lengths, 0.0), expected) < TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="xformers has no kernel for a CPU")
def test_on_a_gpu_it_is_the_same() -> None:
    made = method("plain").float().cuda()
    image, visible = example(made)
    on_gpu = made.loss(image.float().cuda(), visible.cuda())["loss"]
    assert abs(float(on_gpu) - float(method("plain").loss(image, visible)["loss"])) < 1e-4


@pytest.mark.parametrize("net", NETS)
def test_it_runs_in_bfloat16(net: str) -> None:
    made = method(net).float()
    image, visible = example(made)
    exact = made.loss(image.float(), visible)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss(image.float(), visible)["loss"]
        drawn = made.reconstruct(image.float(), visible)
    loss.backward()
    assert abs(float(loss.detach()) - float(exact.detach())) < 0.05 * float(exact.detach())
    assert drawn.isfinite().all()
    assert all(value.grad.isfinite().all() for value in made.parameters() if value.grad is not None)


def test_a_path_is_dropped_for_an_image() -> None:
    made = method("plain", drop_path_rate=0.5)
    _, visible = example(made)
    tokens = Tokens(visible.flatten(1), 1)
    drop = made.encoder.blocks[1].drop_path1
    torch.manual_seed(0)
    kept = _drop_path(drop, tokens, torch.ones(1, len(tokens.image), 5))[0]
    seen = set()
    for image in range(6):
        rows = kept[tokens.image == image]
        assert len(rows) == int(visible[image].sum()) + 1
        assert len(rows.unique()) == 1
        seen.add(float(rows[0, 0]))
    assert seen == {0.0, 2.0}
    image, visible = example(made)
    losses = [float(made.loss(image, visible)["loss"].detach()) for _ in range(2)]
    assert losses[0] != losses[1]
    made.eval()
    assert made.loss(image, visible)["loss"] == made.loss(image, visible)["loss"]


def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    made = method("plain", drop_path_rate=0.5)
    image, visible = example(made)
    made.loss(image, visible)
    monkeypatch.setattr(Tokens, "attend", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.loss(image, visible)
    assert not any("forward" in vars(module) for module in made.modules())


def test_positions_are_sines_or_timms_own() -> None:
    fixed, learned = (method("plain", options={"positions": kind}).encoder.pos_embed for kind in ("sincos", "learned"))
    assert (fixed.requires_grad, learned.requires_grad) == (False, True)
    expected = torch.stack([naive.sines(i, j, 24) for i in range(4) for j in range(4)])
    assert worst(fixed[0, 1:], expected) < 1e-6
    assert not fixed[0, 0].any()
    assert learned.detach().abs().mean() < 0.2
    assert torch.equal(sincos((2, 3), 8)[3], naive.sines(1, 0, 8).float())


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet18", {}, "resnet18 is a ResNet, expected a plain VisionTransformer"),
        ("swin_tiny_patch4_window7_224", {}, "is a SwinTransformer, expected"),
        ("vit_relpos_small_patch16_224", {}, "is a VisionTransformerRelPos, expected"),
        ("vit_small_patch16_rope_224", {}, "is a Eva, expected"),
        ("vit_tiny_r_s16_p8_224", {}, "cuts by a HybridEmbed, expected square patches"),
        ("vit_tiny_patch16_224", {"patch_size": [8, 16]}, "cuts by a PatchEmbed, expected square patches"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "has no position embedding"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "drops patches by itself"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff", "num_heads": 4}, r"blocks.0.attn of .* is a DiffAttention"),
    ],
)
def test_what_is_no_plain_vit_is_refused_by_name(name: str, args: dict[str, Any], message: str) -> None:
    depth = {"depth": 1} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=0, **{**depth, **args})
    with pytest.raises(ConfigError, match=message):
        check_vit(model, name, tokenwise=True)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="decoder_width: 18, expected a multiple of 4 and of 2 heads"):
        method("plain", options={"decoder_width": 18})
    with pytest.raises(ConfigError, match="size_px: 36 is no multiple of the encoder's stride 8"):
        build("vit_tiny_patch16_224", in_chans=1, model_args=TINY, size_px=36)
    with pytest.raises(ConfigError, match=r"backbone_options.img_size: 224, but size_px is 32"):
        method("plain", img_size=224)


def test_nothing_hidden_or_nothing_visible_is_an_error() -> None:
    made = method("plain")
    image, visible = example(made)
    with pytest.raises(UsageError, match="nothing to learn"):
        made.loss(image, torch.ones_like(visible))
    with pytest.raises(UsageError, match="no patch of this batch is visible"):
        made.loss(image, torch.zeros_like(visible))


@pytest.mark.parametrize(("net", "args"), [("vit_tiny_patch16_224", {}), ("vit_tiny_patch16_224", {"qk_norm": True})])
@pytest.mark.parametrize("class_token", [True, False])
def test_attention_is_what_timm_mixes_by(net: str, args: dict, class_token: bool) -> None:
    more = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model: Any = timm.create_model(net, img_size=64, depth=2, embed_dim=24, num_heads=3, **args, **more).eval()
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mixing, seen = model.blocks[-1].attn, []
    mixing.fused_attn = False
    mixing.attn_drop.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.no_grad():
        model.forward_features(image)
        found = looked_at(model, image)
    expected = seen[0].mean(1)
    expected = expected[:, 0, 1:] if class_token else expected.mean(1)
    torch.testing.assert_close(found, expected)
