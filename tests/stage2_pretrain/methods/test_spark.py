"""SparK against a slow reference in float64, and against its own promise: no hidden pixel is seen."""

import pytest
import torch

from shared.backbones import build
from shared.errors import ConfigError, UsageError
from stage2_pretrain.methods import METHODS
from stage2_pretrain.methods.pixels import normalise, patches, unpatch
from stage2_pretrain.methods.spark import SparK, SparKOptions
from stage2_pretrain.methods.sparse import Sites
from tests.stage2_pretrain.methods import naive

# At least 8 channels: oneDNN (torch 2.14) corrupts the heap in the backward pass of a channels-last 1x1 stride-2
# convolution with fewer input channels.
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 12, 12]}
NETS = {
    "basic": ("resnet18", 16, SMALL),
    "bottleneck": ("resnet50", 16, SMALL),
    "own stride": ("resnet18", None, SMALL),
    "deep stem, average shortcut": ("resnet10t", None, {**SMALL, "stem_width": 8}),
}
TOLERANCE = 1e-10


def randomise(module: torch.nn.Module) -> None:
    """Away from the zeros and ones of a fresh network, where a test would see no difference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                value.copy_(0.5 + noise)
            elif value.is_floating_point() and value.dim() == 1:
                value.copy_(noise - 0.3 if "bias" in name or "mean" in name else 0.6 + noise)


def method(net: str = "basic", size_px: int = 64, in_chans: int = 1, width: int = 32) -> SparK:
    name, stride, args = NETS[net]
    backbone = build(name, in_chans=in_chans, output_stride=stride, model_args=args, seed=2)
    made = SparK(SparKOptions(decoder_width=width), backbone, size_px=size_px, seed=2).double()
    randomise(made)
    return made.train()


def example(made: SparK, batch: int = 2):
    generator = torch.Generator().manual_seed(0)
    side = made.grid[0] * made.patch_px
    image = torch.rand(batch, made.backbone.in_chans, side, side, generator=generator, dtype=torch.float64)
    visible = torch.rand(batch, *made.grid, generator=generator) < 0.45
    visible[:, 0, 0], visible[:, -1, 0], visible[:, 0, -1] = True, False, True
    return image, visible


def worst(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    return float((found - expected).detach().abs().max() / max(float(expected.detach().abs().max()), floor))


@pytest.mark.parametrize("net", NETS)
def test_equals_the_reference_in_float64(net):
    made = method(net, size_px=64)
    image, visible = example(made)
    stats: dict = {}
    with torch.no_grad():
        stages = naive.features(made.encoder, image, visible, {})
    expected_loss = naive.loss(made, image, visible, stats)
    names = [name for name, _ in made.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(expected_loss, list(made.parameters())), strict=True))

    loss = made.loss(image, visible)["loss"]
    loss.backward()
    assert worst(loss, expected_loss) < TOLERANCE
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, parameter in made.named_parameters():
        # A bias in front of a BatchNorm has no true gradient: only rounding is left, hence the floor.
        assert worst(parameter.grad, expected[name], 1e-4 * largest) < TOLERANCE, name
    for bn, (mean, variance) in stats.items():
        assert worst(bn.running_mean, mean) < TOLERANCE
        assert worst(bn.running_var, variance) < TOLERANCE
        assert bn.num_batches_tracked == 1

    with torch.no_grad():
        features = made.encode(image, Sites(visible))
    last = {stage.shape[2]: stage for stage in stages}
    assert [feature.shape[2] for feature in features] == sorted(last, reverse=True)
    for feature in features:
        assert worst(feature, last[feature.shape[2]]) < TOLERANCE


@pytest.mark.parametrize("net", NETS)
def test_hidden_pixels_reach_neither_features_nor_encoder_gradients(net):
    made = method(net)
    image, visible = example(made)
    other = torch.where(Sites(visible).active(64, 64), image, torch.rand_like(image) * 9 - 4)
    assert not torch.equal(image, other)
    seen = []
    for pixels in (image, other):
        made.zero_grad()
        features = made.encode(pixels, Sites(visible))
        sum((feature * feature.detach().cos()).sum() for feature in features).backward()
        seen.append((features, {name: value.grad.clone() for name, value in made.encoder.named_parameters()}))
    for first, second in zip(*[features for features, _ in seen], strict=True):
        assert torch.equal(first, second)
    for name, gradient in seen[0][1].items():
        assert torch.equal(gradient, seen[1][1][name]), name
        assert gradient.abs().max() > 0, name


def test_convnext_is_sparse_too():
    args = {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12], "ls_init_value": 0.5}
    backbone = build("convnext_atto", in_chans=1, model_args=args, seed=1)
    made = SparK(SparKOptions(decoder_width=32), backbone, size_px=64, seed=1).double()
    randomise(made)
    image, visible = example(made)
    other = torch.where(Sites(visible).active(64, 64), image, image + 1)
    for first, second in zip(made.encode(image, Sites(visible)), made.encode(other, Sites(visible)), strict=True):
        assert torch.equal(first, second)
        assert (first * ~Sites(visible).active(*first.shape[2:])).abs().max() == 0
        assert first.abs().max() > 0
    # With everything visible it is timm's own network.
    all_visible = torch.ones_like(visible)
    for first, second in zip(made.encode(image, Sites(all_visible)), backbone.features(image), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
def test_with_everything_visible_it_is_the_plain_network(net):
    made = method(net).eval()
    image, visible = example(made)
    for first, second in zip(
        made.encode(image, Sites(torch.ones_like(visible))), made.backbone.features(image), strict=True
    ):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_the_encoder_is_left_as_it_was():
    made = method()
    before = list(made.encoder.state_dict())
    image, visible = example(made)
    made.loss(image, visible)
    visible[:] = False
    with pytest.raises(UsageError, match="no patch of this batch is visible"):
        made.loss(image, visible)
    assert list(made.encoder.state_dict()) == before
    assert not any("forward" in vars(module) for module in made.encoder.modules())


def test_training_learns_what_is_hidden():
    made = method("basic").float()
    image, visible = (x.float() if x.is_floating_point() else x for x in example(made, batch=4))
    image = torch.nn.functional.avg_pool2d(image, 9, 1, 4)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = made.loss(image, visible)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_reconstruct_keeps_the_visible_and_the_mode():
    made = method()
    image, visible = example(made)
    drawn = made.reconstruct(image, visible)
    active = Sites(visible).active(64, 64)
    assert torch.equal(torch.where(active, drawn, image), image)
    assert (drawn - image).abs().amax() > 0
    assert made.training
    assert torch.equal(drawn, made.reconstruct(image, visible))


def test_patches_and_back():
    image = torch.rand(2, 3, 32, 48)
    cut = patches(image, 16)
    assert cut.shape == (2, 6, 768)
    assert torch.equal(unpatch(cut, 16, 3, (2, 3)), image)
    normed, mean, deviation = normalise(cut)
    torch.testing.assert_close(normed * deviation + mean, cut)
    flat, _, _ = normalise(torch.full((1, 4), 0.5))
    assert torch.equal(flat, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("size_px", "width", "name", "args", "message"),
    [
        (72, 32, "resnet18", SMALL, "size_px: 72 is no multiple of the encoder's stride 32"),
        (64, 48, "resnet18", SMALL, "decoder_width: 48, expected a multiple of the stride 32"),
        (64, 32, "seresnet18", SMALL, "layer1.0.se is a SEModule, which has no sparse form"),
        (64, 32, "resnetblur18", SMALL, "maxpool.1 is a .*, which has no sparse form"),
        (64, 32, "mobilenetv3_small_050", {}, "which has no sparse form"),
    ],
)
def test_refuses_by_name(size_px, width, name, args, message):
    backbone = build(name, in_chans=1, model_args=args)
    with pytest.raises(ConfigError, match=message):
        SparK(SparKOptions(decoder_width=width), backbone, size_px=size_px, seed=0)


def test_nothing_hidden_or_one_site_is_an_error():
    made = method(size_px=64)
    image, visible = example(made)
    with pytest.raises(UsageError, match="nothing to learn"):
        made.loss(image, torch.ones_like(visible))
    visible[:] = False
    visible[0, 0, 0] = True
    with pytest.raises(UsageError, match="1 visible site"):
        made.loss(image, visible)


def made_with(size_px: int = 64, stride: int = 32, **options) -> SparK:
    backbone = build("resnet18", in_chans=1, output_stride=stride, model_args=SMALL, seed=0)
    return SparK(SparKOptions(decoder_width=32, **options), backbone, size_px=size_px, seed=0).double().train()


def test_a_finer_grid_is_the_coarse_one_where_it_hides_whole_positions():
    coarse, fine = made_with(execution="masked"), made_with(execution="masked", patch_px=8)
    assert (coarse.grid, fine.grid) == ((2, 2), (8, 8))
    image, visible = example(coarse)
    finer = visible.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for one, other in zip(coarse.encode(image, Sites(visible)), fine.encode(image, Sites(finer)), strict=True):
        assert torch.equal(one, other)


def test_a_position_is_active_where_any_of_its_pixels_is_visible():
    made = made_with(execution="masked", patch_px=8)
    image = torch.rand(2, 1, 64, 64, dtype=torch.float64)
    visible = torch.zeros(2, 8, 8, dtype=torch.bool)
    visible[0, 1, 2] = visible[1, 0, 7] = visible[1, 5, 1] = True
    sites = Sites(visible)
    assert sites.active(2, 2)[:, 0].tolist() == [[[True, False], [False, False]], [[False, True], [True, False]]]
    assert (sites.count(2, 2), sites.count(4, 4), sites.count(8, 8), sites.count(16, 16)) == (3, 3, 3, 12)
    features = made.encode(image, sites)
    for feature in features:
        on = sites.active(*feature.shape[2:]).expand_as(feature)
        assert not feature[~on].any()
    hidden = ~visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(hidden, torch.rand_like(image), image)
    for one, two in zip(features, made.encode(other, sites), strict=True):
        assert torch.equal(one, two)  # of an active position only visible pixels are read
    made.loss(image, visible)["loss"].backward()
    assert made.attention(image).shape == made.errors(image, visible).shape == (2, 64)
    assert made.attention(image).view(2, 2, 4, 2, 4).std((2, 4)).max() < 1e-12


@pytest.mark.parametrize("stride", [16, 32])
def test_the_lean_decoder_draws_and_learns_without_norms(stride):
    made = made_with(stride=stride, decoder="lean")
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in made.decoder.modules())
    image, visible = example(made)
    assert made(image, visible).shape == image.shape
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = made.loss(image, visible)["loss"]
        loss.backward()
        assert all(value.grad is not None for value in made.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_px": 8}, "method.patch_px: 8, finer than the encoder's stride 32: expected execution=masked"),
        ({"patch_px": 24, "execution": "masked"}, "method.patch_px: 24, expected a divisor of the encoder's stride 32"),
        ({"patch_px": 64, "execution": "masked"}, "method.patch_px: 64, expected a divisor"),
    ],
)
def test_patches_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        made_with(**options)


def test_the_table_knows_it():
    assert METHODS.load("spark") is SparK
