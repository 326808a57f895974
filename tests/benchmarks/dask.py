"""G8: what Dask takes of a run's wall time: the same shards in this process, and on a local cluster of one worker.

``python -m tests.benchmarks.dask --json [--quick]``. The planted grounder sleeps, so that a shard takes as long as one
of 1024 images would with a model of a millisecond (1.7 s), which is the worst case: real models take a hundred times
as long. Dask's share is the time that its worker does not spend inside of a shard, from the start of the first one to
the moment that the main process holds the last one's result; it is measured by the worker's clock and depends little
on what else the machine does. Starting the cluster is told apart: once a run. The gate: both ways give one artifact id.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from stage1_localize import cluster
from stage1_localize.job import localize
from tests.stage1_localize.planted_corpus import recipe, write_images

SHARDS = 8
GOAL = 0.005
SHARDS_A_MILLION = 977


def stamped(task: Any) -> dict[str, Any]:
    """A worker's whole task, with the times at which it began and ended."""
    from stage1_localize.cluster import run_on_worker

    began = time.time()
    return {**run_on_worker(task), "began": began, "ended": time.time()}


@contextmanager
def stamps() -> Iterator[list[dict[str, float]]]:
    """What tasks tell, the time at which each result was there, and the time at which the cluster was asked for."""
    told: list[dict[str, float]] = []
    plain_task, plain_run = cluster.run_on_worker, cluster.run_on_dask

    def run(*args: Any, **named: Any) -> Iterator[dict[str, Any]]:
        asked = time.time()
        for result in plain_run(*args, **named):
            told.append({"asked": asked, "began": result["began"], "ended": result["ended"], "there": time.time()})
            yield result

    # In a worker, where nothing is patched, `stamped` finds the plain one.
    cluster.run_on_worker, cluster.run_on_dask = stamped, run
    try:
        yield told
    finally:
        cluster.run_on_worker, cluster.run_on_dask = plain_task, plain_run


def measure(images: Path, folder: Path, delay_ms: int) -> dict[str, Any]:
    """One run each way."""
    options = {"delay_ms": delay_ms}
    started = time.time()
    inside = localize(recipe(workers=0, options=options, grid_px=64), images=images, out=folder / "inside")
    inside_s = time.time() - started
    with stamps() as told:
        started = time.time()
        dask = localize(recipe(workers=1, options=options, grid_px=64), images=images, out=folder / "dask")
        dask_s = time.time() - started
    first, last = min(each["began"] for each in told), max(each["there"] for each in told)
    busy = sum(each["ended"] - each["began"] for each in told)
    return {
        "right": inside.card.artifact_id == dask.card.artifact_id and len(told) == SHARDS,
        "share": 1 - busy / (last - first),
        "ms_a_shard": (last - first - busy) / SHARDS * 1e3,
        "s_a_shard": busy / SHARDS,
        "start_s": first - told[0]["asked"],
        "inside_s": inside_s,
        "dask_s": dask_s,
    }


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure, print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.dask", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="one repeat")
    options = parser.parse_args(given)
    rows, delay_ms, repeats = 32, 50, 1 if options.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", rows * SHARDS)
        runs = [measure(images, Path(folder) / str(repeat), delay_ms) for repeat in range(repeats)]
    right = all(run.pop("right") for run in runs)
    result: dict[str, Any] = {"benchmark": "dask", "gate": "green" if right else "red"}
    if right:
        middle = {name: median(run[name] for run in runs) for name in runs[0]}
        result["G8"] = {"share": round(middle["share"], 5), "goal": f"under {GOAL}"}
        result["ms_a_shard"] = round(middle["ms_a_shard"], 2)
        result["s_a_million_images"] = round(middle["ms_a_shard"] / 1e3 * SHARDS_A_MILLION, 2)
        result["seconds"] = {name: round(middle[name], 2) for name in ("s_a_shard", "start_s", "inside_s", "dask_s")}
        result["repeats"] = repeats
        result["shape"] = {"shards": SHARDS, "rows": rows, "delay_ms": delay_ms, "workers": 1}
        result["versions"] = {name: version(name) for name in ("dask", "distributed")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


if __name__ == "__main__":
    main()
