"""G3: microseconds a sample of the CPU sampler, beside the ways SparK and MAE draw theirs.

``python -m tests.benchmarks.sampler --json [--quick]``. One thread each: a loader's worker has one. The peers are
written after their papers' descriptions (SparK, arXiv 2301.03580; MAE, arXiv 2111.06377), batched, in torch: noise,
argsort, scatter. They draw one stratum of equal weights; ours is timed on that, and on two weighted strata.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels import IMPLS

BATCH, PATCHES, HIDDEN = 512, 196, 118
GOALS = {"spark": 8.0, "mae": 12.0}


def spark(batch: int, patches: int, hidden: int) -> Tensor:
    """SparK: keep the first of a random order, scatter them into a map of what is active."""
    kept = torch.rand(batch, patches).argsort(dim=1)[:, : patches - hidden]
    return ~torch.zeros(batch, patches, dtype=torch.bool).scatter_(1, kept, True)


def mae(batch: int, patches: int, hidden: int) -> Tensor:
    """MAE: shuffle by noise, mark the tail, and unshuffle the marks."""
    shuffle = torch.rand(batch, patches).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    marks = torch.ones(batch, patches)
    marks[:, : patches - hidden] = 0
    return marks.gather(1, restore).bool()


def arguments(strata: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Level, tables, counts and keys of a batch: one stratum of equal weights, or two of unequal ones."""
    level = np.random.default_rng(strata).integers(0, 255, (BATCH, PATCHES), dtype=np.uint8)
    stratum_of = (np.arange(256) >= 127).astype(np.uint8) * np.uint8(strata - 1)
    weight_of = np.ones(256, np.int32) if strata == 1 else np.arange(1, 257, dtype=np.int32)
    size = np.stack([(stratum_of[level] == s).sum(1) for s in range(strata)], axis=1)
    num_hidden = (size * HIDDEN // PATCHES).astype(np.int32)
    return level, stratum_of, weight_of, num_hidden, sample_keys(map(str, range(BATCH)))


def is_right() -> bool:
    """Ours equals the reference to the bit; the peers hide as many as asked."""
    names: dict[str, int] = {"seed_key": seed_key("mask", 1), "epoch": 7, "view": 0}
    ours, reference = IMPLS.load("cpu"), IMPLS.load("reference")
    same = all(np.array_equal(ours(*arguments(s), **names), reference(*arguments(s), **names)) for s in (1, 2))
    return same and all(bool((way(BATCH, PATCHES, HIDDEN).sum(1) == HIDDEN).all()) for way in (spark, mae))


def measure(repeats: int) -> dict[str, list[float]]:
    """Microseconds a sample, interleaved, after one round of warming up."""
    names: dict[str, int] = {"seed_key": seed_key("mask", 1), "epoch": 7}
    one, two = arguments(1), arguments(2)
    ours, reference = IMPLS.load("cpu"), IMPLS.load("reference")
    ways: dict[str, Callable[[], object]] = {
        "cpu": lambda: ours(*one, **names),
        "cpu, two weighted strata": lambda: ours(*two, **names),
        "reference": lambda: reference(*one, **names),
        "spark": lambda: spark(BATCH, PATCHES, HIDDEN),
        "mae": lambda: mae(BATCH, PATCHES, HIDDEN),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - started) / BATCH * 1e6)
    return {name: values[1:] for name, values in times.items()}


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure, print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sampler", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {"benchmark": "sampler", "gate": "green" if is_right() else "red"}
    if result["gate"] == "green":
        times = measure(40 if options.quick else 400)
        result["microseconds"] = {name: round(median(values), 3) for name, values in times.items()}
        result["G3"] = {
            peer: {
                "ratio": round(median(a / b for a, b in zip(times[peer], times["cpu"], strict=True)), 1),
                "goal": goal,
            }
            for peer, goal in GOALS.items()
        }
        result["repeats"] = len(times["cpu"])
        result["shape"] = {"batch": BATCH, "patches": PATCHES, "hidden": HIDDEN, "threads": 1}
        result["versions"] = {name: version(name) for name in ("torch", "numba", "numpy")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


if __name__ == "__main__":
    main()
