"""Run an unmodified timm encoder on the visible patches only, and compute nothing else.

The visible patches of all images of a batch are its batch: a feature is [T, C, t, t], T visible patches (cells), image
after image, each t positions a side. Whatever acts on a site alone (1x1 convolutions, norms, activations, residuals)
then runs as it is, and BatchNorm's statistics are over visible sites by themselves. Only what looks at neighbours is
replaced: it reads a cell with a halo gathered from the cells around it, zeros where those are hidden. The result is
that of `stage2_pretrain.methods.sparse`, up to the order of sums.

Source: SparK (arXiv 2301.03580) for the mathematics; submanifold convolutions (Graham and van der Maaten, 2017) for
computing at active sites only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.layers.grn import GlobalResponseNorm
from timm.layers.mlp import Mlp
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import ConfigError
from stage2_pretrain.methods.cells import Cells, flat, unflat
from stage2_pretrain.methods.drop import drop_path
from stage2_pretrain.methods.sparse import check_sparse, walk

Kind = Literal["tile", "gemm", "dense"]


def check_packed(model: nn.Module) -> None:
    """Refuse a model with a module that has no packed form.

    Raises:
        ConfigError: Names the module.
    """
    check_sparse(model)
    for name, child in walk(model, ""):
        if isinstance(child, nn.AvgPool2d) and (child.kernel_size != child.stride or child.padding not in (0, (0, 0))):
            raise ConfigError(
                f"backbone: {name} is an average pooling over neighbours, which has no packed form",
                hint="method.execution=masked computes every patch",
            )
        if isinstance(child, nn.Conv2d):
            pairs = (child.kernel_size, child.stride, child.padding, child.dilation)
            if any(isinstance(pair, str) or len(set(pair)) > 1 for pair in pairs):
                raise ConfigError(
                    f"backbone: {name} is a convolution unlike along its axes, which has no packed form",
                    hint="method.execution=masked computes every patch",
                )


@contextmanager
def packed(model: nn.Module, cells: Cells) -> Iterator[None]:
    """Within the context the model takes and gives [T, C, t, t]; it is left as it was found."""
    changed: list[nn.Module] = []
    try:
        for _, child in walk(model, ""):
            for kind, forward in _PACKED.items():
                if isinstance(child, kind):
                    child.forward = _bound(forward, child, cells)
                    changed.append(child)
                    break
        yield
    finally:
        for child in changed:
            del child.forward


def _bound(
    forward: Callable[[Any, Tensor, Cells], Tensor], module: nn.Module, cells: Cells
) -> Callable[[Tensor], Tensor]:
    return lambda feature: forward(module, feature, cells)


def _conv(conv: nn.Conv2d, feature: Tensor, cells: Cells) -> Tensor:
    size, stride, padding, dilation = conv.kernel_size[0], conv.stride[0], int(conv.padding[0]), conv.dilation[0]
    side, channels = feature.shape[-1], feature.shape[1]
    if size == 1 and conv.groups == 1:
        sites = feature[:, :, ::stride, ::stride]
        rows = F.linear(flat(sites), conv.weight.flatten(1), conv.bias)
        return unflat(rows, cells.count, side // stride)
    after = max(dilation * (size - 1) - padding - stride + 1, 0)
    if not padding and not after:  # patches within a cell
        return type(conv).forward(conv, feature)
    if stride == 1 and 2 * padding == dilation * (size - 1):
        depthwise = conv.groups > 1 and conv.groups == channels == len(conv.weight)
        if depthwise or conv.groups == 1:
            kind = _route(side, depthwise=depthwise)
            output: Tensor = _SameConv.apply(*_lowered(feature, conv.weight, conv.bias), cells, dilation, kind)
            return output
    reached: Tensor = _Halo.apply(feature, cells, padding, after, 0.0)
    return F.conv2d(reached, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def _lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In autocast's type, where it is on: it does not reach into the backward pass of a function of ours."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _route(side: int, *, depthwise: bool) -> Kind:
    """Which way of a convolution is the fastest on a CPU for cells of so many positions (tests/benchmarks/packed)."""
    if depthwise:
        return "tile" if side >= 4 else "dense"
    return "tile" if side >= 8 else "gemm"


def _max_pool(pool: nn.MaxPool2d, feature: Tensor, cells: Cells) -> Tensor:
    numbers: list[Any] = [pool.kernel_size, pool.stride, pool.padding]
    size, stride, padding = (value[0] if isinstance(value, tuple) else value for value in numbers)
    after = max(size - padding - stride, 0)
    reached: Tensor = _Halo.apply(feature, cells, padding, after, -torch.inf)
    return F.max_pool2d(reached, size, stride)


def _batch_norm(norm: nn.BatchNorm2d, feature: Tensor, cells: Cells) -> Tensor:
    return cells.norm(norm, feature)


def _response_norm(norm: GlobalResponseNorm, feature: Tensor, cells: Cells) -> Tensor:
    """Of each image over its visible sites, the same as where hidden ones are zero; timm's own is of each cell."""
    squares = feature.to(torch.promote_types(feature.dtype, torch.float32)).square().sum(norm.spatial_dim)
    total = squares.new_zeros(len(cells.visible), squares.shape[1]).index_add(0, cells.image, squares)
    length = torch.where(total > 0, total, 1).sqrt() * (total > 0)  # without a gradient at zero, as torch's norm
    share = (length / (length.mean(1, keepdim=True) + norm.eps)).index_select(0, cells.image)
    scale = share[:, :, None, None] if norm.channel_dim == 1 else share[:, None, None]
    return feature + torch.addcmul(norm.bias.view(norm.wb_shape), norm.weight.view(norm.wb_shape), feature * scale)


def _drop_path(drop: DropPath, feature: Tensor, cells: Cells) -> Tensor:
    return drop_path(drop, feature, cells.image, len(cells.visible))


def _convnext_block(block: ConvNeXtBlock, feature: Tensor, cells: Cells) -> Tensor:
    """timm's own, but for the layer scale, which goes into the last weights: one pass over the feature less."""
    mlp, gamma = block.mlp, block.gamma
    folds = type(mlp) is Mlp and isinstance(mlp.fc2, nn.Linear) and isinstance(mlp.norm, nn.Identity)
    if not folds or gamma is None or mlp.drop2.p:
        return type(block).forward(block, feature)
    rows = mlp.drop1(mlp.act(mlp.fc1(block.norm(block.conv_dw(feature).permute(0, 2, 3, 1)))))
    bias = None if mlp.fc2.bias is None else mlp.fc2.bias * gamma
    scaled = F.linear(rows, mlp.fc2.weight * gamma[:, None], bias).permute(0, 3, 1, 2)
    added: Tensor = block.drop_path(scaled) + block.shortcut(feature)
    return added


_PACKED: dict[type[nn.Module], Callable[[Any, Tensor, Cells], Tensor]] = {
    nn.Conv2d: _conv,
    nn.MaxPool2d: _max_pool,
    nn.BatchNorm2d: _batch_norm,
    DropPath: _drop_path,
    GlobalResponseNorm: _response_norm,
    ConvNeXtBlock: _convnext_block,
}


def _gather(rows: Tensor, index: Tensor, outside: float = 0.0) -> Tensor:
    """Rows by index, of which the last two more are hidden (zero) and outside."""
    longer = rows.new_empty(len(rows) + 2, rows.shape[1])
    longer[:-2] = rows
    longer[-2] = 0
    longer[-1] = outside
    return longer.index_select(0, index)


class _Halo(torch.autograd.Function):
    """[T, C, t, t] to [T, C, before + t + after, ...]: each cell with what is around it."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, cells: Cells, before: int, after: int, outside: float) -> Tensor:
        side = feature.shape[-1]
        ctx.told = cells, side, before, after
        index = cells.halo(side, before, after)[0]
        return unflat(_gather(flat(feature), index, outside), cells.count, before + side + after)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        cells, side, before, after = ctx.told
        _, position, sites = cells.halo(side, before, after)
        own = gradient[:, :, before : before + side, before : before + side]
        rows = own.permute(0, 2, 3, 1).contiguous().view(-1, gradient.shape[1]).clone()
        rows.index_add_(0, sites, flat(gradient).index_select(0, position))
        return unflat(rows, cells.count, side), None, None, None, None


class _SameConv(torch.autograd.Function):
    """A convolution of stride 1 that keeps the size, all channels or depthwise; saves visible sites only.

    The gradient of what went in is the same convolution with the kernel turned round, over gathered gradients: nothing
    is added up out of order.
    """

    @staticmethod
    def forward(
        ctx: Any, feature: Tensor, weight: Tensor, bias: Tensor | None, cells: Cells, dilation: int, kind: Kind
    ) -> Tensor:
        ctx.save_for_backward(feature, weight)
        ctx.told = cells, dilation, kind, bias is not None
        return _same_conv(feature, weight, bias, cells, dilation, kind)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        feature, weight = ctx.saved_tensors
        cells, dilation, kind, has_bias = ctx.told
        depthwise = weight.shape[1] == 1 and feature.shape[1] > 1
        turned = weight.flip(2, 3)
        if not depthwise:
            turned = turned.transpose(0, 1)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        back = _same_conv(gradient, turned.contiguous(), None, cells, dilation, kind)
        kernel = _weight_gradient(feature, gradient, weight, cells, dilation, kind)
        return back, kernel, flat(gradient).sum(0) if has_bias else None, None, None, None


def _same_conv(feature: Tensor, weight: Tensor, bias: Tensor | None, cells: Cells, dilation: int, kind: Kind) -> Tensor:
    size, side = weight.shape[-1], feature.shape[-1]
    reach = dilation * (size - 1) // 2
    groups = feature.shape[1] // weight.shape[1]
    if kind == "dense":
        dense = F.conv2d(cells.dense(feature), weight, bias, 1, reach, dilation, groups)
        return unflat(flat(dense).index_select(0, cells.places(side)), cells.count, side)
    tiles = unflat(_gather(flat(feature), cells.halo(side, reach, reach)[0]), cells.count, side + 2 * reach)
    if kind == "gemm":
        columns = _columns(tiles, size, dilation, side)
        rows = F.linear(columns, weight.permute(0, 2, 3, 1).reshape(len(weight), -1), bias)
        return unflat(rows, cells.count, side)
    return F.conv2d(tiles, weight, bias, 1, 0, dilation, groups)


def _columns(tiles: Tensor, size: int, dilation: int, side: int) -> Float[Tensor, "T*t*t k*k*C"]:
    """What each site of a convolution reads, row by row of the kernel, channels last."""
    last = tiles.permute(0, 2, 3, 1)
    reach = dilation * (size - 1) + 1
    windows = last.unfold(1, reach, 1).unfold(2, reach, 1)[..., ::dilation, ::dilation]
    return windows.permute(0, 1, 2, 4, 5, 3).reshape(len(tiles) * side * side, -1)


def _weight_gradient(
    feature: Tensor, gradient: Tensor, weight: Tensor, cells: Cells, dilation: int, kind: Kind
) -> Tensor:
    size, side, channels = weight.shape[-1], feature.shape[-1], feature.shape[1]
    reach = dilation * (size - 1) // 2
    tiles = unflat(_gather(flat(feature), cells.halo(side, reach, reach)[0]), cells.count, side + 2 * reach)
    if weight.shape[1] == 1 and channels > 1:
        return _depthwise_gradient(tiles, gradient, size, dilation)
    if kind == "gemm":
        product = flat(gradient).t() @ _columns(tiles, size, dilation, side)
        return product.view(len(weight), size, size, channels).permute(0, 3, 1, 2)
    found: Tensor = torch.ops.aten.convolution_backward(
        gradient, tiles, weight, None, [1, 1], [0, 0], [dilation] * 2, False, [0, 0], 1, [False, True, False]
    )[1]
    return found


def _depthwise_gradient(tiles: Tensor, gradient: Tensor, size: int, dilation: int) -> Tensor:
    """The library's is five to ten times its own forward on a CPU: a forward convolution, or passes, for it."""
    cells, channels, side, _ = gradient.shape
    if side >= 4:
        wide = tiles.shape[-1]
        read = tiles.reshape(1, cells * channels, wide, wide)
        kernels = gradient.reshape(cells * channels, 1, side, side)
        found = F.conv2d(read, kernels, stride=dilation, groups=cells * channels)
        return found.view(cells, channels, size, size).sum(0)[:, None]
    rows, given = tiles.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    found = gradient.new_empty(size, size, channels)
    for i in range(size):
        for j in range(size):
            y, x = i * dilation, j * dilation
            found[i, j] = (given * rows[:, y : y + side, x : x + side]).sum((0, 1, 2))
    return found.permute(2, 0, 1)[:, None]
