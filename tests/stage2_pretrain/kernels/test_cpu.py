"""What fast host code could get wrong where the contract tests of `test_reference` do not look."""

from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.rng import draw_u32, sample_keys
from stage2_pretrain.kernels import cpu, reference

ONES = np.ones(256, np.int32)
ONE_STRATUM = np.zeros(256, np.uint8)
NAMES: dict[str, int] = {"seed_key": 0xFEDCBA9876543210, "epoch": (1 << 24) - 1, "view": 255}


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 700), st.integers(1, 4), st.integers(0, 2**32), st.integers(1, 2**24))
def test_batches_equal_the_reference(batch: int, patches: int, strata: int, seed: int, weight_max: int) -> None:
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 256, (batch, patches), dtype=np.uint8)
    stratum_of = rng.integers(0, strata, 256).astype(np.uint8)
    weight_of = rng.integers(1, weight_max, 256, endpoint=True).astype(np.int32)
    size = np.stack([(stratum_of[level] == s).sum(1) for s in range(strata)], axis=1)
    num_hidden = rng.integers(0, size, endpoint=True).astype(np.int32)
    keys = rng.integers(0, 2**64, batch, dtype=np.uint64, endpoint=False)
    plan = (level, stratum_of, weight_of, num_hidden, keys)
    assert np.array_equal(cpu.draw_hidden(*plan, **NAMES), reference.draw_hidden(*plan, **NAMES))


def test_equal_keys_go_to_the_lower_patch() -> None:
    patches = 65535
    keys = sample_keys(["a"])
    words = draw_u32(NAMES["seed_key"], keys, epoch=NAMES["epoch"], view=NAMES["view"], n=patches)
    race = np.sort(reference.race_key(words, np.ones_like(words, np.int32))[0])
    ties = np.flatnonzero(race[:-1] == race[1:])
    assert len(ties) > 50  # 23 bits among 65535 patches
    for place in ties[:20].tolist():
        plan = (np.zeros((1, patches), np.uint8), ONE_STRATUM, ONES, np.array([[place + 1]], np.int32), keys)
        assert np.array_equal(cpu.draw_hidden(*plan, **NAMES), reference.draw_hidden(*plan, **NAMES))


def test_every_patch_of_the_answer_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(shape: Any, dtype: Any) -> np.ndarray:
        return np.full(shape, True, dtype)

    cpu.draw_hidden(
        np.zeros((1, 1), np.uint8), ONE_STRATUM, ONES, np.zeros((1, 1), np.int32), sample_keys("a"), **NAMES
    )
    monkeypatch.setattr(np, "empty", poisoned)
    plan = (np.zeros((3, 50), np.uint8), ONE_STRATUM, ONES, np.array([[0], [20], [50]], np.int32), sample_keys("abc"))
    assert cpu.draw_hidden(*plan, **NAMES).sum(1).tolist() == [0, 20, 50]


def test_slices_of_larger_arrays_are_taken() -> None:
    level = np.arange(4 * 98, dtype=np.uint8).reshape(4, 98)[::2, ::2]
    keys = np.arange(8, dtype=np.uint64)[::4]
    plan = (level, ONE_STRATUM, ONES, np.array([[9, 1], [9, 2]], np.int32)[:, :1], keys)
    assert np.array_equal(cpu.draw_hidden(*plan, **NAMES), reference.draw_hidden(*plan, **NAMES))


def test_without_a_writable_cache_it_compiles_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def njit(signature: str, **options: Any) -> Any:
        asked.append(options.get("cache", False))
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(signature, **options)

    monkeypatch.setattr(cpu, "njit", njit)
    compiled = cpu._compiled.__wrapped__()
    assert asked == [True, False]
    assert callable(compiled)
