"""Randomness as a function of names: Philox4x32-10 over (seed, purpose, sample, epoch, index).

Nothing here has a state: the same names give the same words on any machine, in any order, in any process.
Layout ("Bits, version 1"): the key is the seed key, the counter is
``(index // 4, sample key low, sample key high, epoch | view << 24)``, and ``index % 4`` picks the word.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int64, Shaped, UInt32, UInt64

from shared.errors import UsageError

EPOCHS_MAX = 1 << 24
"""Epochs are 0 .. 2^24 - 1: the lower 24 bits of the counter's last word."""
VIEWS_MAX = 1 << 8
"""Views of a sample in one epoch are 0 .. 255: the upper 8 bits of the counter's last word."""

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: Shaped[np.ndarray, "*B 4"], key: tuple[int, int]) -> UInt32[np.ndarray, "*B 4"]:
    """Encrypt counters with Philox4x32-10.

    Args:
        counter: Four words a counter, each below 2^32, any integer dtype.
        key: Two words below 2^32.

    Returns:
        Four random words a counter.

    >>> [hex(word) for word in philox4x32(np.zeros(4, np.uint32), (0, 0)).tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    # 32-bit words in 64-bit lanes, so that a product is whole.
    word0, word1, word2, word3 = np.moveaxis(np.asarray(counter).astype(np.uint64), -1, 0)
    for key0, key1 in round_keys(key[0] | key[1] << 32):
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0, word2 = (product1 >> _HALF) ^ word1 ^ np.uint64(key0), (product0 >> _HALF) ^ word3 ^ np.uint64(key1)
        word1, word3 = product1 & _LOW, product0 & _LOW
    return np.stack([word0, word1, word2, word3], axis=-1).astype(np.uint32)


def round_keys(key: int) -> list[tuple[int, int]]:
    """The two 32-bit words that each round of Philox mixes in, from a 64-bit key (low word first)."""
    low, high = key & 0xFFFFFFFF, key >> 32
    return [((low + r * _WEYL[0]) & 0xFFFFFFFF, (high + r * _WEYL[1]) & 0xFFFFFFFF) for r in range(ROUNDS)]


def seed_key(purpose: str, seed: int) -> int:
    """Key of a stream: the first 8 bytes, little-endian, of sha256("mwm-v1\\0" purpose "\\0" u64le(seed)).

    Args:
        purpose: What is drawn, e.g. ``"mask"``; streams of different purposes are independent. No NUL in it.
        seed: 0 .. 2^64 - 1.

    Raises:
        UsageError: A seed out of range, or a NUL in the purpose.
    """
    if not 0 <= seed < 1 << 64 or "\0" in purpose:
        raise UsageError(f"seed {seed} for {purpose!r}: expected 0 .. 2^64 - 1, and a purpose without NUL")
    text = b"mwm-v1\0" + purpose.encode() + b"\0" + seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def sample_key(sample_id: str) -> int:
    """Key of a sample: the first 8 bytes, little-endian, of sha256(sample_id in UTF-8)."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "little")


def sample_keys(sample_ids: Iterable[str]) -> UInt64[np.ndarray, "N"]:
    """Keys of a corpus, in its order.

    Raises:
        UsageError: Two samples have equal keys, so they would always be drawn alike.
    """
    names: dict[int, str] = {}
    for name in sample_ids:
        if (key := sample_key(name)) in names:
            raise UsageError(
                f"samples {names[key]!r} and {name!r} have the same key {key:016x}; keys of a corpus are distinct",
                hint="give one of them another sample_id",
            )
        names[key] = name
    return np.fromiter(names, np.uint64, len(names))


def draw_u32(
    key: int, samples: UInt64[np.ndarray, "B"] | Sequence[int], *, epoch: int, n: int, view: int = 0
) -> UInt32[np.ndarray, "B n"]:
    """Draw n words for each sample.

    Args:
        key: From `seed_key`.
        samples: Sample keys, below 2^64.
        epoch: 0 .. 2^24 - 1.
        n: Words a sample, up to 2^34.
        view: 0 .. 255.

    Raises:
        UsageError: Epoch or view out of range.
    """
    if not 0 <= epoch < EPOCHS_MAX or not 0 <= view < VIEWS_MAX:
        raise UsageError(f"epoch {epoch}, view {view}: expected epoch < 2^24 and view < 256")
    keys = np.asarray(samples, np.uint64)[:, None]
    blocks = np.arange((n + 3) // 4, dtype=np.uint64)[None]
    last = np.uint64(epoch | view << 24)
    counter = np.stack(np.broadcast_arrays(blocks, keys & _LOW, keys >> _HALF, last), axis=-1)
    return philox4x32(counter, (key & 0xFFFFFFFF, key >> 32)).reshape(len(keys), -1)[:, :n]


def uniform_u32(purpose: str, seed: int, sample_id: str, epoch: int, n: int) -> UInt32[np.ndarray, "n"]:
    """Draw n words for one sample, by names alone. Ranges as `seed_key` and `draw_u32`."""
    return draw_u32(seed_key(purpose, seed), [sample_key(sample_id)], epoch=epoch, n=n)[0]


def below(words: Shaped[np.ndarray, "*B"], bound: Shaped[np.ndarray, "*B"] | int) -> Int64[np.ndarray, "*B"]:
    """Turn words into integers 0 .. bound - 1 by ``(word * bound) >> 32``.

    Args:
        words: Uniform 32-bit words.
        bound: 1 .. 2^31. No value is off its share by more than ``bound / 2^32`` of it.
    """
    return ((words.astype(np.uint64) * np.asarray(bound).astype(np.uint64)) >> _HALF).astype(np.int64)
