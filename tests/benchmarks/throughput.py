"""Images a second that the loader makes on one core, and that a training step of each method takes.

``python -m tests.benchmarks.throughput --json [--quick] [--images FOLDER]``. The loader reads an image, cuts and
resizes its window, reads its region maps, pools and draws; a step is forward, backward and optimiser on a batch that is
already there. Without ``--images``, PNG files are made from a seed. Loader: ``decoding`` every image, as without
``image_cache`` where memory does not hold them; ``filling`` a cache; the first epoch of a later run, which looks at the
files again (``first epoch``); its other epochs (``cached``); images and maps in memory (``memory``). CPU time, page
cache warm; the rows ``cold`` are wall time after the files left the page cache. A method takes part once it has a row
in NETS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from shared.artifact import publish
from shared.heap import keep_freed_memory
from shared.images import find_sources, read_image
from shared.loop import rehearse
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
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.methods import METHODS
from stage2_pretrain.run import Run, prepare, resolve
from stage2_pretrain.steps import Step

SIZES_PX = (128, 224)
NETS: dict[str, dict[str, Any]] = {
    "spark": {"backbone": "resnet18", "backbone_options": {"output_stride": 16}},
    "fcmae": {"backbone": "convnextv2_atto", "backbone_options": {"output_stride": 16}},
    "mae": {"backbone": "vit_tiny_patch16_224"},
    "simmim": {"backbone": "vit_tiny_patch16_224"},
}
"""Method -> the settings of stage 2 that it is timed with."""
MAP_PX, BATCH, STEP_BATCH, SLICE_PX = 224, 32, 8, 256


def write_images(folder: Path, count: int) -> Path:
    """Grey PNG files that look and compress about as slices of a head do: dark around, soft and grainy within."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SLICE_PX, :SLICE_PX].astype(np.float32) / SLICE_PX - 0.5
    for number in range(count):
        radius = rng.uniform(0.33, 0.45, 2)
        inside = 1 / (1 + np.exp(60 * (np.hypot(y / radius[0], x / radius[1]) - 1)))
        folds = np.sin(x * rng.uniform(20, 60)) * np.cos(y * rng.uniform(20, 60) + rng.uniform(0, 6))
        grey = inside * (110 + 50 * folds + rng.normal(0, 6, x.shape)) + rng.normal(2, 1, x.shape).clip(0)
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.png")
    return folder


def write_store(images: Path, folder: Path, count: int) -> RegionStore:
    """A published store of the first images: a region is what is bright, from dim to bright a probability."""
    sources = find_sources(images)[:count]
    names = [source.sample_id for source in sources]
    create_store(folder, sample_ids=names, regions=["bright"], grid=(MAP_PX, MAP_PX))
    nowhere = np.zeros((0, 4), np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint16)
    for shard in pending_shards(folder):
        with ShardJournal(folder, shard) as journal:
            for row in journal.missing:
                image = read_image(sources[row])
                small = Image.fromarray((image.pixels[0] * 255).astype(np.uint8)).reduce(8).resize((MAP_PX, MAP_PX))
                maps = (np.asarray(small, np.float32) * 2 - 160).clip(0, 254).astype(np.uint8)[None]
                known = image.source_sha256, image.pixel_sha256, image.pixels.shape
                journal.append_maps(row, Sample(names[row], *known, None, None, None), maps, *nowhere)
            assemble_shard(journal)
    outputs = finalise(folder)
    drop_journal(folder)
    publish(folder, kind="region-store", inputs=[], spec={"benchmark": count}, outputs=outputs)
    return open_region_store(folder)


def build(store: RegionStore, images: Path, size_px: int, method: str, **changes: Any) -> Run:
    """The parts of a run, fitted to each other."""
    settings = {"method": method, **NETS[method], "size_px": size_px, "batch_size": BATCH, "epochs": 8}
    fixed = {"threads": 1, "device": "cpu", "warmup_epochs": 0}
    config = resolve(PretrainConfig.model_validate({**settings, **fixed, **changes}))
    return prepare(config, open_region_store(store.path), images, store.path.parent / "out")


def epoch_of(run: Run, epoch: int) -> Iterator[Step]:
    """Batches of an epoch, each image once, at random."""
    order = np.random.default_rng(epoch).permutation(len(run.dataset))
    for first in range(0, len(order), BATCH):
        yield run.steps.make((epoch, order[first : first + BATCH].tolist()))


def rate(run: Run, epoch: int, clock: Callable[[], float]) -> float:
    """Images a second of an epoch of the loader alone."""
    started = clock()
    for _ in epoch_of(run, epoch):
        pass
    return len(run.dataset) / (clock() - started)


def leave_memory(*folders: Path) -> None:
    """Take the files of some folders out of the page cache, where the system can be asked to."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_right(store: RegionStore, images: Path, cache: Path) -> bool:
    """With and without a cache, filling it and filled, an epoch has the same bits."""
    ways: list[dict[str, Any]] = [{"image_cache": "off"}, *[{"image_cache": str(cache), "cache_mib": 0}] * 2]
    runs = [build(store, images, SIZES_PX[0], next(iter(NETS)), **way) for way in ways]
    for first, *others in zip(*(epoch_of(run, 1) for run in runs), strict=True):
        for other in others:
            same = torch.equal(first.image, other.image) and np.array_equal(first.drawn.hidden, other.drawn.hidden)
            if not same or first.sample_ids != other.sample_ids:
                return False
    return True


def loader(store: RegionStore, images: Path, size_px: int, folder: Path, repeats: int) -> dict[str, float]:
    """Median images a second of each way to load."""
    found: dict[str, list[float]] = {}

    def note(name: str, run: Run, epoch: int, clock: Callable[[], float] = time.process_time) -> None:
        found.setdefault(name, []).append(rate(run, epoch, clock))

    for number in range(repeats):
        cache = folder / f"cache-{size_px}-{number}"
        make = partial(build, store, images, size_px, next(iter(NETS)))
        decoding = make(cache_mib=0)
        note("decoding", decoding, 0)
        note("filling", make(cache_mib=0, image_cache=str(cache)), 0)
        later = make(cache_mib=0, image_cache=str(cache))
        note("first epoch", later, 0)
        note("cached", later, 1)
        kept = make(cache_mib=1 << 20)
        rate(kept, 0, time.process_time)
        note("memory", kept, 1)
        if hasattr(os, "posix_fadvise"):
            for name, run in (("decoding, cold", decoding), ("cached, cold", later)):
                leave_memory(images, store.path, cache)
                note(name, run, 2, time.perf_counter)
    return {name: round(median(values), 1) for name, values in found.items()}


def step(store: RegionStore, images: Path, size_px: int, method: str, count: int) -> float:
    """Images a second, by CPU time, of forward, backward and optimiser."""
    run = build(store, images, size_px, method)
    made = run.steps.make((0, range(STEP_BATCH)))
    marks: list[float] = []

    def timed(batch: Step, index: int) -> Iterator[dict[str, torch.Tensor]]:
        marks.append(time.process_time())
        return run.step(batch)[0]

    rehearse(run.ready(), repeat((made, made.sample_ids)), timed, replace(run.plan(), warmup_steps=0), count + 2)
    return round(len(made.sample_ids) / median(np.diff(marks)[1:].tolist()), 1)


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure, print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.throughput", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats")
    parser.add_argument("--images", type=Path, help="a folder of images instead of made ones; the first 1024 are read")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    keep_freed_memory()
    count, repeats = (96, 1) if options.quick else (1024, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = options.images or write_images(folder / "images", count)
        store = write_store(images, folder / "store", count)
        result: dict[str, Any] = {"benchmark": "throughput"}
        result["gate"] = "green" if is_right(store, images, folder / "cache") else "red"
        if result["gate"] == "green":
            result["loader_images_per_s"] = {
                size_px: loader(store, images, size_px, folder, repeats) for size_px in SIZES_PX
            }
            result["step_images_per_s"] = {
                f"{method} {NETS[method]['backbone']}": {
                    size_px: step(store, images, size_px, method, 1 if options.quick else 5) for size_px in SIZES_PX
                }
                for method in NETS
                if method in METHODS
            }
            result["methods_without_a_row"] = [method for method in METHODS if method not in NETS]
            result["repeats"] = repeats
            result["shape"] = {
                "images": len(store),
                "batch": BATCH,
                "step_batch": STEP_BATCH,
                "map_px": MAP_PX,
                "threads": 1,
            }
            result["versions"] = {name: version(name) for name in ("torch", "timm", "pillow", "numpy")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


if __name__ == "__main__":
    main()
