"""Philox against published answers, the layout of keys and counters, and what is refused."""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import rng
from shared.errors import UsageError

ONES = 0xFFFFFFFF


def philox_slowly(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in whole numbers."""
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, 1 << 32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ONES] * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: tuple[int, int], answer: str) -> None:
    words = rng.philox4x32(np.array(counter, np.uint32), key)
    assert words.dtype == np.uint32
    assert " ".join(f"{word:08x}" for word in words) == answer


@given(st.lists(st.integers(0, ONES), min_size=4, max_size=4), st.tuples(st.integers(0, ONES), st.integers(0, ONES)))
def test_philox_equals_whole_numbers(counter: list[int], key: tuple[int, int]) -> None:
    assert rng.philox4x32(np.array(counter, np.int64), key).tolist() == philox_slowly(counter, list(key))


def test_keys_are_the_first_bytes_of_digests() -> None:
    text = b"mwm-v1\0mask\0" + struct.pack("<Q", 2**63 + 5)
    assert rng.seed_key("mask", 2**63 + 5) == struct.unpack("<Q", hashlib.sha256(text).digest()[:8])[0]
    name = "häm/01.png"
    assert rng.sample_key(name) == struct.unpack("<Q", hashlib.sha256(name.encode("utf-8")).digest()[:8])[0]
    assert rng.sample_keys(["b", "a"]).tolist() == [rng.sample_key("b"), rng.sample_key("a")]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**24 - 1), st.integers(0, 255))
def test_counter_holds_block_sample_epoch_and_view(key: int, sample: int, epoch: int, view: int) -> None:
    words = rng.draw_u32(key, [sample], epoch=epoch, view=view, n=10)[0].tolist()
    expected = [
        word
        for block in range(3)
        for word in philox_slowly([block, sample % 2**32, sample >> 32, epoch | view << 24], [key % 2**32, key >> 32])
    ]
    assert words == expected[:10]


def test_words_are_a_function_of_names() -> None:
    words = rng.uniform_u32("order", 7, "a.png", 3, 6)
    assert (
        words.tolist()
        == rng.draw_u32(rng.seed_key("order", 7), rng.sample_keys(["b", "a.png"]), epoch=3, n=6)[1].tolist()
    )
    assert words[:2].tolist() == rng.uniform_u32("order", 7, "a.png", 3, 2).tolist()
    others = [("mask", 7, "a.png", 3), ("order", 8, "a.png", 3), ("order", 7, "b.png", 3), ("order", 7, "a.png", 4)]
    for names in others:
        assert words.tolist() != rng.uniform_u32(*names, 6).tolist()


def test_equal_keys_in_a_corpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="same key"):
        rng.sample_keys(["a", "b", "a"])
    monkeypatch.setattr(rng, "sample_key", lambda name: len(name))
    with pytest.raises(UsageError, match="'ab' and 'cd'"):
        rng.sample_keys(["ab", "c", "cd"])


@pytest.mark.parametrize("names", [{"epoch": 1 << 24}, {"epoch": -1}, {"epoch": 0, "view": 256}])
def test_names_out_of_range_are_refused(names: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="epoch"):
        rng.draw_u32(0, [0], n=1, **names)


@pytest.mark.parametrize(("purpose", "seed"), [("mask", 1 << 64), ("mask", -1), ("a\0b", 0)])
def test_seeds_out_of_range_are_refused(purpose: str, seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        rng.seed_key(purpose, seed)


@given(st.integers(0, ONES), st.integers(1, 2**31))
def test_below_stays_below(word: int, bound: int) -> None:
    assert rng.below(np.array([word], np.uint32), bound).tolist() == [word * bound >> 32]
    assert 0 <= word * bound >> 32 < bound
