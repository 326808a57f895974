"""A policy's tables on the device where masks are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

from shared.errors import UsageError
from stage2_pretrain.kernels.reference import WEIGHT_MAX
from stage2_pretrain.masking.plan import Policy, Tables


@dataclass(frozen=True)
class Placed:
    """What an epoch's draws on a device have in common.

    Attributes:
        epoch: From 0.
        device: Where the tensors are.
        tables: What they were sent from, kept for as long as they may be on their way.
        stratum_of: Level -> stratum.
        weight_of: Level -> weight.
        region_weights: Of a weighted mean of regions; None: the largest coverage.
    """

    epoch: int
    device: torch.device
    tables: Tables
    stratum_of: UInt8[Tensor, "256"]
    weight_of: Int32[Tensor, "256"]
    region_weights: Int64[Tensor, "K"] | None


def place(policy: Policy, region_weights: Int64[np.ndarray, "K"] | None, epoch: int, device: torch.device) -> Placed:
    """Send what a policy says of an epoch to a device.

    Raises:
        UsageError: Tables out of range: the host's code refuses them when it draws, a GPU would draw something else.
    """
    tables = policy.tables()
    counts = [milli for milli in (tables.counts.total, tables.counts.first, tables.counts.second) if milli is not None]
    for what, values, lowest, highest in (
        ("weights", tables.weight_of, 1, WEIGHT_MAX),
        ("strata", tables.stratum_of, 0, len(policy.strata) - 1),
        ("thousandths to hide", np.array(counts), 0, 1000),
    ):
        if values.min() < lowest or values.max() > highest:
            raise UsageError(f"policy: {what} {values.min()} .. {values.max()}; expected {lowest} .. {highest}")

    def sent(table: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(table).to(device, non_blocking=True)

    weights = None if region_weights is None else sent(region_weights)
    return Placed(epoch, device, tables, sent(tables.stratum_of), sent(tables.weight_of), weights)
