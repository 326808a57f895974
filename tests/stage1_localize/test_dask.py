"""`localize` on Dask over a long run and a bad day: schedulers and workers that die or come late, deadly images."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shared.artifact import read_card
from stage1_localize.job import localize
from tests.stage1_localize.planted_corpus import ROOT, recipe, start, write_image, write_images

Dask = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return localize(recipe(), images=images, out=tmp_path_factory.mktemp("whole") / "out").card.artifact_id


@pytest.fixture
def dask(tmp_path: Path) -> Iterator[Dask]:
    """Start ``dask scheduler`` and ``dask worker``; what is left of them at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(what: str, *more: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dask", what, "--host", "127.0.0.1", "--no-dashboard", *more]
        with (tmp_path / "dask.log").open("ab") as log:
            options = {"stdout": log, "stderr": log, "start_new_session": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **options))
        return started[-1]

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def on_scheduler(images: Path, out: Path, scheduler: str, delay_ms: int) -> "subprocess.Popen[str]":
    code = f"""
import sys
from pathlib import Path
from pipelines.cli import _run
from stage1_localize.job import localize
from tests.stage1_localize.planted_corpus import recipe
config = recipe(options={{"delay_ms": {delay_ms}}})
run = lambda: bool(localize(config, images=Path({str(images)!r}), out=Path({str(out)!r}), scheduler={scheduler!r})) - 1
sys.exit(_run(run, False, False))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_workers_come_late_and_a_scheduler_dies(images: Path, expected: str, tmp_path: Path, dask: Dask) -> None:
    out, log = tmp_path / "out", tmp_path / "out/run/run.log"
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    scheduler = dask("scheduler", "--port", "0", "--scheduler-file", str(first))
    until(first.exists)
    process = on_scheduler(images, out, str(first), 250)
    until(lambda: log.exists() and "has no worker: waiting until one joins" in log.read_text())
    worker = dask("worker", "--nthreads", "1", "--scheduler-file", str(first))
    until(lambda: len(list(out.glob("journal/*.state"))) > 0)
    os.killpg(worker.pid, signal.SIGKILL)
    dask("worker", "--nthreads", "1", "--scheduler-file", str(first))
    begun = len(list(out.glob("journal/*.done")))
    until(lambda: len(list(out.glob("journal/*.done"))) > begun)
    scheduler.kill()
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said
    assert "the Dask scheduler does not answer any more; finished images are kept" in said
    assert "Traceback" not in said, said
    dask("scheduler", "--port", "0", "--scheduler-file", str(second))
    until(second.exists)
    dask("worker", "--nthreads", "1", "--scheduler-file", str(second))
    address = json.loads(second.read_text())["address"]
    process = on_scheduler(images, out, address, 0)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 0, said
    assert "continuing: " in said
    assert read_card(out).artifact_id == expected


@pytest.mark.slow
def test_workers_killed_at_random_cost_no_image(images: Path, expected: str, tmp_path: Path) -> None:
    out, dice = tmp_path / "out", random.Random(7)
    process = start(images, out, recipe(workers=2, options={"delay_ms": 250}))
    until(lambda: process.poll() is not None or len(list(out.glob("journal/*.state"))) > 0)
    killed = 0
    while process.poll() is None and killed < 5:
        children = psutil.Process(process.pid).children(recursive=True)
        spawned = [each for each in children if "spawn_main" in " ".join(each.cmdline())]
        if spawned:
            with suppress(psutil.NoSuchProcess):
                dice.choice(spawned).kill()
                killed += 1
        time.sleep(0.3 + dice.random())
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert killed >= 2
    assert read_card(out).artifact_id == expected


@pytest.mark.slow
def test_without_dask_the_same_command_again_finds_the_deadly_image(tmp_path: Path) -> None:
    corpus = write_images(tmp_path / "images", 24)
    write_image(corpus / "013.png", 13, width=93)
    config = recipe(max_failures=1, options={"deadly_width_px": 93})
    ends = []
    for _ in range(2):
        process = start(corpus, tmp_path / "out", config)
        said = process.communicate()[1]
        ends.append(process.returncode)
    assert ends == [-signal.SIGKILL, 0], said
    assert "an earlier run died among images" in said
    assert read_card(tmp_path / "out").identity.outputs["quarantine_reasons"] == {"worker_killed": 1}


@pytest.mark.slow
def test_memory_is_flat_over_thousands_of_images(tmp_path: Path) -> None:
    corpus = write_images(tmp_path / "images", 3000)
    out = tmp_path / "out"
    process = start(corpus, out, recipe(workers=2, grid_px=16, micro_batch=16))
    seen: list[tuple[int, int]] = []
    while process.poll() is None:
        with suppress(psutil.Error):
            main = psutil.Process(process.pid)
            done = len(list(out.glob("journal/*.done")))
            memory = sum(each.memory_info().rss for each in (main, *main.children(recursive=True)))
            if done:
                seen.append((done, memory))
        time.sleep(0.1)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    half = max(done for done, _ in seen) / 2
    early = max(memory for done, memory in seen if done <= half)
    late = max(memory for done, memory in seen if done > half)
    print(f"peak of main and workers in MiB: first half {early >> 20}, second half {late >> 20}, {len(seen)} samples")
    assert late <= early + (64 << 20)
