"""Pyramids on encoders of several scales, of few, and of one."""

import pytest
import torch

from shared.backbones import build
from shared.errors import ConfigError
from stage3_finetune.pyramid import ENCODER, Pyramid


@pytest.mark.parametrize(
    ("name", "stride", "args", "strides"),
    [
        ("test_resnet", None, {}, (4, 8, 16, 32)),
        ("resnet10t", 8, {}, (4, 8)),
        ("resnet10t", 16, {}, (4, 8, 16)),
        ("test_vit", None, {"patch_size": 16}, (4, 8, 16, 32)),
        ("test_vit", None, {"patch_size": 8}, (4, 8, 16, 32)),
    ],
)
def test_every_level_has_its_stride_and_width(name, stride, args, strides) -> None:
    backbone = build(name, in_chans=1, output_stride=stride, model_args=args, size_px=64)
    pyramid = Pyramid(backbone, 16)
    assert pyramid.strides == strides
    levels = pyramid(torch.rand(2, 1, 64, 64))
    assert [tuple(level.shape) for level in levels.values()] == [
        (2, 16, 64 // stride, 64 // stride) for stride in (*strides, 2 * strides[-1])
    ]
    assert list(levels) == [*map(str, range(len(strides))), "pool"]
    assert {name for name in pyramid.state_dict() if name.startswith(ENCODER)} == {
        f"{ENCODER}{name}" for name in backbone.model.state_dict()
    }
    sum(level.sum() for level in levels.values()).backward()
    assert all(value.grad is not None for value in pyramid.top.parameters())


def test_other_strides_are_refused() -> None:
    backbone = build("test_vit", in_chans=1, model_args={"patch_size": 14}, size_px=56)
    with pytest.raises(ConfigError, match="features of stride 14 px; detection needs powers of two"):
        Pyramid(backbone, 16)
