"""The decoder on pyramids of every kind: an answer for each pixel, weights by the seed, detail from the image."""

import pytest
import torch

from shared.backbones import build
from stage3_finetune.segmentation.decoder import SegmentationModel

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}
CASES = [
    ("resnet18", 64, 16, SMALL),
    ("resnet18", 72, None, SMALL),  # no multiple of the stride
    ("convnext_atto", 64, None, {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    ("vit_tiny_patch16_224", 64, None, {**VIT, "patch_size": 8}),
    ("vit_tiny_patch16_224", 64, None, VIT),
    ("vit_tiny_patch16_224", 56, None, {**VIT, "patch_size": 14}),
]


def model(name: str = "resnet18", side: int = 64, stride: int | None = 16, args=None, seed: int = 0):
    backbone = build(name, in_chans=1, output_stride=stride, model_args=args or SMALL, size_px=side, seed=7)
    return SegmentationModel(backbone, 3, width=8, seed=seed).eval()


@pytest.mark.parametrize(("name", "side", "stride", "args"), CASES)
def test_each_pixel_has_an_answer_that_every_scale_moves(name: str, side: int, stride, args) -> None:
    made = model(name, side, stride, args)
    image = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    logits = made(image)
    assert logits.shape == (2, 3, side, side)
    logits.square().mean().backward()
    still = [key for key, value in made.named_parameters() if value.grad is None or not value.grad.any()]
    assert [key for key in still if key.startswith("decoder.")] == []
    features = [feature.detach().requires_grad_() for feature in made._backbone.features(image)]
    made.decoder(image, features).square().mean().backward()
    assert all(feature.grad is not None and feature.grad.any() for feature in features)


def test_weights_are_a_function_of_the_seed_and_leave_torch_alone() -> None:
    torch.manual_seed(1)
    first, before = model(), torch.random.get_rng_state()
    again, other = model(), model(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = "decoder.deepest.0.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in first.state_dict().items() if k.startswith("encoder."))
