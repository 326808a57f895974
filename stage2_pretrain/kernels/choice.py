"""Which backend draws the masks of a run."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from shared.errors import ConfigError
from stage2_pretrain.kernels import IMPLS

FUSED_PATCHES_MAX = 4096
"""More would not stay in a GPU's registers."""


def resolve_impl(impl: str, *, device: str, patches: int) -> str:
    """Replace ``auto``: ``fused`` on a GPU whose registers hold the grid, else ``cpu``. All give the same bits.

    Args:
        impl: ``auto``, or a name in `IMPLS`.
        device: Where the encoder is trained, resolved: ``cpu``, ``cuda`` or ``mps``.
        patches: L, patches of a sample.

    Raises:
        ConfigError: An unknown name, or ``fused`` where it cannot run.
    """
    problem = _against_fused(device, patches)
    if impl == "auto":
        return "cpu" if problem else "fused"
    if impl == "fused" and problem:
        raise ConfigError(f"impl: fused, but {problem}", hint="impl=auto takes what there is; the bits are the same")
    IMPLS.load(impl)
    return impl


def _against_fused(device: str, patches: int) -> str | None:
    if device != "cuda":
        return f"device is {device}; expected cuda"
    if not torch.cuda.is_available():
        return "this machine has no usable GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    if patches > FUSED_PATCHES_MAX:
        return f"the grid has {patches} patches; expected at most {FUSED_PATCHES_MAX}"
    return None
