"""Region maps to masks in one launch: pooling of cropped windows, coverage, counts, draw, packed visible patches.

One program a sample. The bits are those of `stage2_pretrain.masking.coverage`, a policy's counts
(`stage2_pretrain.masking.budget`) and `stage2_pretrain.kernels.reference`, one after the other; nothing is sorted and
nothing returns to the host. The k smallest race keys of both strata are found by one binary search over the 31 bits of
a positive float.

Programs tell each other how many patches they leave visible (decoupled look-back, Merrill and Garland, 2016): each
publishes its count, then adds up those of the samples before it, so that varying counts are packed without a second
launch. A word carries the launch's own tag, so nothing is cleared between launches.
"""

from __future__ import annotations

from itertools import count as numbers

import torch
import triton
import triton.language as tl
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from shared.errors import UsageError
from shared.rng import EPOCHS_MAX, VIEWS_MAX
from stage2_pretrain.kernels.choice import FUSED_PATCHES_MAX
from stage2_pretrain.kernels.drawn import PADDING, DrawnOnDevice, allocate
from stage2_pretrain.kernels.reference import LOG2
from stage2_pretrain.masking.budget import Counts

MAP_PIXELS_MAX = 1 << 23
"""Of one region map: the sum over a cell, and a place in a map, stay below 2^31."""

_C0, _C1, _C2, _C3, _C4, _C5 = (tl.constexpr(constant) for constant in LOG2)
_PADDING = tl.constexpr(PADDING)
_TAGS = numbers(1)
_VARYING = ("key_low", "key_high", "last", "tag", "batch", "total", "milli_first", "milli_second")


def draw_regions(
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
    """Pool, combine, count, draw and pack a batch; the arguments are those of `stage2_pretrain.kernels.op.draw_hidden`.

    The maps are on a GPU, the current one (or on the CPU under ``TRITON_INTERPRET=1``). A patch must cover a map pixel
    in every window, which `stage2_pretrain.checks.check_grid` makes sure of; nothing that depends on values can raise.

    Raises:
        UsageError: Too many patches or map pixels, or an epoch or view out of range.
    """
    batch, regions, height, width = maps.shape
    patches = grid[0] * grid[1]
    if not 1 <= patches <= FUSED_PATCHES_MAX:
        raise UsageError(
            f"grid {grid[0]}x{grid[1]}: {patches} patches, the fused sampler takes 1 to {FUSED_PATCHES_MAX}"
        )
    if height * width > MAP_PIXELS_MAX:
        raise UsageError(f"maps of {height}x{width} pixels: the fused sampler takes {MAP_PIXELS_MAX} of a region")
    if not 0 <= epoch < EPOCHS_MAX or not 0 <= view < VIEWS_MAX:
        raise UsageError(f"epoch {epoch}, view {view}: expected epoch < 2^24 and view < 256")
    made = allocate(maps, patches)
    if batch == 0:
        made.cu_seqlens.zero_()
        return made
    block = max(16, triton.next_power_of_2(patches))
    _draw[(batch,)](
        maps.contiguous(),
        windows.contiguous(),
        sample_keys.contiguous(),
        stratum_of.contiguous(),
        weight_of.contiguous(),
        weight_of if region_weights is None else region_weights.contiguous(),
        made.hidden.view(torch.uint8),
        made.coverage,
        made.num_patches,
        made.num_hidden,
        made.clamped.view(torch.uint8),
        made.absent.view(torch.uint8),
        made.visible,
        made.cu_seqlens,
        _published(batch, maps.device),
        _signed(seed_key),
        _signed(seed_key >> 32),
        _signed(epoch | view << 24),
        _signed(next(_TAGS)),
        batch,
        -1 if counts.total is None else (patches * counts.total + 500) // 1000,
        counts.first,
        counts.second,
        REGIONS=regions,
        HEIGHT=height,
        WIDTH=width,
        ROWS=grid[0],
        COLUMNS=grid[1],
        BLOCK=block,
        WEIGHTED=region_weights is not None,
        **shape_of(block),
        enable_fp_fusion=False,
    )
    return made


def shape_of(block: int) -> dict[str, int]:
    """Warps of a program, and map pixels read at once along a row of a cell, for so many patches: none spills."""
    return {"SPAN": 4 if block <= 512 else 2 if block <= 1024 else 1, "num_warps": min(max(block // 64, 2), 16)}


def _signed(word: int) -> int:
    """The low 32 bits as Triton passes them."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


_WORDS: dict[tuple[torch.device, int], Int64[Tensor, "B"]] = {}


def _published(batch: int, device: torch.device) -> Int64[Tensor, "B"]:
    """Words that programs publish their counts in; kept, for their tags make clearing needless.

    A stream has its own, since launches on two of them may run at once. In a graph under capture they are cleared
    every time, for a replay brings the same tag again.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return torch.zeros(batch, dtype=torch.int64, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    if key not in _WORDS or len(_WORDS[key]) < batch:
        _WORDS[key] = torch.zeros(batch, dtype=torch.int64, device=device)
    return _WORDS[key]


@triton.jit(do_not_specialize=_VARYING)
def _draw(  # type: ignore[no-untyped-def]
    maps,
    windows,
    sample_keys,
    stratum_of,
    weight_of,
    region_weights,
    hidden_out,
    coverage_out,
    num_patches_out,
    num_hidden_out,
    clamped_out,
    absent_out,
    visible_out,
    cu_seqlens_out,
    published,
    key_low,
    key_high,
    last,
    tag,
    batch,
    total,
    milli_first,
    milli_second,
    REGIONS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPAN: tl.constexpr,
):
    PATCHES: tl.constexpr = ROWS * COLUMNS
    b = tl.program_id(0)
    patch = tl.arange(0, BLOCK)
    real = patch < PATCHES

    # Cells, as `cell_edges` cuts them; a patch finds its cell by undoing turn and flip.
    window = windows + b.to(tl.int64) * 8
    flip = tl.load(window + 6)
    turns = tl.load(window + 7)
    turned = turns % 2 == 1
    rows = tl.where(turned, COLUMNS, ROWS)
    columns = tl.where(turned, ROWS, COLUMNS)
    i = patch // COLUMNS
    j = patch % COLUMNS
    row = tl.where(turns == 0, i, tl.where(turns == 1, j, tl.where(turns == 2, rows - 1 - i, rows - 1 - j)))
    column = tl.where(turns == 0, j, tl.where(turns == 1, columns - 1 - i, tl.where(turns == 2, columns - 1 - j, i)))
    column = tl.where(flip == 1, columns - 1 - column, column)
    row = tl.where(real, row, 0)
    column = tl.where(real, column, 0)
    top = tl.load(window).to(tl.int64)
    left = tl.load(window + 1).to(tl.int64)
    image_height = tl.load(window + 4).to(tl.int64)
    image_width = tl.load(window + 5).to(tl.int64)
    bottom = top + tl.load(window + 2)
    right = left + tl.load(window + 3)
    first_row = ((2 * top * HEIGHT + image_height) // (2 * image_height)).to(tl.int32)
    last_row = ((2 * bottom * HEIGHT + image_height) // (2 * image_height)).to(tl.int32)
    first_column = ((2 * left * WIDTH + image_width) // (2 * image_width)).to(tl.int32)
    last_column = ((2 * right * WIDTH + image_width) // (2 * image_width)).to(tl.int32)
    tall = last_row - first_row
    wide = last_column - first_column
    y0 = first_row + (row * tall + rows // 2) // rows
    y1 = first_row + ((row + 1) * tall + rows // 2) // rows
    x0 = first_column + (column * wide + columns // 2) // columns
    x1 = first_column + ((column + 1) * wide + columns // 2) // columns
    size = tl.maximum((y1 - y0) * (x1 - x0), 1)

    # Pooling, and one coverage of several regions.
    span = tl.arange(0, SPAN)
    level = tl.zeros([BLOCK], tl.int32)
    mean = tl.zeros([BLOCK], tl.int64)
    weights = tl.zeros([BLOCK], tl.int64)
    highest = tl.zeros([BLOCK], tl.int32)
    for k in range(REGIONS):
        base = maps + (b.to(tl.int64) * REGIONS + k) * (HEIGHT * WIDTH)
        sums = tl.zeros([BLOCK], tl.int32)
        for dy in range((tall + rows - 1) // rows + 1):
            for dx in range(0, (wide + columns - 1) // columns + 1, SPAN):
                y = y0 + dy
                x = x0[:, None] + (dx + span)[None, :]
                inside = (real & (y < y1))[:, None] & (x < x1[:, None])
                values = tl.load(base + (y * WIDTH)[:, None] + x, mask=inside, other=0).to(tl.int32)
                sums += tl.sum(values, 1)
                highest = tl.maximum(highest, tl.max(values, 1))
        pooled = (sums + size // 2) // size
        if WEIGHTED:
            weight = tl.load(region_weights + k).to(tl.int64)
            mean += weight * pooled.to(tl.int64)
            weights += weight
        else:
            level = tl.maximum(level, pooled)
    if WEIGHTED:
        level = ((mean + weights // 2) // tl.maximum(weights, 1)).to(tl.int32)
    tl.store(coverage_out + b.to(tl.int64) * PATCHES + patch, level.to(tl.uint8), mask=real)
    tl.store(absent_out + b, (tl.max(highest, 0) == 255).to(tl.uint8))

    # Counts.
    second = real & (tl.load(stratum_of + level, mask=real, other=0) == 1)
    first = real & (second == 0)
    num_first = tl.sum(first.to(tl.int32), 0)
    num_second = PATCHES - num_first
    asked = (num_first * milli_first + 500) // 1000
    hide_first = asked
    hide_second = (num_second * milli_second + 500) // 1000
    if total >= 0:
        hide_first = tl.minimum(tl.maximum(asked, tl.maximum(total - num_second, 0)), tl.minimum(num_first, total))
        hide_second = total - hide_first
    pair = b.to(tl.int64) * 2
    tl.store(num_patches_out + pair, num_first)
    tl.store(num_patches_out + pair + 1, num_second)
    tl.store(num_hidden_out + pair, hide_first)
    tl.store(num_hidden_out + pair + 1, hide_second)
    tl.store(clamped_out + b, (hide_first != asked).to(tl.uint8))

    # Philox words of four patches each, then race keys.
    sample = tl.load(sample_keys + b)
    block = tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = block * 0
    key = (key_high.to(tl.uint32).to(tl.uint64) << 32) | key_low.to(tl.uint32).to(tl.uint64)
    low = zero + (sample & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(key, block, low, high, zero + last.to(tl.uint32))
    word = tl.reshape(tl.join(tl.join(word0, word2), tl.join(word1, word3)), [BLOCK])
    odd = ((word >> 9) * 2 + 1).to(tl.int32).to(tl.float32)  # exact: 24 bits
    bits = odd.to(tl.uint32, bitcast=True)
    t = (bits & 0x7FFFFF) << 9
    p = _C4 - tl.umulhi(t, tl.full([BLOCK], _C5, tl.uint32))
    p = _C3 - tl.umulhi(t, p)
    p = _C2 - tl.umulhi(t, p)
    p = _C1 - tl.umulhi(t, p)
    p = _C0 - tl.umulhi(t, p)
    logarithm = t + tl.umulhi(tl.umulhi(t, 0xFFFFFFFF - t), p)  # ~t overflows in the interpreter
    exact = ((151 - (bits >> 23)).to(tl.uint32) << 26) - (logarithm >> 6)
    exponential = tl.maximum(exact.to(tl.int32, bitcast=True), 1)
    weight_l = tl.load(weight_of + level, mask=real, other=1)
    race = tl.div_rn(exponential.to(tl.float32), weight_l.to(tl.float32)).to(tl.int32, bitcast=True)

    # The largest bounds with fewer than k keys below, of both strata at once: counts in the low and high 16 bits.
    unit = tl.where(real, tl.where(second, 65536, 1), 0)
    bound_first = hide_first * 0
    bound_second = hide_second * 0
    for step in tl.static_range(31):
        try_first = bound_first | (1 << (30 - step))
        try_second = bound_second | (1 << (30 - step))
        below = tl.sum(tl.where(race < tl.where(second, try_second, try_first), unit, 0), 0)
        bound_first = tl.where((below & 0xFFFF) < hide_first, try_first, bound_first)
        bound_second = tl.where((below >> 16) < hide_second, try_second, bound_second)
    bound = tl.where(second, bound_second, bound_first)
    below = tl.sum(tl.where(race < bound, unit, 0), 0)
    equal = real & (race == bound)
    tie = tl.cumsum(tl.where(equal, unit, 0), 0)  # ties go to the lower patch
    rank = tl.where(second, tie >> 16, tie & 0xFFFF)
    room = tl.where(second, hide_second - (below >> 16), hide_first - (below & 0xFFFF))
    hidden = real & ((race < bound) | (equal & (rank <= room)))
    tl.store(hidden_out + b.to(tl.int64) * PATCHES + patch, hidden.to(tl.uint8), mask=real)

    # Packing: publish the own count, add up those before.
    seen = real & (hidden == 0)
    kept = PATCHES - hide_first - hide_second
    own = (tag.to(tl.uint32).to(tl.uint64) << 32) | kept.to(tl.uint32).to(tl.uint64)
    tl.atomic_xchg(published + b, own.to(tl.int64, bitcast=True))
    start = kept * 0
    for base_sample in range(0, b, BLOCK):
        before = base_sample + patch
        waiting = b * 0 + 1
        part = kept * 0
        while waiting > 0:
            # Read as an atomic, from where it was written; adding nothing.
            words = tl.atomic_add(published + before, tl.zeros([BLOCK], tl.int64), mask=before < b)
            ready = ((words >> 32) & 0xFFFFFFFF) == (tag.to(tl.int64) & 0xFFFFFFFF)
            waiting = tl.sum(((before < b) & (ready == 0)).to(tl.int32), 0)
            part = tl.sum(tl.where(before < b, words & 0xFFFFFFFF, 0), 0).to(tl.int32)
        start += part
    tl.store(cu_seqlens_out + b, start)
    if b == batch - 1:
        tl.store(cu_seqlens_out + batch, start + kept)
    place = tl.cumsum(seen.to(tl.int32), 0) - 1
    tl.store(visible_out + start + place, b * PATCHES + patch, mask=seen)
    # Padding, from the end: as many as are hidden, in the samples before and in this one before the patch.
    gone = b * PATCHES - start + patch - place - 1
    tl.store(visible_out + (batch * PATCHES - 1 - gone), _PADDING, mask=hidden)
