"""What a run may compute with on this machine: how many CPU threads, and which device."""

from __future__ import annotations

import os
from typing import Literal

from shared.errors import ConfigError

_PER_CORE = 4
_ALWAYS = 64
"""A number of threads is part of a run's specification: one made on a larger machine must run on a smaller."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_threads(threads: int | Literal["auto"]) -> int:
    """The number of threads that a setting means on this machine: ``auto`` is a thread a core.

    Raises:
        ConfigError: More than 64 and than four a core; torch crashes on a number of threads it can't start.
    """
    most = max(_ALWAYS, _PER_CORE * cores())
    if threads == "auto":
        return cores()
    if not 1 <= threads <= most:
        raise ConfigError(f"threads: {threads}, expected 1 to {most} on this machine of {cores()} cores, or auto")
    return threads


def resolve_device(device: str) -> str:
    """The device that a setting means on this machine: ``auto`` is ``cuda`` if there is one, else ``cpu``.

    Raises:
        ConfigError: ``cuda`` or ``mps``, and this machine has none.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there.get(device, True):
        what = "no usable GPU" if device == "cuda" else "none"
        raise ConfigError(f"device: {device}, but this machine has {what}", hint="device=auto takes what there is")
    return device
