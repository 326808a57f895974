"""Batches of region maps and what must come of them: for the operator and for the kernel behind it, on any device."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels.drawn import DrawnOnDevice, allocate
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
        "region_weights": draw(st.none() | st.just(rng.integers(1, draw(st.sampled_from([9, 2**31, 2**52])), regions))),
        "counts": Counts(total, draw(MILLI), draw(MILLI)),
        "seed_key": draw(st.integers(0, 2**64 - 1)),
        "epoch": draw(st.integers(0, 2**24 - 1)),
        "view": draw(st.integers(0, 255)),
    }


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


def none() -> dict[str, Any]:
    """A batch without a sample."""
    case = one(windows=np.empty((0, 8), np.int32))
    return {**case, **{name: case[name][:0] for name in ("maps", "sizes", "keys")}}


def assert_none(made: DrawnOnDevice) -> None:
    """What comes of it."""
    assert made.hidden.shape == made.coverage.shape == (0, 196)
    assert made.num_hidden.shape == (0, 2)
    assert made.visible.shape == (0,)
    assert made.cu_seqlens.tolist() == [0]


def windows_of(case: dict[str, Any]) -> np.ndarray:
    if "windows" in case:
        return np.asarray(case["windows"])
    return draw_windows(case["sizes"], case["keys"], seed=1, epoch=0, options=case["window"])


def launch(draw: Callable[..., DrawnOnDevice], case: dict[str, Any], device: str = "cpu") -> DrawnOnDevice:
    """Draw a case by the operator or the kernel."""
    parts = (case["maps"], windows_of(case), case["keys"].view(np.int64), case["stratum_of"], case["weight_of"])
    weights = case["region_weights"]
    return draw(
        *(torch.from_numpy(part).to(device) for part in parts),
        case["counts"],
        grid=case["grid"],
        region_weights=None if weights is None else torch.from_numpy(weights).to(device),
        **{name: case[name] for name in ("seed_key", "epoch", "view")},
    )


def expected(case: dict[str, Any]) -> DrawnOnDevice:
    """The parts that are the specification, one after the other."""
    coverage = combine(pool(case["maps"], windows_of(case), case["grid"]), case["region_weights"])
    patches = coverage.shape[1]
    first = (case["stratum_of"][coverage] == 0).sum(1)
    num_hidden, clamped = case["counts"].of(first, patches)
    names = {name: case[name] for name in ("seed_key", "epoch", "view")}
    hidden = draw_hidden(coverage, case["stratum_of"], case["weight_of"], num_hidden, case["keys"], **names)
    seen = np.flatnonzero(~hidden)
    return DrawnOnDevice(
        torch.from_numpy(hidden),
        torch.from_numpy(coverage),
        torch.from_numpy(np.stack([first, patches - first], axis=1).astype(np.int32)),
        torch.from_numpy(num_hidden),
        torch.from_numpy(clamped),
        torch.zeros(len(hidden), dtype=torch.bool),
        torch.from_numpy(np.concatenate([seen, np.full(hidden.size - len(seen), -1)]).astype(np.int32)),
        torch.tensor([0, *(~hidden).sum(1).cumsum().tolist()], dtype=torch.int32),
    )


def assert_equal(made: DrawnOnDevice, wanted: DrawnOnDevice) -> None:
    """Every result: kind, shape and value."""
    for name, got, want in zip(DrawnOnDevice._fields, made, wanted, strict=True):
        assert got.dtype == want.dtype, name
        assert torch.equal(got.cpu(), want.cpu()), name


def poisoned(maps: torch.Tensor, patches: int) -> DrawnOnDevice:
    """Room that begins as nonsense: what is not written shows."""
    made = allocate(maps, patches)
    for part in made:
        part.view(torch.uint8).fill_(0x5A)
    return made
