"""A policy's whole-number settings over the epochs: from a first value to the policy's own, by integers alone."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from shared.config import Strict
from shared.errors import ConfigError

_ONE = 1 << 62
_PI = 14488038916154245685
"""In units of 2^-62."""


class ScheduleOptions(Strict):
    """How settings of the policy change over the epochs."""

    first: dict[str, int] = Field(
        default_factory=dict,
        description="Setting of the policy -> its value in the first epoch, e.g. {hide_inside: 500}; it goes to the "
        "policy's own value in the last epoch. Empty: nothing changes.",
    )
    shape: Literal["linear", "cosine"] = Field("cosine", description="How it goes there.")


def options_at(schedule: ScheduleOptions, options: Mapping[str, Any], *, epoch: int, epochs: int) -> dict[str, Any]:
    """A policy's settings in an epoch, from 0, of so many.

    Raises:
        ConfigError: A scheduled setting that the policy lacks, or that is no whole number.
    """
    changed = dict(options)
    for name, first in schedule.first.items():
        last = options.get(name)
        if isinstance(last, bool) or not isinstance(last, int):
            whole = [key for key, value in options.items() if isinstance(value, int) and not isinstance(value, bool)]
            near = difflib.get_close_matches(name, whole, n=1, cutoff=0.75)
            guess = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(whole)}"
            raise ConfigError(f"schedule.first.{name}: no whole number among the policy's settings. {guess}")
        changed[name] = value_at(first, last, epoch=epoch, epochs=epochs, shape=schedule.shape)
    return changed


def value_at(first: int, last: int, *, epoch: int, epochs: int, shape: str) -> int:
    """The value in an epoch, rounded half up; ``last`` where there is one epoch only.

    >>> [value_at(500, 800, epoch=epoch, epochs=5, shape="cosine") for epoch in range(5)]
    [500, 544, 650, 756, 800]
    >>> [value_at(800, 500, epoch=epoch, epochs=4, shape="linear") for epoch in range(4)]
    [800, 700, 600, 500]
    """
    if epochs < 2:
        return last
    share = _ONE * epoch // (epochs - 1)
    if shape == "cosine":
        share = (_ONE - _cosine(_PI * epoch // (epochs - 1))) // 2
    return first + ((last - first) * share + _ONE // 2) // _ONE


def _cosine(angle: int) -> int:
    """Of an angle from 0 to pi, both in units of 2^-62: Taylor's series, the same on every machine."""
    term = total = _ONE
    for place in range(1, 60, 2):
        term = -term * angle * angle // (_ONE * _ONE * place * (place + 1))
        total += term
    return total
