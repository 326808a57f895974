"""What ends a step: numbers that are not finite, a loss that jumps, memory that is full."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from shared.errors import MwmError, UsageError


class NonFiniteError(UsageError, ArithmeticError):
    """The loss or a gradient became NaN or infinite (exit 2)."""

    kind = "non-finite"


class ExplodedError(UsageError, ArithmeticError):
    """The loss jumped to many times what it was (exit 2)."""

    kind = "exploded"


class MemoryFullError(MwmError, MemoryError):
    """A step does not fit into memory (exit 2)."""

    kind = "out-of-memory"
    exit_code = 2


RECENT, _ENOUGH = 64, 16
"""Losses whose median a jump is measured by, and how many there must be."""


def check_finite(what: str, value: float, index: int, sample_ids: Sequence[str]) -> None:
    """Refuse a loss or a gradient's norm that is NaN or infinite."""
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{what} is {value} at step {index + 1}, expected a finite number; samples: {_shown(sample_ids)}",
            hint="lower lr, or look at these samples; the state before this step is kept",
        )


def check_jump(
    value: float, recent: deque[float], max_jump: float | None, index: int, sample_ids: Sequence[str]
) -> None:
    """Compare with the median of the last losses, and make it one of them."""
    usual = median(recent) if len(recent) >= _ENOUGH else math.inf
    if max_jump is not None and usual > 0 and value > max_jump * usual:
        raise ExplodedError(
            f"loss is {value:.4g} at step {index + 1}, {value / usual:.0f} times the median of the {len(recent)} "
            f"before ({usual:.4g}), expected at most {max_jump:g} times; samples: {_shown(sample_ids)}",
            hint="lower lr or warm up longer, or look at these samples; the state before this step is kept, and goes "
            "on with a higher max_loss_jump",
        )
    recent.append(value)


def _shown(sample_ids: Sequence[str]) -> str:
    return ", ".join(sample_ids[:8]) + (f" and {len(sample_ids) - 8} more" if len(sample_ids) > 8 else "")


@contextmanager
def memory_in_words(index: int, sample_ids: Sequence[str]) -> Iterator[None]:
    """What torch says where memory ends, in our words."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # A GPU's has a class; the CPU allocator's is a RuntimeError that is known by its words alone.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryFullError(
            f"out of memory in step {index + 1} of {len(sample_ids)} images: {_first_line(error)}",
            hint="lower batch_size or size_px (it counts squared); mwm pretrain can also do a step in parts, with "
            "accumulate=2 or more, and hold half with precision=bf16",
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
