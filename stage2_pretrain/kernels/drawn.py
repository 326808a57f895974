"""What one drawing of a batch gives, on the device of its maps, and where that is put."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int32, UInt8
from torch import Tensor

PADDING = -1
"""What stands in ``visible`` behind the last visible patch."""


class DrawnOnDevice(NamedTuple):
    """The masks of a batch, in the order of the results of ``mwm::draw_hidden``.

    Attributes:
        hidden: True where the encoder does not see the patch, row by row of the grid.
        coverage: Mean coverage of each patch, 0 .. 254.
        num_patches: Patches of strata 0 and 1.
        num_hidden: Of those, hidden.
        clamped: True where a budget could not be met as asked.
        absent: True where the window held a map value of 255, which cannot be pooled: such a sample's mask means
            nothing. On a CPU it is an error instead.
        visible: Visible patches as ``sample * L + patch``, ascending, of all samples one after the other, then -1.
        cu_seqlens: Where each sample's visible patches begin in ``visible``; the last is their number.
    """

    hidden: Bool[Tensor, "B L"]
    coverage: UInt8[Tensor, "B L"]
    num_patches: Int32[Tensor, "B 2"]
    num_hidden: Int32[Tensor, "B 2"]
    clamped: Bool[Tensor, "B"]
    absent: Bool[Tensor, "B"]
    visible: Int32[Tensor, "B*L"]
    cu_seqlens: Int32[Tensor, "B+1"]


def allocate(maps: UInt8[Tensor, "B K H W"], patches: int) -> DrawnOnDevice:
    """Room for what is drawn from these maps, unwritten, on their device."""
    batch = maps.shape[0]

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return maps.new_empty(shape, dtype=dtype)

    return DrawnOnDevice(
        hidden=empty(batch, patches, dtype=torch.bool),
        coverage=empty(batch, patches, dtype=torch.uint8),
        num_patches=empty(batch, 2, dtype=torch.int32),
        num_hidden=empty(batch, 2, dtype=torch.int32),
        clamped=empty(batch, dtype=torch.bool),
        absent=empty(batch, dtype=torch.bool),
        visible=empty(batch * patches, dtype=torch.int32),
        cu_seqlens=empty(batch + 1, dtype=torch.int32),
    )
