"""A simulated corpus of a million images: what each costs beside its model, and whether memory stays flat.

``python -m tests.benchmarks.million --images 50000 --json [--quick]``. Tiny pictures, hard links to a few files, are
localised by the planted grounder (about 1 ms of arithmetic an image) onto maps of 64 px by one Dask worker. Told are,
for each step of the run, seconds and CPU microseconds an image of the main process and its memory; the worker's memory
in each quarter of the run; bytes on disk an image. ``per_million`` scales what grows with the images. The gate: every
map read back is the planted one, and a second call finds the run done with the same id.

``--canned``: without a worker, and with one decoded picture and one answer for all images: what is left is what this
project adds to decoder and model, which a real million costs too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from shared.config import load
from shared.images import find_sources, read_image
from stage1_localize import job, shard
from stage1_localize.config import LocalizeConfig
from stage1_localize.parts import build_parts

STEPS = (
    "find_sources",
    "list_corpus",
    "inputs_of",
    "write_corpus",
    "create_store",
    "finalise",
    "drop_journal",
    "write_report",
    "publish",
    "open_region_store",
)
KINDS, SIDE_PX, GRID_PX = 64, 24, 64
A_FOLDER = 1000
"""Files."""


def write_images(root: Path, count: int) -> Path:
    """Squares on black at places that depend on the number, hard links beyond the first ones."""
    kinds = root / "kinds"
    kinds.mkdir()
    for kind in range(KINDS):
        pixels = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
        top, left = kind // 8 * 2, kind % 8 * 2
        pixels[top : top + 6, left : left + 6] = 250
        Image.fromarray(pixels).save(kinds / f"{kind}.png")
    images = root / "images"
    for number in range(count):
        folder = images / f"{number // A_FOLDER:06}"
        if number % A_FOLDER == 0:
            folder.mkdir(parents=True)
        os.link(kinds / f"{number % KINDS}.png", folder / f"{number % A_FOLDER:03}.png")
    return images


class Watch:
    """Steps of a run as they come, and the memory of this process and of its workers, ten times a second."""

    def __init__(self, out: Path, shards: int) -> None:
        self.out, self.shards = out, shards
        self.main = psutil.Process()
        self.before = self.main.memory_info().rss
        self.peak = self.before
        self.steps: dict[str, dict[str, float]] = {}
        self.worker: list[tuple[float, int]] = []
        self.worker_cpu_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._plain = {name: getattr(job, name) for name in STEPS}
        for name, plain in self._plain.items():
            setattr(job, name, self._timed(name, plain))
        self._compute = job._Run.compute
        job._Run.compute = self._timed("compute", self._compute)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for name, plain in self._plain.items():
            setattr(job, name, plain)
        job._Run.compute = self._compute
        self._over.set()
        self._thread.join()

    def _timed(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def timed(*args: Any, **named: Any) -> Any:
            started, cpu = time.perf_counter(), time.process_time()
            try:
                return plain(*args, **named)
            finally:
                self.steps[name] = {
                    "s": time.perf_counter() - started,
                    "cpu_s": time.process_time() - cpu,
                    "rss": self.main.memory_info().rss,
                }

        return timed

    def _sample(self) -> None:
        workers: list[psutil.Process] = []
        while not self._over.wait(0.5):
            self.peak = max(self.peak, self.main.memory_info().rss)
            with suppress(psutil.Error):
                if not workers:
                    workers = [
                        child
                        for child in self.main.children(recursive=True)
                        if "spawn_main" in " ".join(child.cmdline())
                    ]
                for worker in workers:
                    done = sum(1 for _ in (self.out / "journal").glob("*.done"))
                    self.worker.append((done / self.shards, worker.memory_info().rss))
                    times = worker.cpu_times()
                    self.worker_cpu_s = times.user + times.system

    def worker_mib(self) -> list[int]:
        """Peak of the worker in each quarter of the shards."""
        quarters = [[rss for done, rss in self.worker if part / 4 <= done < (part + 1) / 4] for part in range(4)]
        return [max(quarter) >> 20 if quarter else 0 for quarter in quarters]


@contextmanager
def temporary(folder: str | None) -> Iterator[Path]:
    """A folder for images and store."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield Path(made)


def settings(workers: int) -> LocalizeConfig:
    """The planted model."""
    return load(
        LocalizeConfig,
        {
            "regions": {"spot": "disc"},
            "grounder": "planted",
            "segmenter": "none",
            "grid_px": GRID_PX,
            "micro_batch": 32,
            "workers": workers,
        },
    )


@contextmanager
def canned(images: Path) -> Iterator[None]:
    """Every image is read and answered as the first one."""
    config = settings(0)
    parts = build_parts(config.grounder, config.segmenter, config.asked())
    (source, *_) = find_sources(images)
    picture = read_image(source)
    given = shard.answer({0: picture}, {0: ""}, [0], parts, config.asked(), GRID_PX)[0]
    plain = shard.read, shard.answer
    shard.read = lambda source, digest: picture
    shard.answer = lambda images, *_: dict.fromkeys(images, given)
    try:
        yield
    finally:
        shard.read, shard.answer = plain


def is_right(store: Any) -> bool:
    """Rows drawn at random hold the map of their picture's kind: images of a kind have one map, others another."""
    rows = np.random.default_rng(0).permutation(len(store))[: 4 * KINDS].tolist()
    kinds = [
        (int(folder) * A_FOLDER + int(name.removesuffix(".png"))) % KINDS
        for folder, name in (store.samples[row].sample_id.split("/") for row in rows)
    ]
    maps = store.maps(rows)
    first: dict[int, bytes] = {}
    same = all(first.setdefault(kind, each.tobytes()) == each.tobytes() for kind, each in zip(kinds, maps, strict=True))
    areas = (maps == 254).sum(axis=(1, 2, 3))
    planted = (6 / SIDE_PX * GRID_PX) ** 2
    return same and len(set(first.values())) == len(first) and bool((abs(areas - planted) < 0.2 * planted).all())


def measure(root: Path, count: int, is_canned: bool) -> dict[str, Any]:
    """Run, check, and say what it took."""
    images = write_images(root, count)
    out = root / "out"
    shards = -(-count // min(1024, max(1, count // 8)))
    config = settings(0 if is_canned else 1)
    with canned(images) if is_canned else nullcontext(), Watch(out, shards) as watch:
        started = time.perf_counter()
        store = job.localize(config, images=images, out=out)
        total_s = time.perf_counter() - started
    again = job.localize(config, images=images, out=out)
    right = (is_canned or is_right(store)) and again.card.artifact_id == store.card.artifact_id
    result: dict[str, Any] = {"gate": "green" if right else "red", "images": count, "shards": shards}
    result["canned"] = is_canned
    if not right:
        return result
    steps = {
        name: {
            "us_an_image": round(took["s"] / count * 1e6, 1),
            "cpu_us_an_image": round(took["cpu_s"] / count * 1e6, 1),
            "main_mib_after": int(took["rss"]) >> 20,
        }
        for name, took in watch.steps.items()
    }
    grown = max(watch.peak - watch.before, 0)
    sizes = {name: (out / name).stat().st_size for name in ("samples.jsonl", "corpus/samples.jsonl", "report.html")}
    for name in ("maps", "maps_quarter", "boxes", "scores", "box_regions", "box_offsets"):
        sizes[name] = sum(file.stat().st_size for file in (out / "regions.zarr" / name).iterdir())
    apart = sum(took["cpu_s"] for name, took in watch.steps.items() if name != "compute")
    return {
        **result,
        "seconds": round(total_s, 1),
        "steps": steps,
        "main_mib": {"before": watch.before >> 20, "peak": watch.peak >> 20},
        "main_bytes_an_image": grown // count,
        "worker_mib_by_quarter": watch.worker_mib(),
        "disk_bytes_an_image": {name: round(size / count, 1) for name, size in sizes.items()},
        "worker_cpu_us_an_image": round(watch.worker_cpu_s / count * 1e6, 1),
        "per_million": {
            "cpu_s_apart_from_computing": round(apart / count * 1e6),
            "s_computing": round(watch.steps["compute"]["s"] / count * 1e6),
        },
    }


def main(given: Sequence[str] | None = None) -> None:
    """Simulate and print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.million", description=__doc__)
    parser.add_argument("--images", type=int, default=50_000, help="how many are simulated")
    parser.add_argument("--canned", action="store_true", help="one answer for all: our own share only")
    parser.add_argument("--folder", help="where to work; default: the system's temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="two thousand images")
    options = parser.parse_args(given)
    with temporary(options.folder) as root:
        result = {"benchmark": "million", **measure(root, 2000 if options.quick else options.images, options.canned)}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


if __name__ == "__main__":
    main()
