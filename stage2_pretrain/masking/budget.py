"""How many patches to hide: thousandths and integers, no float."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer


@dataclass(frozen=True)
class Counts:
    """How many patches of each stratum to hide, by a rule that a kernel can follow too.

    Attributes:
        total: Thousandths of all patches, the same number in every sample; None: each stratum by itself.
        first: Thousandths of stratum 0.
        second: Thousandths of stratum 1; of no meaning with ``total``, where the second stratum takes the rest.
    """

    total: int | None
    first: int
    second: int = 0

    def of(self, first: Int64[np.ndarray, "B"], patches: int) -> tuple[Int32[np.ndarray, "B 2"], Bool[np.ndarray, "B"]]:
        """Counts of both strata, and which samples could not be met as asked, from the patches in stratum 0."""
        if self.total is None:
            return per_sample(first, patches, self.first, self.second), np.zeros(len(first), np.bool_)
        return matched(first, patches, self.total, self.first)


def count(n: Integer[np.ndarray, "*B"], milli: int) -> Int32[np.ndarray, "*B"]:
    """``milli`` thousandths of n, rounded half up: ``(n * milli + 500) // 1000``.

    >>> count(np.array([5, 10, 15, 49]), 800).tolist()
    [4, 8, 12, 39]
    """
    return ((n.astype(np.int64) * milli + 500) // 1000).astype(np.int32)


def per_sample(
    inside: Int64[np.ndarray, "B"], patches: int, hide_inside: int, hide_outside: int
) -> Int32[np.ndarray, "B 2"]:
    """Hide shares of the inside and of the outside; the sum follows the region's size.

    Args:
        inside: Patches inside the region, 0 .. patches.
        patches: Patches of a sample.
        hide_inside: Thousandths of the inside.
        hide_outside: Thousandths of the outside.

    Returns:
        Counts inside and outside. Published arms (Mask What Matters): 800/400, 700/300, 600/200.
    """
    return np.stack([count(inside, hide_inside), count(patches - inside, hide_outside)], axis=1)


def matched(
    inside: Int64[np.ndarray, "B"], patches: int, overall: int, hide_inside: int
) -> tuple[Int32[np.ndarray, "B 2"], Bool[np.ndarray, "B"]]:
    """Hide the same number in every sample, and of the inside the share asked as far as that leaves room.

    Args:
        inside: Patches inside the region, 0 .. patches.
        patches: Patches of a sample.
        overall: Thousandths of all patches; fixes the count K of every sample.
        hide_inside: Thousandths of the inside.

    Returns:
        Counts inside and outside, which sum to K, and which samples had to be clamped: the outside can take no
        more than it has, the inside no more than K.
    """
    total = count(np.full_like(inside, patches), overall)
    outside = (patches - inside).astype(np.int32)
    asked = count(inside, hide_inside)
    hidden = np.clip(asked, np.maximum(total - outside, 0), np.minimum(inside, total)).astype(np.int32)
    return np.stack([hidden, total - hidden], axis=1), hidden != asked
