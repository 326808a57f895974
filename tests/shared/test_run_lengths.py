"""COCO's packed run lengths, against pycocotools."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from shared.outlines import unpack_runs
from shared.run_lengths import pack_runs, runs_of


@given(arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)))
@settings(max_examples=60, deadline=None)
def test_as_pycocotools_packs(inside: np.ndarray) -> None:
    theirs = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"].decode()
    assert pack_runs(runs_of(inside)) == theirs
    assert unpack_runs(theirs) == runs_of(inside)


@given(st.lists(st.integers(0, 1 << 30), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_long_runs_come_back(runs: list[int]) -> None:
    assert unpack_runs(pack_runs(runs)) == runs
