"""Backbones: scales as they are, weights by names, exports that timm itself reads."""

import json

import pytest
import timm
import torch

from shared.backbones import build, export_encoder, has_size, load_encoder, resize, resolve_options
from shared.errors import ConfigError, CorruptError, InputMissingError

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}
CASES = [
    ("resnet18", 1, None, SMALL),
    ("resnet18", 3, 16, SMALL),
    ("resnet18", 1, 8, SMALL),
    ("convnext_atto", 1, 16, {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    ("convnextv2_atto", 1, None, {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    ("vit_tiny_patch16_224", 1, None, {**VIT, "patch_size": 8}),
    ("vit_tiny_patch16_224", 3, None, {**VIT, "class_token": False, "global_pool": "avg", "dynamic_img_size": True}),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}")
def backbone(request):
    name, in_chans, stride, args = request.param
    built = build(name, in_chans=in_chans, output_stride=stride, model_args=args, size_px=64, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # every value different from what a constructor would give
        for value in built.model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator) * 0.1)
    built.model.eval()
    return built


def test_features_are_as_announced(backbone):
    image = torch.rand(2, backbone.in_chans, 64, 64)
    features = backbone.features(image)
    if backbone.name.startswith("vit"):
        assert backbone.reductions == (backbone.model_args.get("patch_size", 16),)
        assert backbone.model_args["img_size"] == 64
    else:
        assert backbone.stride == (backbone.output_stride or 32)
        assert backbone.reductions == tuple(r for r in (4, 8, 16, 32) if r <= backbone.stride)
        assert "img_size" not in backbone.model_args
    assert backbone.grid(64) == (64 // backbone.stride,) * 2
    for feature, reduction, channels in zip(features, backbone.reductions, backbone.channels, strict=True):
        assert feature.shape == (2, channels, 64 // reduction, 64 // reduction)
    whole = backbone.model.forward_features(image)
    if whole.dim() == 3:  # a ViT's: normalised tokens, the class token first
        tokens = features[-1].flatten(2).transpose(1, 2)
        whole, features[-1] = whole[:, backbone.model.num_prefix_tokens :], backbone.model.norm(tokens)
    torch.testing.assert_close(features[-1], whole, rtol=0, atol=0)


def test_timm_reads_an_export_to_the_bit(backbone, tmp_path):
    export_encoder(
        backbone, tmp_path / "encoder", size_px=64, mean=[0.5] * backbone.in_chans, std=[0.25] * backbone.in_chans
    )
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == ["config.json", "model.safetensors"]
    image = torch.rand(2, backbone.in_chans, 64, 64)
    expected = backbone.model(image)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    assert theirs.state_dict().keys() == backbone.model.state_dict().keys()
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    assert torch.equal(theirs(image), expected)
    assert (
        theirs.pretrained_cfg["mean"] == (0.5,) * backbone.in_chans
        or theirs.pretrained_cfg["mean"] == [0.5] * backbone.in_chans
    )
    ours = load_encoder(tmp_path / "encoder")
    ours.model.eval()
    assert torch.equal(ours.model(image), expected)
    assert (ours.reductions, ours.in_chans, ours.output_stride) == (
        backbone.reductions,
        backbone.in_chans,
        backbone.output_stride,
    )


def test_an_export_can_be_adapted_by_timm(tmp_path):
    built = build("resnet18", in_chans=1, output_stride=16, model_args=SMALL)
    export_encoder(built, tmp_path, size_px=64, mean=[0.5], std=[0.25])
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=3)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    assert torch.equal(model.layer4[0].conv1.weight, built.model.layer4[0].conv1.weight)


def test_a_vit_is_resized_as_timm_does(tmp_path):
    built = build("vit_tiny_patch16_224", in_chans=1, model_args=VIT, size_px=64, seed=1)
    export_encoder(built, tmp_path, size_px=64, mean=[0.5], std=[0.25])
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=96).eval()
    ours = resize(load_encoder(tmp_path), 96)
    image = torch.rand(2, 1, 96, 96)
    assert torch.equal(ours.model.eval()(image), theirs(image))
    assert (ours.model_args["img_size"], ours.grid(96)) == (96, (6, 6))
    assert resize(ours, 96) is ours
    with pytest.raises(ConfigError, match="size_px: 100 is no multiple of the encoder's stride 16"):
        resize(ours, 100)
    convolutional = build("resnet18", in_chans=1, model_args=SMALL)
    assert resize(convolutional, 96) is convolutional


def test_a_size_that_an_architecture_does_not_take():
    with pytest.raises(ConfigError, match=r"backbone_options.img_size: 32, but size_px is 64") as caught:
        build("vit_tiny_patch16_224", in_chans=1, model_args={**VIT, "img_size": 32}, size_px=64)
    assert "leave img_size out" in caught.value.hint
    with pytest.raises(ConfigError, match="size_px: 72 is no multiple of the encoder's stride 16"):
        build("vit_tiny_patch16_224", in_chans=1, model_args=VIT, size_px=72)
    with pytest.raises(ConfigError, match="output_stride") as caught:
        build("vit_tiny_patch16_224", in_chans=1, output_stride=16, model_args=VIT)
    assert caught.value.hint == "a ViT takes patch_size instead"


def test_auto_options_are_what_the_architecture_takes():
    assert resolve_options("resnet50", "auto") == resolve_options("convnextv2_atto", "auto") == {"output_stride": 16}
    assert resolve_options("vit_small_patch16_224", "auto") == {}
    assert resolve_options("resnet50", {"output_stride": 8}) == {"output_stride": 8}
    assert [has_size(name) for name in ("resnet50", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224")] == [
        False,
        True,
        True,
    ]
    with pytest.raises(ConfigError, match="unknown backbone 'resnet81'"):
        resolve_options("resnet81", "auto")


def test_initial_weights_follow_the_seed_alone():
    def weights(seed, junk):
        torch.manual_seed(junk)
        before = torch.get_rng_state()
        state = build("resnet18", in_chans=1, model_args=SMALL, seed=seed).model.state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        return state["layer1.0.conv1.weight"]

    assert torch.equal(weights(0, 1), weights(0, 2))
    assert not torch.equal(weights(0, 1), weights(1, 1))


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match="unknown backbone 'resnet81'") as caught:
        build("resnet81", in_chans=1)
    assert "resnet18" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match=r"output_stride.*7"):
        build("resnet18", in_chans=1, output_stride=7)
    with pytest.raises(ConfigError, match="no_such_argument"):
        build("vgg11", in_chans=1, model_args={"no_such_argument": 1})


def test_broken_encoders_are_named(tmp_path):
    with pytest.raises(InputMissingError):
        load_encoder(tmp_path / "none")
    built = build("resnet18", in_chans=1, model_args=SMALL)
    export_encoder(built, tmp_path, size_px=64, mean=[0.5], std=[0.25])
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["channels"] = [8, 16, 16, 25]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match=r"layer4.* shape .*24.*, expected .*25"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CorruptError, match="not an encoder"):
        load_encoder(tmp_path)
