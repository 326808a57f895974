"""What must hold of a run before anything is computed."""

from __future__ import annotations

from math import isqrt

import numpy as np
from jaxtyping import Int64
from timm.layers.drop import DropPath
from torch import nn

from shared import ranks
from shared.errors import ConfigError
from stage2_pretrain.masking.coverage import cell_edges, map_edge
from stage2_pretrain.window import WindowOptions

_STRIDED_MIN = 8
_DROPPING = (nn.Dropout, nn.Dropout2d, DropPath)


def check_grid(
    grid: tuple[int, int], map_px: tuple[int, ...], sizes_px: Int64[np.ndarray, "N 2"], window: WindowOptions
) -> None:
    """Every patch must cover a map pixel in every window that can be drawn.

    The smallest crop decides: a longer one holds a smaller one of the same start.

    Raises:
        ConfigError: There is a window in which one would not.
    """
    for axis in (0, 1):
        cells = max(grid) if window.turns else grid[axis]
        for length in np.unique(sizes_px[:, axis]).tolist():
            crop_px = max(1, isqrt(length * length * window.crop_scale[0] // 1000))
            start = np.arange(length - crop_px + 1)
            first, last = map_edge(start, length, map_px[axis]), map_edge(start + crop_px, length, map_px[axis])
            worst = int((last - first).argmin())
            cell_edges(worst, crop_px, length, map_px[axis], cells)


def check_strided(model: nn.Module) -> None:
    """Refuse what corrupts memory: the backward pass of oneDNN (torch 2.14 and 2.15) for channels-last images.

    Raises:
        ConfigError: Names the convolution.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and max(module.stride) > 1:
            inputs = module.in_channels // module.groups
            if inputs < _STRIDED_MIN:
                raise ConfigError(
                    f"backbone: {name} is a 1x1 convolution of stride {max(module.stride)} over {inputs} channels; "
                    f"below {_STRIDED_MIN} torch's backward pass on a CPU corrupts memory",
                    hint=f"give the layer before it {_STRIDED_MIN} channels or more",
                )


def check_shares(model: nn.Module, *, smallest_batch: int, accumulate: int = 1) -> None:
    """Refuse more parts than a step has images, and several processes where they could not give what one gives.

    Args:
        model: The encoder.
        smallest_batch: Images of the smallest step.
        accumulate: Parts in which each process computes its share.

    Raises:
        ConfigError: A step with fewer images than that, or draws by place in the batch (dropout, drop path).
    """
    if accumulate > max(1, smallest_batch // ranks.size()):
        raise ConfigError(
            f"accumulate: {accumulate} parts of a step, and its smallest share is {smallest_batch // ranks.size()} "
            "images: expected at least one a part",
            hint="lower accumulate, or raise batch_size",
        )
    if ranks.size() == 1:
        return
    if smallest_batch < ranks.size():
        raise ConfigError(
            f"{ranks.size()} processes, and a step of {smallest_batch} images: expected at least one a process",
            hint="raise batch_size, or lower --nproc-per-node",
        )
    for name, module in model.named_modules():
        share = getattr(module, "drop_prob", getattr(module, "p", 0.0))
        if isinstance(module, _DROPPING) and share:
            raise ConfigError(
                f"backbone: {name} drops {share:g} by place in the batch, which {ranks.size()} processes can't share",
                hint="set the backbone's drop rates to 0, or use one process",
            )
