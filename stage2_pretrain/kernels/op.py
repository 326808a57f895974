"""The operator ``mwm::draw_hidden``: region maps in, masks out, on the device of the maps.

One schema for every device, known to `torch.library`, so that a compiled step may hold it: on a CPU the host code that
everything else equals, on a GPU one launch of `stage2_pretrain.kernels.fused`, which never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from shared.errors import UsageError
from stage2_pretrain.kernels import IMPLS, POOLS
from stage2_pretrain.kernels.drawn import PADDING, DrawnOnDevice, allocate
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.coverage import combine

_SCHEMA = (
    "(Tensor maps, Tensor windows, Tensor sample_keys, Tensor stratum_of, Tensor weight_of, Tensor? region_weights, "
    "SymInt[2] grid, SymInt? total, SymInt first, SymInt second, SymInt seed_key, SymInt epoch, SymInt view) -> "
    "(Tensor hidden, Tensor coverage, Tensor num_patches, Tensor num_hidden, Tensor clamped, Tensor absent, "
    "Tensor visible, Tensor cu_seqlens)"
)
_HALF_WORD = 1 << 63
_VISIBLE_MAX = 1 << 31


def draw_hidden(
    maps: UInt8[Tensor, "B K H W"],
    windows: Int32[Tensor, "B 8"],
    sample_keys: Int64[Tensor, "B"],
    stratum_of: UInt8[Tensor, "256"],
    weight_of: Int32[Tensor, "256"],
    counts: Counts,
    *,
    grid: tuple[int, int],
    region_weights: Int64[Tensor, "K"] | None = None,
    seed_key: int,
    epoch: int,
    view: int = 0,
) -> DrawnOnDevice:
    """Pool the windows of a batch, count, draw and pack, as the policy's tables say.

    The bits are those of `stage2_pretrain.kernels.reference`. On a GPU nothing can be looked at without waiting for
    it: there, values that a CPU refuses (255 in a map, a patch below one map pixel, tables out of range) and windows
    beyond their image are the caller's to keep out, and only what shapes and numbers tell is refused.

    Args:
        maps: Region maps of the whole images.
        windows: From `stage2_pretrain.window.draw_windows`.
        sample_keys: The bits of the unsigned keys of `shared.rng.sample_keys`.
        stratum_of: Coverage -> stratum, 0 or 1.
        weight_of: Coverage -> weight, 1 .. 2^24.
        counts: How many of each stratum to hide.
        grid: Rows and columns of patches; L is their product, at most 65535, on a GPU 4096.
        region_weights: Of a weighted mean of several regions, 0 or more and not all 0, their sum below 2^55; None:
            the largest coverage.
        seed_key: From `shared.rng.seed_key`, below 2^64.
        epoch: 0 .. 2^24 - 1.
        view: 0 .. 255.

    Raises:
        UsageError: Tensors of other kinds or shapes, too many patches, or an epoch or view out of range.
        CorruptError: On a CPU, a map value of 255.
        ConfigError: On a CPU, a patch that covers no map pixel.
    """
    drawn = torch.ops.mwm.draw_hidden(
        maps,
        windows,
        sample_keys,
        stratum_of,
        weight_of,
        region_weights,
        grid,
        counts.total,
        counts.first,
        counts.second,
        # The schema's integers are signed, of 64 bits: the key's bits, not its number.
        seed_key - 2 * _HALF_WORD if seed_key >= _HALF_WORD else seed_key,
        epoch,
        view,
    )
    return DrawnOnDevice(*drawn)


def _draw_on_cpu(
    maps: Tensor,
    windows: Tensor,
    sample_keys: Tensor,
    stratum_of: Tensor,
    weight_of: Tensor,
    region_weights: Tensor | None,
    grid: Sequence[int],
    total: int | None,
    first: int,
    second: int,
    seed_key: int,
    epoch: int,
    view: int,
) -> DrawnOnDevice:
    """The host's pooling, counts and draw, one after the other."""
    _check(maps, windows, sample_keys, stratum_of, weight_of, region_weights, grid)
    weights = None if region_weights is None else region_weights.numpy()
    pool = POOLS.load("cpu")
    coverage = combine(pool(maps.numpy(), windows.numpy(), (grid[0], grid[1])), weights)
    patches = coverage.shape[1]
    inside = (stratum_of.numpy()[coverage] == 0).sum(1)
    num_hidden, clamped = Counts(total, first, second).of(inside, patches)
    hidden = IMPLS.load("cpu")(
        coverage,
        stratum_of.numpy(),
        weight_of.numpy(),
        num_hidden,
        sample_keys.numpy().view(np.uint64),
        seed_key=seed_key % (2 * _HALF_WORD),
        epoch=epoch,
        view=view,
    )
    made = allocate(maps, patches)
    made.hidden.numpy()[:] = hidden
    made.coverage.numpy()[:] = coverage
    made.num_patches.numpy()[:] = np.stack([inside, patches - inside], axis=1)
    made.num_hidden.numpy()[:] = num_hidden
    made.clamped.numpy()[:] = clamped
    made.absent.numpy()[:] = False
    packed, ends = made.visible.numpy(), made.cu_seqlens.numpy()
    ends[0] = 0
    np.cumsum((~hidden).sum(1), out=ends[1:])
    packed[: ends[-1]] = np.flatnonzero(~hidden)
    packed[ends[-1] :] = PADDING
    return made


def _draw_on_cuda(
    maps: Tensor,
    windows: Tensor,
    sample_keys: Tensor,
    stratum_of: Tensor,
    weight_of: Tensor,
    region_weights: Tensor | None,
    grid: Sequence[int],
    total: int | None,
    first: int,
    second: int,
    seed_key: int,
    epoch: int,
    view: int,
) -> DrawnOnDevice:
    """One launch on the current stream."""
    from stage2_pretrain.kernels.fused import draw_regions  # not before there is a GPU: triton is not everywhere

    _check(maps, windows, sample_keys, stratum_of, weight_of, region_weights, grid)
    with torch.cuda.device(maps.device):
        return draw_regions(
            maps,
            windows,
            sample_keys,
            stratum_of,
            weight_of,
            Counts(total, first, second),
            grid=(grid[0], grid[1]),
            region_weights=region_weights,
            seed_key=seed_key,
            epoch=epoch,
            view=view,
        )


def _shapes_only(maps: Tensor, *arguments: object) -> DrawnOnDevice:
    """What a compiler must know of the results."""
    grid = arguments[5]
    assert isinstance(grid, Sequence)
    return allocate(maps, grid[0] * grid[1])


def _check(
    maps: Tensor,
    windows: Tensor,
    sample_keys: Tensor,
    stratum_of: Tensor,
    weight_of: Tensor,
    region_weights: Tensor | None,
    grid: Sequence[int],
) -> None:
    """Refuse what would be read as something else.

    Raises:
        UsageError: Names the argument.
    """
    if maps.dtype != torch.uint8 or maps.dim() != 4 or min(maps.shape[1:]) < 1:
        raise UsageError(f"maps: {_told(maps)}; expected uint8 [B, K, H, W]")
    batch, regions = maps.shape[:2]
    for name, given, dtype, shape in (
        ("windows", windows, torch.int32, (batch, 8)),
        ("sample_keys", sample_keys, torch.int64, (batch,)),
        ("stratum_of", stratum_of, torch.uint8, (256,)),
        ("weight_of", weight_of, torch.int32, (256,)),
        ("region_weights", region_weights, torch.int64, (regions,)),
    ):
        if given is None:
            continue
        if given.dtype != dtype or given.shape != shape:
            raise UsageError(f"{name}: {_told(given)}; expected {str(dtype)[6:]} {list(shape)}")
        if given.device != maps.device:
            raise UsageError(f"{name}: on {given.device}, and the maps are on {maps.device}; expected one device")
    if len(grid) != 2 or min(grid) < 1:
        raise UsageError(f"grid: {list(grid)}; expected rows and columns, 1 or more")
    if batch * grid[0] * grid[1] >= _VISIBLE_MAX:
        raise UsageError(f"batch: {batch} samples of {grid[0] * grid[1]} patches; expected below 2^31 together")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"


_op = torch.library.custom_op("mwm::draw_hidden", _draw_on_cpu, mutates_args=(), device_types="cpu", schema=_SCHEMA)
_op.register_kernel("cuda", _draw_on_cuda)
_op.register_fake(_shapes_only)
