"""Run an unmodified timm encoder on the visible patches only, dense and multiplied.

Every convolution and pooling runs densely and is multiplied by the map of active sites, biases included;
BatchNorm takes its statistics over active sites; LayerNorm is per site; global response norm is of an image, whose
hidden sites add nothing to it. So a hidden site is zero after every
module, and no hidden pixel reaches a feature or a gradient.

Source: SparK (arXiv 2301.03580), sparse encoding by masking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from timm.layers.activations import GELU
from timm.layers.drop import DropPath
from timm.layers.grn import GlobalResponseNorm
from timm.layers.mlp import GlobalResponseNormMlp, Mlp
from timm.layers.norm import LayerNorm2d
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, ConvNeXtStage
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from shared import ranks
from shared.errors import ConfigError, UsageError
from stage2_pretrain.methods.norm import normalise_rows

_CONTAINERS = (
    *(ResNet, BasicBlock, Bottleneck, ConvNeXt, ConvNeXtStage, ConvNeXtBlock),
    *(Mlp, GlobalResponseNormMlp, nn.Sequential),
)
_POINTWISE = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, GELU, nn.SiLU, nn.Dropout, DropPath)
"""Act on each site alone and keep zero at zero."""
_UNUSED = ("global_pool", "fc", "head")
"""Children of the whole model that no feature passes through."""


class Sites:
    """Which sites of each feature size are active, for one batch.

    Args:
        visible: True where the encoder sees the patch.

    Raises:
        UsageError: A batch without a visible patch in any process.
    """

    def __init__(self, visible: Bool[Tensor, "B gh gw"]) -> None:
        self.visible = visible
        self._count = ranks.total(int(visible.sum()))
        if not self._count:
            raise UsageError("no patch of this batch is visible", hint="hide less, or use a finer grid")
        self._active: dict[tuple[int, int], Bool[Tensor, "B 1 h w"]] = {}
        self._index: dict[tuple[int, int], Int64[Tensor, "n"]] = {}

    def active(self, height: int, width: int) -> Bool[Tensor, "B 1 h w"]:
        """Active sites of a feature map; its sides are whole multiples of the grid's, or the grid's of its.

        Where the grid is the finer one, a site is active if any of its patches is visible.
        """
        key = (height, width)
        if key not in self._active:
            batch, rows, columns = self.visible.shape
            if height >= rows:
                spread = self.visible.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
            else:
                spread = self.visible.view(batch, height, rows // height, width, columns // width).any(4).any(2)
            self._active[key] = spread[:, None]
        return self._active[key]

    def index(self, height: int, width: int) -> Int64[Tensor, "n"]:
        """Positions of the active sites in a [B, h, w] map flattened row by row."""
        key = (height, width)
        if key not in self._index:
            self._index[key] = self.active(height, width).flatten().nonzero().squeeze(1)
        return self._index[key]

    def count(self, height: int, width: int) -> int:
        """Active sites of the batch, in all processes."""
        rows, columns = self.visible.shape[1:]
        if height >= rows:
            return self._count * (height // rows) * (width // columns)
        return ranks.total(int(self.active(height, width).sum()))

    def norm(self, norm: nn.Module, feature: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """`batch_norm` of these sites."""
        return batch_norm(norm, feature, self)

    def fill(self, feature: Float[Tensor, "B C h w"], token: Tensor) -> Float[Tensor, "B C h w"]:
        """The feature with ``token`` at hidden sites."""
        return torch.where(self.active(*feature.shape[2:]), feature, token)

    def multiply(self, feature: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Zero at hidden sites."""
        return feature * self.active(*feature.shape[2:]).to(feature.dtype)


def check_sparse(model: nn.Module) -> None:
    """Refuse a model with a module that would carry something between hidden and visible sites.

    Raises:
        ConfigError: Names the module and its type.
    """
    for name, child in walk(model, ""):
        if not isinstance(child, _CONTAINERS + _POINTWISE + tuple(_SPARSE)):
            raise ConfigError(
                f"backbone: {name} is a {type(child).__name__}, which has no sparse form",
                hint="name a plain ResNet or ConvNeXt of timm, e.g. resnet18, resnet50, convnext_tiny; "
                "methods for a ViT are mae and simmim",
            )


@contextmanager
def sparse(model: nn.Module, sites: Sites) -> Iterator[None]:
    """Within the context the model computes on active sites only; its input must be multiplied already.

    The model is left as it was found; parameters, buffers and their names never change.
    """
    changed: list[nn.Module] = []
    try:
        for _, child in walk(model, ""):
            for kind, forward in _SPARSE.items():
                if isinstance(child, kind):
                    child.forward = _bound(forward, child, sites)
                    changed.append(child)
                    break
        yield
    finally:
        for child in changed:
            del child.forward


def batch_norm(norm: nn.Module, feature: Float[Tensor, "B C h w"], sites: Sites) -> Float[Tensor, "B C h w"]:
    """BatchNorm whose statistics, running ones too, are over active sites; zero elsewhere.

    Raises:
        UsageError: One active site alone in training: no variance.
    """
    batch, channels, height, width = feature.shape
    index = sites.index(height, width)
    if norm.training and sites.count(height, width) < 2:
        raise UsageError(
            f"a {height}x{width} feature has 1 visible site in the batch: no variance", hint="larger batch"
        )
    rows: Tensor = _Gather.apply(feature.permute(0, 2, 3, 1).reshape(-1, channels), index)
    if isinstance(norm, nn.BatchNorm2d) and norm.training and ranks.size() > 1:
        rows = normalise_rows(norm, rows)
    else:
        # [1, C, n, 1] with channels last: the layout that torch's kernel for images is fast on.
        image = rows.view(1, len(index), 1, channels).permute(0, 3, 1, 2)
        rows = type(norm).forward(norm, image).permute(0, 2, 3, 1).reshape(len(index), channels)
    spread: Tensor = _Scatter.apply(rows, index, batch * height * width)
    return spread.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _multiplied(module: nn.Module, feature: Tensor, sites: Sites) -> Tensor:
    return sites.multiply(type(module).forward(module, feature))


def _multiplied_last(module: nn.Module, feature: Tensor, sites: Sites) -> Tensor:
    """The same for features with channels last, [B, h, w, C]."""
    output: Tensor = type(module).forward(module, feature)
    return output * sites.active(*output.shape[1:3])[:, 0, :, :, None].to(output.dtype)


def _response_norm(norm: GlobalResponseNorm, feature: Tensor, sites: Sites) -> Tensor:
    return (_multiplied if norm.channel_dim == 1 else _multiplied_last)(norm, feature, sites)


_SPARSE: dict[type[nn.Module], Callable[[Any, Tensor, Sites], Tensor]] = {
    nn.BatchNorm2d: batch_norm,
    LayerNorm2d: _multiplied,
    nn.Conv2d: _multiplied,
    nn.MaxPool2d: _multiplied,
    nn.AvgPool2d: _multiplied,
    nn.LayerNorm: _multiplied_last,
    nn.Linear: _multiplied_last,
    GlobalResponseNorm: _response_norm,
}
"""LayerNorm2d stands before LayerNorm, which it subclasses."""


def _bound(
    forward: Callable[[Any, Tensor, Sites], Tensor], module: nn.Module, sites: Sites
) -> Callable[[Tensor], Tensor]:
    return lambda feature: forward(module, feature, sites)


def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module that a feature passes through, with its name; ``name`` is empty for the whole model."""
    yield name or "the network", module
    for key, child in module.named_children():
        if name or key not in _UNUSED:
            yield from walk(child, f"{name}.{key}" if name else key)


class _Gather(torch.autograd.Function):
    """Rows [n, C] out of [N, C], each at most once, so that the gradient is a plain copy."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _spread(gradient, ctx.saved_tensors[0], ctx.count), None


class _Scatter(torch.autograd.Function):
    """The reverse: rows [n, C] to their places in [N, C], zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        return _spread(rows, index, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def _spread(rows: Tensor, index: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, index, rows)
