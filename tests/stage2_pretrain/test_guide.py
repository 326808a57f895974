"""A teacher judges every patch while it is hidden, and moves with the weights."""

import numpy as np
import pytest
import torch
from torch import nn

from shared.backbones import build
from shared.rng import sample_keys
from stage2_pretrain.guide import Guide
from stage2_pretrain.methods.spark import SparK, SparKOptions


class Planted(nn.Module):
    """Errors are a patch's number where it is hidden, and huge where it is seen."""

    grid = (3, 5)

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.asked: list[torch.Tensor] = []

    def errors(self, image, visible):
        self.asked.append(~visible.flatten(1))
        number = torch.arange(15.0).expand(len(image), 15) + self.offset
        return torch.where(visible.flatten(1), 1e9, number)

    def attention(self, image):
        return image.flatten(1)[:, :15]


def test_every_patch_is_judged_while_hidden_by_halves():
    guide = Guide(Planted(), "loss", seed=3)
    keys = sample_keys(["a", "b", "c"])
    score = guide.score(torch.zeros(3, 1, 6, 10), keys, 0)
    assert np.array_equal(score, np.tile(np.arange(15, dtype=np.float32), (3, 1)))
    one, other = guide.teacher.asked
    assert (one ^ other).all()
    assert one.sum(1).tolist() == [8, 8, 8]
    assert len({tuple(row.tolist()) for row in one}) == 3
    guide.score(torch.zeros(1, 1, 6, 10), keys[1:2], 0)
    assert torch.equal(guide.teacher.asked[2][0], one[1])  # whatever the batch
    guide.score(torch.zeros(1, 1, 6, 10), keys[1:2], 1)
    assert not torch.equal(guide.teacher.asked[4][0], one[1])


def test_attention_is_what_the_method_says():
    image = torch.rand(2, 1, 6, 10)
    guide = Guide(Planted(), "attention", seed=3)
    assert np.array_equal(guide.score(image, sample_keys(["a", "b"]), 0), image.flatten(1)[:, :15].numpy())


def test_the_teacher_is_moved_by_its_state_dict_and_by_nothing_else():
    method = Planted()
    guide = Guide(method, "loss", seed=3)
    average = guide.teacher.state_dict()
    with torch.no_grad():
        method.offset += 5
    assert guide.score(torch.zeros(1, 1, 6, 10), sample_keys(["a"]), 0)[0, 0] == 0
    average["offset"].fill_(2.0)
    assert guide.score(torch.zeros(1, 1, 6, 10), sample_keys(["a"]), 0)[0, 0] == 2
    assert not any(parameter.requires_grad for parameter in guide.teacher.parameters())


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_spark_s_errors_average_to_its_loss(execution):
    backbone = build("resnet18", in_chans=1, output_stride=16, model_args={"layers": [1, 1, 1, 1]}, seed=0)
    options = SparKOptions(decoder_width=32, execution=execution)
    method = SparK(options, backbone, size_px=64, seed=0).train()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 1, 64, 64, generator=generator)
    visible = torch.rand(3, 4, 4, generator=generator) > 0.6
    hidden = ~visible.flatten(1)
    loss = method.loss(image, visible)["loss"]
    torch.testing.assert_close(method.errors(image, visible)[hidden].mean(), loss)
    assert method.attention(image).shape == (3, 16)
