"""G3: microseconds a sample of the CPU sampler, beside the ways SparK and MAE draw theirs. G4: of the GPU's, a batch.

``python -m tests.benchmarks.sampler --json [--quick]``. One thread each: a loader's worker has one. The peers are
written after their papers' descriptions (SparK, arXiv 2301.03580; MAE, arXiv 2111.06377), batched, in torch: noise,
argsort, scatter. They draw one stratum of equal weights; ours is timed on that, and on two weighted strata.

G4 needs a GPU: from region maps to hidden patches, beside two regions ranked in torch, from the maps and (easier) from
coverage already pooled; both timed by the device's own events. Maps of 256 pixels are 64 MiB a batch: what memory takes
to read them is the floor.
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
from torch.nn.functional import adaptive_avg_pool2d

from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels import IMPLS
from stage2_pretrain.masking.plan import build_policy
from stage2_pretrain.masking.sampler import Drawn, MaskSampler

BATCH, PATCHES, HIDDEN = 512, 196, 118
GOALS = {"spark": 8.0, "mae": 12.0}
GPU_BATCH, GPU_GOAL_US = 1024, 10.0
GPU_SHAPES = [(7, 64), (14, 64), (7, 256), (14, 256)]
"""Side of the grid, side of the maps."""


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


def pooled(maps: Tensor, side: int) -> Tensor:
    """Mean coverage of each patch, in [0, 254]."""
    return adaptive_avg_pool2d(maps.float(), side).amax(1).flatten(1)


def two_regions(coverage: Tensor) -> Tensor:
    """Policy `region` at its defaults, in torch: noise ranked in each region, the lowest hidden, 600 of all."""
    patches = coverage.shape[1]
    total = (patches * 600 + 500) // 1000
    inside = coverage >= 127
    size = inside.sum(1)
    count = ((size * 800 + 500) // 1000).clamp_min(total - patches + size)
    count = torch.minimum(count, size.clamp_max(total))
    noise = torch.rand_like(coverage)
    hidden = torch.zeros_like(inside)
    for region, number in ((inside, count), (~inside, total - count)):
        rank = torch.where(region, noise, 2.0).argsort(dim=1).argsort(dim=1)
        hidden |= rank < number[:, None]
    return hidden


def regions(side: int, map_px: int, device: str) -> tuple[MaskSampler, dict[str, Tensor]]:
    """A sampler of policy `region`, and a batch of whole images with one round region each."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:map_px, :map_px] / map_px
    centre, radius = rng.uniform(0.2, 0.8, (2, GPU_BATCH, 1, 1)), rng.uniform(0.05, 0.5, (GPU_BATCH, 1, 1))
    maps = np.uint8(254) * (np.hypot(y - centre[0], x - centre[1]) < radius).astype(np.uint8)
    batch = {
        "maps": torch.from_numpy(maps[:, None]),
        "window": torch.tensor([[0, 0, 224, 224, 224, 224, 0, 0]], dtype=torch.int32).repeat(GPU_BATCH, 1),
        "sample_key": torch.from_numpy(sample_keys(map(str, range(GPU_BATCH))).view(np.int64)),
    }
    sampler = MaskSampler(build_policy("region"), grid=(side, side), seed=1, regions=("region",))
    return sampler, {name: part.to(device) for name, part in batch.items()}


def is_right_on(device: str) -> bool:
    """What the operator draws on a device is what the reference draws; the peer hides as many."""
    for side in (7, 14):
        sampler, batch = regions(side, 64, device)
        drawn = sampler.fetch(sampler.draw_device(batch, 3), 3)
        wanted = sampler.draw({name: part.cpu() for name, part in batch.items()}, 3)
        peer = two_regions(torch.from_numpy(drawn.coverage).to(device).float())
        same = all(np.array_equal(getattr(drawn, name), getattr(wanted, name)) for name in Drawn.__dataclass_fields__)
        if not same or not np.array_equal(peer.sum(1).cpu(), drawn.hidden.sum(1)):
            return False
    return True


def measure_on(device: str, repeats: int) -> list[dict[str, Any]]:
    """Microseconds a batch, interleaved, after some rounds of warming up."""
    rows = []
    for side, map_px in GPU_SHAPES:
        sampler, batch = regions(side, map_px, device)
        maps = batch["maps"]
        coverage = pooled(maps, side)

        def ours(sampler: MaskSampler = sampler, batch: dict[str, Tensor] = batch) -> object:
            return sampler.draw_device(batch, 3)

        def torch_from_maps(maps: Tensor = maps, side: int = side) -> object:
            return two_regions(pooled(maps, side))

        def torch_from_coverage(coverage: Tensor = coverage) -> object:
            return two_regions(coverage)

        ways = {"fused": ours, "torch": torch_from_maps, "torch, from coverage": torch_from_coverage}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 5):
            for name, way in ways.items():
                times[name].append(timed_us(way, device))
        middle = {name: round(median(values[5:]), 2) for name, values in times.items()}
        rows.append(
            {
                "patches": side * side,
                "map_px": map_px,
                "microseconds": middle,
                "ratio": {name: round(middle[name] / middle["fused"], 1) for name in ways if name != "fused"},
                "goal_us": GPU_GOAL_US,
            }
        )
    return rows


def timed_us(way: Callable[[], object], device: str) -> float:
    """Microseconds that the device takes, without the host's time to ask for it where that is hidden behind work."""
    if device == "cpu":
        started = time.perf_counter()
        way()
        return (time.perf_counter() - started) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)  # the host runs ahead, so that launches are not what is timed
    begin.record()
    way()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


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
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    even = all(bool((way(BATCH, PATCHES, HIDDEN).sum(1) == HIDDEN).all()) for way in (spark, mae))
    return same and even and all(map(is_right_on, devices))


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
        result["G4"] = "not measured: no GPU"
        if torch.cuda.is_available():
            rows = measure_on("cuda", 50 if options.quick else 400)
            result["G4"] = {"gpu": torch.cuda.get_device_name(), "batch": GPU_BATCH, "rows": rows}
        result["repeats"] = len(times["cpu"])
        result["shape"] = {"batch": BATCH, "patches": PATCHES, "hidden": HIDDEN, "threads": 1}
        result["versions"] = {name: version(name) for name in ("torch", "triton", "numba", "numpy")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


if __name__ == "__main__":
    main()
