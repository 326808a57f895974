"""The fused sampler under Triton's interpreter, against the reference; `test_fused` runs this file in a process.

Triton looks for ``TRITON_INTERPRET=1`` when it is imported, so no other test can share the process.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from shared.errors import UsageError
from shared.rng import sample_keys
from stage2_pretrain.kernels import fused, op
from stage2_pretrain.kernels.drawn import DrawnOnDevice
from stage2_pretrain.kernels.fused import draw_regions
from stage2_pretrain.kernels.op import draw_hidden
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.window import WindowOptions
from tests.stage2_pretrain.kernels.region_cases import (
    assert_equal,
    assert_none,
    cases,
    expected,
    launch,
    none,
    one,
    poisoned,
)


def check(case: dict[str, Any]) -> DrawnOnDevice:
    """The kernel gives the bits of the reference, and of the operator on a CPU."""
    made = launch(draw_regions, case)
    assert_equal(made, expected(case))
    assert_equal(launch(draw_hidden, case), made)
    return made


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "allocate", poisoned)


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_a_launch_equals_the_reference(case: dict[str, Any]) -> None:
    check(case)


@pytest.mark.parametrize("grid", [(1, 1), (1, 64), (7, 7), (14, 14), (23, 31), (64, 64)])
def test_grids_of_every_block(grid: tuple[int, int]) -> None:
    check(one(grid=grid, window=WindowOptions(crop_scale=(1000, 1000), flip=True)))


def test_ties_go_to_the_lower_patch() -> None:
    check(
        one(maps=np.full((2, 1, 80, 80), 254, np.uint8), grid=(64, 64), window=WindowOptions(crop_scale=(1000, 1000)))
    )


def test_many_samples_are_packed_over_several_blocks_and_launches() -> None:
    count = 20  # more than the 16 words that a program of 4 patches reads at once
    changes = {
        "maps": np.random.default_rng(0).integers(0, 255, (count, 1, 24, 24), dtype=np.uint8),
        "sizes": np.full((count, 2), 24),
        "grid": (2, 2),
        "counts": Counts(None, 1000, 250),
    }
    for epoch in range(3):
        check(one(**changes, keys=sample_keys(f"{epoch} {number}" for number in range(count)), epoch=epoch))


def test_the_operator_s_way_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    changes = {"grid": (3, 2), "region_weights": np.array([2**40]), "counts": Counts(None, 800, 300)}
    with torch.library._scoped_library("mwm", "IMPL") as here:
        here.impl("draw_hidden", op._draw_on_cuda, "CPU", allow_override=True)
        for case in (one(grid=(3, 2), seed_key=2**63 + 5), one(**changes)):
            assert_equal(launch(draw_hidden, case), expected(case))
        with pytest.raises(UsageError, match="4160 patches"):  # which a CPU takes
            launch(draw_hidden, one(grid=(65, 64)))
    case = one(grid=(65, 64), window=WindowOptions(crop_scale=(1000, 1000)))
    assert_equal(launch(draw_hidden, case), expected(case))


def test_a_batch_of_none() -> None:
    assert_none(launch(draw_regions, none()))


def test_maps_beyond_two_to_the_31_bytes() -> None:
    # Pages never written take no memory, and only the windows are read.
    side, regions = 2896, 129
    maps = np.zeros((2, regions, side, side), np.uint8)
    assert maps.size - side * side > 2**31
    maps[:, -1, -4:, -4:] = np.random.default_rng(0).integers(0, 255, (2, 4, 4))
    windows = np.tile(np.array([side - 4, side - 4, 4, 4, side, side, 1, 3], np.int32), (2, 1))
    case = one(maps=maps, windows=windows, grid=(2, 2))
    # The other regions are 0 everywhere: the largest coverage is that of the last.
    assert_equal(launch(draw_regions, case), expected({**case, "maps": maps[:, -1:]}))


def test_an_absent_map_is_told() -> None:
    case = one()
    case["maps"][1] = 255
    assert launch(draw_regions, case).absent.tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"grid": (65, 64)}, "4160 patches"),
        ({"epoch": 1 << 24}, "epoch"),
        ({"view": 256}, "view"),
        ({"maps": np.zeros((1, 1, 1, (1 << 23) + 1), np.uint8)}, "maps of 1x8388609"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        launch(draw_regions, one(**change))


@pytest.mark.parametrize("break_it", [lambda word: word ^ 1, lambda word: word >> 1])
def test_another_key_is_another_mask(break_it: Callable[[int], int], monkeypatch: pytest.MonkeyPatch) -> None:
    signed = fused._signed
    monkeypatch.setattr("stage2_pretrain.kernels.fused._signed", lambda word: signed(break_it(word)))
    with pytest.raises(AssertionError):
        check(one())
