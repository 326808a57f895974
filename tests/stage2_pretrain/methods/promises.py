"""What the tests of several methods check in the same words."""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.errors import InterruptedRun
from stage2_pretrain import train
from tests.stage2_pretrain.methods.test_spark import worst


def check_loss(
    made: Any,
    image: Tensor,
    visible: Tensor,
    expected: Tensor,
    trained: Sequence[tuple[str, nn.Parameter]],
    limit: float,
) -> None:
    """The loss and every gradient of it are those of a naive loss, relative to the largest of each."""
    gradients = torch.autograd.grad(expected, [value for _, value in trained])
    loss = made.loss(image, visible)["loss"]
    loss.backward()
    assert worst(loss, expected) < limit
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for (name, value), gradient in zip(trained, gradients, strict=True):
        assert value.grad is not None, name
        assert float((value.grad - gradient).abs().max()) < limit * largest, name


def check_hidden_unread(made: Any, image: Tensor, visible: Tensor, *, at_least: int) -> None:
    """NaN in hidden pixels changes no feature and no gradient of the encoder, to the bit."""
    side = image.shape[2] // visible.shape[1]
    hidden = ~visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    seen = []
    for pixels in (image, torch.where(hidden, torch.nan, image)):
        made.zero_grad()
        features = made.features(pixels, visible)
        (features * features.detach().cos()).sum().backward()
        seen.append([features.detach(), *(value.grad for value in made.encoder.parameters() if value.grad is not None)])
    assert len(seen[0]) > at_least
    for one, two in zip(*seen, strict=True):
        assert torch.equal(one, two)


def cut_off(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    """Interrupt a run of two steps an epoch in each step of two of its epochs; every time it saves and stops."""
    add = train.Tally.add

    def add_and_signal(self: Any, step: Any, visible: Tensor) -> None:
        add(self, step, visible)
        if step.epoch in (2, 7):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train.Tally, "add", add_and_signal)
        for _ in range(4):
            with pytest.raises(InterruptedRun, match="state saved"):
                run()
