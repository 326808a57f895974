"""Memory that a process frees stays its own: models allocate and free the same large blocks all day."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BLOCK_BYTES_MAX = (1 << 30, 32 << 20)
"""Above it a block is the kernel's business; older glibc takes no more than the second."""


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed blocks back to the kernel, which would clear them page by page next time.

    Measured: encoding an image with LiteMedSAM costs 286,000 page faults and 0.86 s of kernel time without,
    8,000 and 0.01 s with it. Results do not change.

    Returns:
        Whether it took effect; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    taken = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _BLOCK_BYTES_MAX)
    return bool(taken and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
