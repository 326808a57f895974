"""BatchNorm whose statistics are over the rows of all processes, however many each of them has.

torch's SyncBatchNorm wants a GPU; this one also runs on the CPU. In a single process it is torch's BatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared import ranks


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, with the same state; in training its statistics are over the images of all processes."""

    def forward(self, input: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Normalise each channel."""
        if ranks.size() == 1 or not self.training:
            return super().forward(input)
        batch, channels, height, width = input.shape
        rows = input.permute(0, 2, 3, 1).reshape(-1, channels)
        return normalise_rows(self, rows).view(batch, height, width, channels).permute(0, 3, 1, 2)


def normalise_rows(norm: nn.BatchNorm2d, rows: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """What ``norm`` in training makes of the rows of all processes, of which these are this one's.

    Running statistics move as torch's do. The gradients of weight and bias are this process's part of the sum.

    Args:
        norm: Its momentum is a number.
        rows: n may be 0 here, and is 2 or more in all.
    """
    count = ranks.total(len(rows))
    with torch.no_grad():
        wide = rows.detach().double()
        mean = ranks.add(wide.sum(0)) / count
        variance = ranks.add((wide - mean).square().sum(0)) / count
        if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
            momentum = norm.momentum or 0.0
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    scale = (variance + norm.eps).rsqrt()
    normed: Tensor = _Normalise.apply(rows, mean, scale, count)
    return normed * norm.weight + norm.bias


class _Normalise(torch.autograd.Function):
    """``(rows - mean) * scale``, where mean and scale are the rows' own, over all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, mean: Tensor, scale: Tensor, count: int) -> Tensor:
        normed = ((rows.double() - mean) * scale).to(rows.dtype)
        ctx.save_for_backward(normed, scale)
        ctx.count = count
        return normed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        normed, scale = ctx.saved_tensors
        wide, normed = gradient.double(), normed.double()
        sums = ranks.add(torch.stack([wide.sum(0), (wide * normed).sum(0)])) / ctx.count
        return ((wide - sums[0] - normed * sums[1]) * scale).to(gradient.dtype), None, None, None
