"""`draw_hidden` as fast host code: the same bits as `reference`, half a microsecond for 196 patches.

One sample after the other, in plain loops over its patches, each simple enough for the compiler to turn into vector
instructions; nothing is sorted. The k smallest race keys of a stratum are found bit by bit from the top (positive
floats order like integers), and the search ends once exactly k keys lie below the bound: after about log2(L) of the
31 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8, UInt64
from numba import float32, int32, njit, uint32, uint64

from shared.errors import UsageError
from shared.rng import EPOCHS_MAX, VIEWS_MAX, round_keys
from stage2_pretrain.kernels.reference import LOG2, PATCHES_MAX, WEIGHT_MAX

_ABOVE = np.int32(0x7FFFFFFF)
"""Greater than every race key: those are finite floats."""
_P0, _P1, _P2, _P3, _P4, _P5 = (np.uint64(constant) for constant in LOG2)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# NumPy's division: Python's would look for a zero divisor, patch by patch.
_NUMBA: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


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
    """Draw as `stage2_pretrain.kernels.reference.draw_hidden`, which says what the arguments mean.

    Raises:
        UsageError: An argument out of range, or more to hide than a stratum has.
    """
    batch, patches = level.shape
    if patches > PATCHES_MAX:
        raise UsageError(f"grid: {patches} patches, at most {PATCHES_MAX}")
    if weight_of.min() < 1 or weight_of.max() > WEIGHT_MAX:
        raise UsageError(f"weights {weight_of.min()} .. {weight_of.max()}: expected 1 .. 2^24")
    if not 0 <= epoch < EPOCHS_MAX or not 0 <= view < VIEWS_MAX:
        raise UsageError(f"epoch {epoch}, view {view}: expected epoch < 2^24 and view < 256")
    hidden = np.empty((batch, patches), np.bool_)
    fits = _compiled()(
        np.ascontiguousarray(level),
        np.ascontiguousarray(stratum_of),
        weight_of.astype(np.float32),  # exact up to 2^24
        np.ascontiguousarray(num_hidden, np.int32),
        np.ascontiguousarray(sample_keys),
        np.array(round_keys(seed_key), np.uint32),
        np.uint32(epoch | view << 24),
        hidden.view(np.uint8),
    )
    if not fits:
        raise UsageError(f"counts to hide: expected 0 .. the size of each of {num_hidden.shape[1]} strata")
    return hidden


@cache
def _compiled() -> Callable[..., bool]:
    """The machine code, kept on disk where there is a place for it: compiling takes a second or two."""
    grid, row = "uint8[:,::1]", "uint8[::1]"
    signature = f"boolean({grid}, {row}, float32[::1], int32[:,::1], uint64[::1], uint32[:,::1], uint32, {grid})"
    compiled: Callable[..., bool]
    with contextlib.suppress(RuntimeError):  # numba's, where neither this folder nor the user's cache is writable
        compiled = njit(signature, cache=True, **_NUMBA)(_draw)
        return compiled
    compiled = njit(signature, **_NUMBA)(_draw)
    return compiled


def _draw(
    level: Any,
    stratum_of: Any,
    weight_of: Any,
    num_hidden: Any,
    sample_keys: Any,
    keys: Any,
    last: Any,
    hidden: Any,
) -> bool:
    """Fill ``hidden`` with 0 and 1; False if a count does not fit its stratum."""
    batch, patches = level.shape
    words = np.empty((4, (patches + 3) // 4), np.uint32)
    odd = np.empty(4 * words.shape[1], np.float32)
    race, own, stratum = np.empty(patches, np.float32), np.empty(patches, np.int32), np.empty(patches, np.uint8)
    race_bits = race.view(np.int32)
    for b in range(batch):
        _philox(words, sample_keys[b], last, keys)
        for block in range(words.shape[1]):
            for j in range(4):
                odd[4 * block + j] = float32(int32((words[j, block] >> uint32(9)) * uint32(2) + uint32(1)))
        _exponential(odd.view(np.uint32), own)
        for i in range(patches):
            race[i] = weight_of[level[b, i]]
            stratum[i] = stratum_of[level[b, i]]
        for i in range(patches):
            race[i] = float32(own[i]) / race[i]
        hidden[b] = 0
        inside: Any = 0
        for s in range(num_hidden.shape[1]):
            size = int32(0)
            for i in range(patches):
                own[i] = race_bits[i] if stratum[i] == s else _ABOVE
                size = int32(size + int32(stratum[i] == s))
            if not 0 <= num_hidden[b, s] <= size:
                return False
            inside += size
            _hide_smallest(own, num_hidden[b, s], size, hidden[b])
        if inside != patches:
            return False
    return True


@njit(**_NUMBA)
def _philox(words: Any, sample_key: Any, last: Any, keys: Any) -> None:
    """Words of one sample, [4, blocks], as `shared.rng.draw_u32` gives them block by block."""
    for block in range(words.shape[1]):
        words[0, block], words[1, block] = block, uint32(sample_key)
        words[2, block], words[3, block] = uint32(sample_key >> _HALF), last
    for r in range(len(keys)):
        key0, key1 = keys[r, 0], keys[r, 1]
        for block in range(words.shape[1]):
            product0 = uint64(words[0, block]) * uint64(0xD2511F53)
            product1 = uint64(words[2, block]) * uint64(0xCD9E8D57)
            words[0, block] = uint32(product1 >> _HALF) ^ words[1, block] ^ key0
            words[2, block] = uint32(product0 >> _HALF) ^ words[3, block] ^ key1
            words[1, block] = uint32(product1)
            words[3, block] = uint32(product0)


@njit(**_NUMBA)
def _exponential(odd_bits: Any, out: Any) -> None:
    """`stage2_pretrain.kernels.reference.exponential_q26`, from the bits of the odd integers as floats."""
    for i in range(len(out)):
        bits = uint64(odd_bits[i])
        t = (bits & uint64(0x7FFFFF)) << uint64(9)
        p = _P4 - (t * _P5 >> _HALF)
        p = _P3 - (t * p >> _HALF)
        p = _P2 - (t * p >> _HALF)
        p = _P1 - (t * p >> _HALF)
        p = _P0 - (t * p >> _HALF)
        logarithm = t + ((t * (t ^ _LOW) >> _HALF) * p >> _HALF)
        exponent = uint64(151) - (bits >> uint64(23))
        out[i] = max(int32((exponent << uint64(26)) - (logarithm >> uint64(6))), int32(1))


@njit(**_NUMBA)
def _hide_smallest(keys: Any, count: Any, size: Any, hidden: Any) -> None:
    """Set the ``count`` smallest of ``size`` keys that are not `_ABOVE`; of equal ones the lower patches."""
    # The bound is the largest number with at most `count` keys below it, as far as its bits are known.
    bound, below = (_ABOVE, count) if count == size else (int32(0), int32(0))
    bit = int32(30)
    while below < count and bit >= 0:
        candidate = bound | (int32(1) << bit)
        found = int32(0)
        for i in range(len(keys)):
            found = int32(found + int32(keys[i] < candidate))
        if found <= count:
            bound, below = candidate, found
        bit -= int32(1)
    for i in range(len(keys)):
        hidden[i] |= uint32(keys[i] < bound)
    i = 0
    while below < count:
        if keys[i] == bound:
            hidden[i] = 1
            below += int32(1)
        i += 1
