"""The fused sampler under Triton's interpreter, against the reference; `test_fused` runs this file in a process.

Triton looks for ``TRITON_INTERPRET=1`` when it is imported, so no other test can share the process.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UsageError
from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels import fused
from stage2_pretrain.kernels.fused import Fused, draw_regions
from stage2_pretrain.kernels.reference import draw_hidden
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.coverage import combine, pool
from stage2_pretrain.window import WindowOptions, draw_windows

MILLI = st.integers(0, 1000)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    batch, regions = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    maps = rng.integers(0, 255, (batch, regions, draw(st.integers(24, 50)), draw(st.integers(24, 50))), dtype=np.uint8)
    for row in maps:
        row[:] = {"noise": row, "none": 0, "all": 254, "half": np.where(row > 127, 254, 0)}[
            draw(st.sampled_from(["noise", "none", "all", "half"]))
        ]
    total = draw(st.none() | MILLI)
    return {
        "maps": maps,
        "sizes": rng.integers(30, 3000, (batch, 2)),
        "keys": rng.integers(0, 2**64, batch, dtype=np.uint64, endpoint=False),
        "grid": (draw(st.integers(1, 9)), draw(st.integers(1, 9))),
        "window": WindowOptions(crop_scale=(draw(st.integers(300, 1000)), 1000), turns=draw(st.booleans())),
        "stratum_of": (rng.integers(0, 256, 256) < draw(st.integers(0, 256))).astype(np.uint8),
        "weight_of": rng.integers(1, draw(st.sampled_from([1, 9, 2**24])), 256, endpoint=True).astype(np.int32),
        "region_weights": draw(st.none() | st.just(rng.integers(1, 2**31, regions).astype(np.int32))),
        "counts": Counts(total, draw(MILLI), draw(MILLI)),
        "seed_key": draw(st.integers(0, 2**64 - 1)),
        "epoch": draw(st.integers(0, 2**24 - 1)),
        "view": draw(st.integers(0, 255)),
    }


def launch(case: dict[str, Any]) -> tuple[Fused, np.ndarray]:
    windows = draw_windows(case["sizes"], case["keys"], seed=1, epoch=case["epoch"], options=case["window"])
    weights = case["region_weights"]
    made = draw_regions(
        torch.from_numpy(case["maps"]),
        torch.from_numpy(windows),
        torch.from_numpy(case["keys"].view(np.int64)),
        torch.from_numpy(case["stratum_of"]),
        torch.from_numpy(case["weight_of"]),
        case["counts"],
        grid=case["grid"],
        region_weights=None if weights is None else torch.from_numpy(weights),
        **{name: case[name] for name in ("seed_key", "epoch", "view")},
    )
    return made, windows


def check(case: dict[str, Any]) -> None:
    made, windows = launch(case)
    weights = case["region_weights"]
    coverage = combine(pool(case["maps"], windows, case["grid"]), None if weights is None else weights.astype(np.int64))
    num_hidden, clamped = case["counts"].of((case["stratum_of"][coverage] == 0).sum(1), coverage.shape[1])
    names = {name: case[name] for name in ("seed_key", "epoch", "view")}
    hidden = draw_hidden(coverage, case["stratum_of"], case["weight_of"], num_hidden, case["keys"], **names)
    assert np.array_equal(made.coverage, coverage)
    assert np.array_equal(made.num_hidden, num_hidden)
    assert np.array_equal(made.clamped, clamped)
    assert made.hidden.dtype == torch.bool
    assert np.array_equal(made.hidden, hidden)
    assert not made.absent.any()
    ends = made.cu_seqlens.tolist()
    assert ends == [0, *(~hidden).sum(1).cumsum().tolist()]
    assert np.array_equal(made.visible[: ends[-1]], np.flatnonzero(~hidden))


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as nonsense: what is not written shows."""
    empty = torch.empty

    def poison(*shape: Any, **options: Any) -> torch.Tensor:
        return empty(*shape, **options).fill_(0x5A)

    monkeypatch.setattr("stage2_pretrain.kernels.fused.torch.empty", poison)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_a_launch_equals_the_reference(case: dict[str, Any]) -> None:
    check(case)


def one(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    return {
        "maps": rng.integers(0, 255, (2, 1, 80, 80), dtype=np.uint8),
        "sizes": np.array([[80, 80], [300, 211]]),
        "keys": sample_keys(["a", "b"]),
        "grid": (14, 14),
        "window": WindowOptions(turns=True),
        "stratum_of": (np.arange(256) < 127).astype(np.uint8),
        "weight_of": np.ones(256, np.int32),
        "region_weights": None,
        "counts": Counts(600, 800),
        "seed_key": seed_key("mask", 2**64 - 1),
        "epoch": 3,
        "view": 1,
        **changes,
    }


@pytest.mark.parametrize("grid", [(1, 1), (1, 64), (7, 7), (14, 14), (23, 31), (64, 64)])
def test_grids_of_every_block(grid: tuple[int, int]) -> None:
    check(one(grid=grid, window=WindowOptions(crop_scale=(1000, 1000), flip=True)))


def test_ties_go_to_the_lower_patch() -> None:
    check(
        one(maps=np.full((2, 1, 80, 80), 254, np.uint8), grid=(64, 64), window=WindowOptions(crop_scale=(1000, 1000)))
    )


def test_many_samples_are_packed_over_several_blocks_and_launches() -> None:
    count = 40  # more than the 16 words that a program of 4 patches reads at once
    changes = {
        "maps": np.random.default_rng(0).integers(0, 255, (count, 1, 24, 24), dtype=np.uint8),
        "sizes": np.full((count, 2), 24),
        "grid": (2, 2),
        "counts": Counts(None, 1000, 250),
    }
    for epoch in range(3):
        check(one(**changes, keys=sample_keys(f"{epoch} {number}" for number in range(count)), epoch=epoch))


def test_an_absent_map_is_told() -> None:
    case = one()
    case["maps"][1] = 255
    assert launch(case)[0].absent.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "match"),
    [({"grid": (65, 64)}, "4160 patches"), ({"epoch": 1 << 24}, "epoch"), ({"view": 256}, "view")],
)
def test_arguments_out_of_range_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        launch(one(**change))


@pytest.mark.parametrize("break_it", [lambda word: word ^ 1, lambda word: word >> 1])
def test_another_key_is_another_mask(break_it: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    signed = fused._signed
    monkeypatch.setattr("stage2_pretrain.kernels.fused._signed", lambda word: signed(break_it(word)))
    with pytest.raises(AssertionError):
        check(one())
