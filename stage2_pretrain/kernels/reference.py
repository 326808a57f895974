"""The specification of `draw_hidden`, "Bits, version 1": integers and one float32 division.

Every other backend equals this one to the bit. A change of any bit is a new `BITS_VERSION`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8, UInt32, UInt64

from shared.errors import UsageError
from shared.rng import draw_u32

BITS_VERSION = 1
PATCHES_MAX = 65535
WEIGHT_MAX = 1 << 24
"""Weights up to here are exact in float32."""

# log2(1 + t) = t + t (1 - t) P(t), P of degree 5 with alternating signs, Q32; published, so never refitted.
LOG2 = (1901337675, 1195032239, 845921995, 568016905, 279065107, 66489286)


def draw_hidden(
    level: UInt8[np.ndarray, "B L"],
    stratum_of: UInt8[np.ndarray, "256"],
    weight_of: Int32[np.ndarray, "256"],
    num_hidden: Int32[np.ndarray, "B S"],
    sample_keys: UInt64[np.ndarray, "B"],
    *,
    seed_key: int,
    epoch: int,
    view: int = 0,
) -> Bool[np.ndarray, "B L"]:
    """Draw which patches are hidden: in each stratum exactly ``num_hidden``, by weight, without replacement.

    A patch's race key is E / w, E exponential; the smallest keys of a stratum are hidden, ties go to the lower
    patch. A sample's draw depends on its own arguments only, never on the batch around it.

    Args:
        level: What the policy knows of each patch, 0 .. 255: its mean coverage, say. L <= 65535.
        stratum_of: Level -> stratum, 0 .. S - 1.
        weight_of: Level -> weight, 1 .. 2^24. Twice the weight, twice the chance to be hidden first.
        num_hidden: How many patches of each stratum to hide.
        sample_keys: From `shared.rng.sample_key`.
        seed_key: From `shared.rng.seed_key`.
        epoch: 0 .. 2^24 - 1.
        view: 0 .. 255, where a sample is drawn several times in one epoch.

    Returns:
        True where the encoder does not see the patch; patches in row-major order of the grid.

    Raises:
        UsageError: An argument out of the ranges above, or more to hide than a stratum has.

    Source: Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006).
    """
    batch, patches = level.shape
    strata = num_hidden.shape[1]
    if patches > PATCHES_MAX:
        raise UsageError(f"grid: {patches} patches, at most {PATCHES_MAX}")
    if weight_of.min() < 1 or weight_of.max() > WEIGHT_MAX:
        raise UsageError(f"weights {weight_of.min()} .. {weight_of.max()}: expected 1 .. 2^24")
    stratum = stratum_of[level].astype(np.int64)
    size = np.stack([(stratum == number).sum(1) for number in range(strata)], axis=1)
    if size.sum() != level.size or (num_hidden < 0).any() or (num_hidden > size).any():
        raise UsageError(f"counts to hide: expected 0 .. the size of each of {strata} strata")
    words = draw_u32(seed_key, sample_keys, epoch=epoch, view=view, n=patches)
    race = race_key(words, weight_of[level]).astype(np.int64)
    # One integer orders by stratum, then key, then patch; the patch comes back out of its lowest 16 bits.
    order = np.sort(stratum << 48 | race << 16 | np.arange(patches), axis=1)
    patch, stratum = order & 0xFFFF, order >> 48
    first = np.cumsum(size, axis=1) - size
    rank = np.arange(patches) - np.take_along_axis(first, stratum, axis=1)
    hidden = np.zeros((batch, patches), np.bool_)
    np.put_along_axis(hidden, patch, rank < np.take_along_axis(num_hidden, stratum, axis=1), axis=1)
    return hidden


def race_key(words: UInt32[np.ndarray, "*B"], weight: Int32[np.ndarray, "*B"]) -> Int32[np.ndarray, "*B"]:
    """Key E / w of each patch: the bits of a positive float32, which order like the numbers.

    The integer E is rounded to float32 (nearest, ties to even), then divided once, correctly rounded.
    """
    quotient: Float32[np.ndarray, "*B"] = exponential_q26(words).astype(np.float32) / weight.astype(np.float32)
    return quotient.view(np.int32)


def exponential_q26(words: UInt32[np.ndarray, "*B"]) -> Int32[np.ndarray, "*B"]:
    """E = -log2(u) as an integer in units of 2^-26, at least 1 and at most 24 * 2^26.

    u is the odd 24-bit integer ``2 * (word >> 9) + 1`` over 2^24, so never 0 nor 1. With u = 2^-e (1 + t) and
    0 <= t < 1, E = e - log2(1 + t), the logarithm by a polynomial in 32-bit fixed point.
    """
    odd = (words >> np.uint32(9)) * np.uint32(2) + np.uint32(1)
    bits = odd.astype(np.float32).view(np.uint32)  # exact: 24 bits; the exponent counts the leading zeros
    exponent = np.uint32(151) - (bits >> np.uint32(23))
    t = (bits & np.uint32(0x7FFFFF)) << np.uint32(9)
    polynomial = np.full_like(t, LOG2[5])
    for constant in LOG2[4::-1]:
        polynomial = np.uint32(constant) - _product_high(t, polynomial)
    logarithm = t + _product_high(_product_high(t, ~t), polynomial)
    exact = (exponent << np.uint32(26)) - (logarithm >> np.uint32(6))
    return np.maximum(exact.view(np.int32), 1)


def _product_high(a: UInt32[np.ndarray, "*B"], b: UInt32[np.ndarray, "*B"]) -> UInt32[np.ndarray, "*B"]:
    """Upper 32 bits of a 64-bit product."""
    return ((a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
