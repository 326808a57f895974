"""G1 and G2: CPU microseconds a row of shuffled region maps: read alone, and read, pooled and drawn.

``python -m tests.benchmarks.store --json [--quick]``. A region store is written by this project's own writer: smooth
regions with wavy borders, from a seed, which compress about as real maps do. Batches of 256 rows, no row twice, page
cache warm, all ways interleaved; what counts is the CPU time of all threads, which is what a row costs a core. Peers: a
memory map of the raw maps; zarr's ``oindex`` at the fastest of its settings; tensorstore, where it is installed. Ours
verifies every checksum; ``first`` also digests every row, as the first reading of a row by a process does, ``again``
compares its crc32c with the one found then.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from shared.artifact import publish
from shared.heap import keep_freed_memory
from shared.region_writer import (
    Sample,
    ShardJournal,
    assemble_shard,
    create_store,
    drop_journal,
    finalise,
    pending_shards,
)
from shared.regions import RegionStore, open_region_store
from shared.rng import sample_keys
from stage2_pretrain.masking.plan import build_policy
from stage2_pretrain.masking.sampler import MaskSampler
from stage2_pretrain.window import WindowOptions, draw_windows

BATCH, SIZE_PX, GRID = 256, 224, (14, 14)
INSIDE, OUTSIDE = 700, 300
GOALS = {"G1": 2.5, "G2": 100.0}
PEERS = ("numpy", "numcodecs", "torch", "zarr", "tensorstore")
WHOLE = WindowOptions(crop_scale=(1000, 1000), flip=False, turns=False)
Read = Callable[[list[int]], np.ndarray[Any, Any]]
ZARR_EVERY = 10
"""It takes part in one repeat of so many: its batches take half a second."""
MADE = 512
"""Different maps; others are these, mirrored and turned."""


def region_map(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """uint8 [224, 224], 0..254: one to three regions with smooth borders, as probabilities."""
    y, x = np.mgrid[:SIZE_PX, :SIZE_PX].astype(np.float32) / SIZE_PX
    none = np.ones_like(x)
    for _ in range(rng.integers(1, 4)):
        centre, radius, turn = rng.uniform(0.2, 0.8, 2), rng.uniform(0.06, 0.3, 2), rng.uniform(0, np.pi)
        along = (y - centre[0]) * np.cos(turn) + (x - centre[1]) * np.sin(turn)
        across = (x - centre[1]) * np.cos(turn) - (y - centre[0]) * np.sin(turn)
        angle = np.arctan2(across, along)
        waves = sum(rng.uniform(-0.12, 0.12) * np.sin(k * angle + rng.uniform(0, 6)) for k in (2, 3, 5))
        logit = (1 + waves - np.hypot(along / radius[0], across / radius[1])) * rng.uniform(6, 14)
        none *= 1 - rng.uniform(0.3, 0.95) / (1 + np.exp(-logit))
    return np.floor(254 * (1 - none) + 0.5).astype(np.uint8)


def all_maps(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """uint8 [1, 224, 224] of every row."""
    rng = np.random.default_rng(0)
    made = [region_map(rng) for _ in range(min(count, MADE))]
    for row in range(count):
        turned = np.rot90(made[row % MADE], row // MADE % 4)
        yield np.ascontiguousarray(turned[:, ::-1] if row // (4 * MADE) % 2 else turned)[None]


def write(folder: Path, count: int) -> tuple[Path, Path]:
    """A published store, and the raw maps in one file."""
    store, raw = folder / "store", folder / "maps.raw"
    names = [f"{row:06}" for row in range(count)]
    maps = all_maps(count)
    create_store(store, sample_ids=names, regions=["region"], grid=(SIZE_PX, SIZE_PX))
    nowhere = np.zeros((0, 4), np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint16)
    with raw.open("wb") as file:
        for shard in pending_shards(store):
            with ShardJournal(store, shard) as journal:
                for row in journal.missing:
                    sample = Sample(names[row], "0" * 64, "1" * 64, (1, SIZE_PX, SIZE_PX), None, None, None)
                    row_maps = next(maps)
                    journal.append_maps(row, sample, row_maps, *nowhere)
                    file.write(row_maps.tobytes())
                assemble_shard(journal)
    outputs = finalise(store)
    drop_journal(store)
    publish(store, kind="region-store", inputs=[], spec={"benchmark": count}, outputs=outputs)
    return store, raw


def peers(store: Path, raw: Path, count: int) -> dict[str, Read]:
    """Ways to read rows of other people's making, by name."""
    mapped = np.memmap(raw, np.uint8, "r", shape=(count, 1, SIZE_PX, SIZE_PX))
    ways: dict[str, Read] = {"memmap": lambda rows: np.asarray(mapped[rows]), "zarr": fastest_zarr(store, count)}
    try:
        import tensorstore
    except ImportError:
        return ways
    place = {"driver": "file", "path": str(store / "regions.zarr" / "maps")}
    limits = {"cache_pool": {"total_bytes_limit": 64 << 20}, "data_copy_concurrency": {"limit": 1}}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": place, "context": limits}, open=True, read=True).result()
    ways["tensorstore"] = lambda rows: np.asarray(opened.oindex[rows].read().result())
    return ways


def fastest_zarr(store: Path, count: int) -> Read:
    """Zarr's ``oindex`` at the fastest of its settings."""
    import zarr

    array = zarr.open_array(store / "regions.zarr" / "maps", mode="r")
    settings = [
        {"async.concurrency": concurrency, "threading.max_workers": 1, "codec_pipeline.batch_size": size}
        for concurrency in (1, 10, 64)
        for size in (1, 256)
    ]
    rows = np.random.default_rng(1).permutation(count)[:64].tolist()
    times = []
    for setting in settings:
        with zarr.config.set(setting):
            array.oindex[rows]
            started = time.process_time()
            array.oindex[rows]
            times.append(time.process_time() - started)
    zarr.config.set(settings[int(np.argmin(times))])
    return lambda rows: np.asarray(array.oindex[rows])


def published_draw(maps: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """Coverage [B, L], and hidden: in each of two regions, the patches of the smallest noise; batched, in torch."""
    coverage = adaptive_avg_pool2d(torch.from_numpy(maps).float(), GRID).flatten(1)
    inside = coverage >= 127
    noise = torch.rand(coverage.shape)
    hidden = torch.zeros_like(inside)
    for region, milli in ((inside, INSIDE), (~inside, OUTSIDE)):
        count = (region.sum(1, keepdim=True) * milli + 500) // 1000
        rank = noise.masked_fill(~region, 2.0).argsort(1).argsort(1)
        hidden |= rank < count
    return coverage, hidden


def drawing(store: RegionStore) -> Callable[[np.ndarray[Any, Any], list[int]], Any]:
    """Our coverage and masks of a batch."""
    policy = build_policy("region", {"budget": "per-sample", "hide_inside": INSIDE, "hide_outside": OUTSIDE})
    sampler = MaskSampler(policy, grid=GRID, seed=0, regions=store.regions, impl="cpu")
    keys = sample_keys(store.sample_ids)
    sizes = np.full((BATCH, 2), SIZE_PX, np.int64)
    windows = draw_windows(sizes, keys[:BATCH], seed=0, epoch=0, options=WHOLE)
    return lambda maps, rows: sampler.draw_arrays(maps, windows, keys[rows], 0)


def is_right(store: RegionStore, ways: dict[str, Read], rows: list[int]) -> bool:
    """All ways read the same bytes; both draws agree on coverage and on how many patches each region hides."""
    wanted = store.maps(rows)
    same = all(np.array_equal(way(rows), wanted) for way in ways.values())
    coverage, hidden = published_draw(wanted)
    ours = drawing(store)(wanted, rows)
    inside = ours.coverage >= 127
    near = bool((np.abs(ours.coverage - coverage.numpy()) <= 0.5).all())
    clear = (np.abs(coverage.numpy() - 127) > 0.5).all(axis=1)  # half a step from the border both count alike
    counted = [np.stack([(h & i).sum(1) for i in (inside, ~inside)]) for h in (hidden.numpy(), ours.hidden)]
    return same and near and bool((counted[0] == counted[1])[:, clear].all())


def measure(path: Path, ways: dict[str, Read], count: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds a row, interleaved, each repeat with rows of its own, after one round of warming up."""
    again = open_region_store(path)
    for first in range(0, count, BATCH):
        again.maps(range(first, min(first + BATCH, count)))
    draw = drawing(again)
    rng = np.random.default_rng(2)
    times: dict[str, list[float]] = {}

    def timed(name: str, way: Callable[[list[int]], object], rows: list[int]) -> None:
        started = time.process_time()
        way(rows)
        times.setdefault(name, []).append((time.process_time() - started) / BATCH * 1e6)

    for repeat in range(repeats + 1):
        rows = rng.permutation(count)[:BATCH].tolist()
        first_time = open_region_store(path)
        first_time.maps([])
        for name, way in ways.items():
            if name != "zarr" or repeat % ZARR_EVERY <= 1:
                timed(name, way, rows)
        timed("ours, again", again.maps, rows)
        timed("ours, first", first_time.maps, rows)
        timed("ours, again and drawn", lambda chosen: draw(again.maps(chosen), chosen), rows)
        if repeat % ZARR_EVERY <= 1:
            timed("zarr, drawn by torch", lambda chosen: published_draw(ways["zarr"](chosen)), rows)
    return {name: values[1:] for name, values in times.items()}


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure, print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.store", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    count, repeats = (1024, 10) if options.quick else (6144, 60)
    with tempfile.TemporaryDirectory() as folder:
        path, raw = write(Path(folder), count)
        store, ways = open_region_store(path), peers(path, raw, count)
        right = is_right(store, ways, np.random.default_rng(3).permutation(count)[:BATCH].tolist())
        result: dict[str, Any] = {"benchmark": "store", "gate": "green" if right else "red"}
        if right:
            stored = sum(file.stat().st_size for file in (path / "regions.zarr" / "maps").iterdir())
            times = measure(path, ways, count, repeats)
            middle = {name: median(values) for name, values in times.items()}
            result["microseconds"] = {name: round(value, 2) for name, value in middle.items()}
            result["G1"] = {
                "goal": f"at most {GOALS['G1']} of memmap",
                "of memmap": ratio(times, "ours, again", "memmap"),
                "of memmap, rows digested too": ratio(times, "ours, first", "memmap"),
                **{
                    f"{name} of ours": round(middle[name] / middle["ours, again"], 1)
                    for name in ways
                    if name != "memmap"
                },
            }
            drawn = middle["zarr, drawn by torch"] / middle["ours, again and drawn"]
            result["G2"] = {"ratio": round(drawn, 1), "goal": GOALS["G2"]}
            result["repeats"] = repeats
            result["shape"] = {
                "rows": count,
                "batch": BATCH,
                "map_px": SIZE_PX,
                "bytes_a_row": stored // count,
            }
            result["versions"] = {name: found for name in PEERS if (found := version_of(name))}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the repeats of one's time as a multiple of the other's."""
    return round(median(a / b for a, b in zip(times[one], times[other], strict=True)), 2)


def version_of(name: str) -> str | None:
    """Of a distribution, where it is installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
