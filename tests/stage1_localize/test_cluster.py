"""`localize` on Dask: the same store, workers that die, and nobody left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from shared.errors import InputMissingError, UsageError
from shared.regions import verify_store
from stage1_localize import cluster
from stage1_localize.job import localize
from tests.stage1_localize.planted_corpus import ROOT, disc_map, recipe, start, write_image, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return localize(recipe(), images=images, out=tmp_path_factory.mktemp("whole") / "out").card.artifact_id


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_image(images: Path, tmp_path: Path) -> None:
    corpus = write_images(tmp_path / "images", 24)
    write_image(corpus / "013.png", 13, width=93)
    config = recipe(workers=2, max_failures=1, options={"deadly_width_px": 93})
    store = localize(config, images=corpus, out=tmp_path / "out")
    assert store.card.identity.outputs["quarantine_reasons"] == {"worker_killed": 1}
    assert store.samples[13].status == "quarantined"
    for row in (0, 12, 14, 23):
        np.testing.assert_array_equal(store.maps([row])[0, 0], disc_map(row))
    assert not verify_store(store.path, store.card)


@pytest.mark.slow
def test_main_killed_takes_its_workers_along_and_is_continued(images: Path, expected: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(images, out, recipe(workers=2, options={"delay_ms": 150}))
    wait_for(lambda: len(list(out.glob("journal/*.state"))) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    continued = localize(recipe(), images=images, out=out)
    assert continued.card.artifact_id == expected
    assert gone(children)


@pytest.mark.slow
def test_interrupt_of_the_whole_group_stops_cleanly(images: Path, expected: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(images, out, recipe(workers=2, options={"delay_ms": 150}))
    wait_for(lambda: len(list(out.glob("journal/*.state"))) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert "SIGINT after" in said
    assert "Traceback" not in said
    assert gone(children)
    continued = localize(recipe(), images=images, out=out)
    assert continued.card.artifact_id == expected


@pytest.mark.slow
def test_a_scheduler_that_is_there_is_used(images: Path, expected: str, tmp_path: Path) -> None:
    import distributed

    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        dashboard_address="127.0.0.1:0",
        protocol="tcp",
        host="127.0.0.1",
    ) as cluster:
        store = localize(recipe(), images=images, out=tmp_path / "out", scheduler=cluster.scheduler_address)
        assert store.card.artifact_id == expected
        assert len(cluster.workers) == 1


OVER = threading.Event()


def until_over(task: Any) -> dict[str, Any]:
    """A shard that takes as long as the test that submits it."""
    OVER.wait(60)
    return {"shard": task.shard, "status": "done"}


def test_workers_of_several_threads_are_refused_also_when_they_join_late(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    OVER.clear()
    monkeypatch.setattr(cluster, "run_on_worker", until_over)
    asked: list[int] = []

    def join(running: list[int]) -> bool:
        if not asked:
            late.scale(2)
        asked.append(0)
        return True

    options = {"processes": False, "dashboard_address": "127.0.0.1:0", "protocol": "tcp", "host": "127.0.0.1"}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as late:
        late.new_spec["options"]["nthreads"] = 2
        task: Any = SimpleNamespace(shard=0)
        with pytest.raises(UsageError, match="has 2 threads, expected 1") as caught:
            list(cluster.run_on_dask([task], count=1, workers=1, scheduler=late.scheduler_address, poll=join))
        OVER.set()
    assert asked
    assert "--nthreads 1" in str(caught.value.hint)


def test_no_worker_keeps_a_profile_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of stacks, of which a worker would grow: neither one that was there nor one that joins late."""
    import distributed

    def join(running: list[int]) -> bool:
        if len(late.workers) < 2:
            late.scale(2)
            late.wait_for_workers(2)
        callbacks.extend(set(worker.periodic_callbacks) for worker in late.workers.values())
        OVER.set()
        return True

    OVER.clear()
    monkeypatch.setattr(cluster, "run_on_worker", until_over)
    callbacks: list[set[str]] = []
    options = {"processes": False, "dashboard_address": "127.0.0.1:0", "protocol": "tcp", "host": "127.0.0.1"}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as late:
        assert {"profile", "profile-cycle"} <= set(late.workers[0].periodic_callbacks)
        task: Any = SimpleNamespace(shard=0)
        list(cluster.run_on_dask([task], count=1, workers=1, scheduler=late.scheduler_address, poll=join))
    assert len(callbacks) >= 2
    assert all("heartbeat" in names and not names & {"profile", "profile-cycle"} for names in callbacks)


def test_a_scheduler_that_is_not_there_is_named(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 1)
    with pytest.raises(InputMissingError, match=r"scheduler tcp://127\.0\.0\.1:9: cannot be reached"):
        localize(recipe(), images=images, out=tmp_path / "out", scheduler="tcp://127.0.0.1:9")


def test_the_job_without_dask_imports_none(images: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from stage1_localize.job import localize\n"
        "from tests.stage1_localize.planted_corpus import recipe\n"
        f"localize(recipe(), images=pathlib.Path({str(images)!r}), out=pathlib.Path({str(tmp_path / 'out')!r}))\n"
        "assert not [name for name in ('dask', 'distributed', 'torch') if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def shard_on_gpu(task: Any) -> dict[str, Any]:
    return {"shard": task.shard, "status": "done", "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "process": os.getpid()}


@pytest.mark.slow
def test_each_local_worker_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "run_on_worker", shard_on_gpu)
    monkeypatch.setattr(cluster, "visible_gpus", lambda: ["2", "5"])
    tasks: Any = [SimpleNamespace(shard=number) for number in range(30)]
    results = list(
        cluster.run_on_dask(tasks, count=30, workers="auto", scheduler=None, on_gpus=True, poll=lambda running: True)
    )
    assert {result["gpu"] for result in results} == {"2", "5"}
    assert len({(result["gpu"], result["process"]) for result in results}) == 2
    assert sorted(result["shard"] for result in results) == list(range(30))


def test_the_gpus_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster.visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-8f3a")
    assert cluster.visible_gpus() == ["1", "GPU-8f3a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cluster.visible_gpus() == []


def slow_shard(task: Any) -> dict[str, Any]:
    time.sleep(0.05)
    return {"shard": task.shard, "status": "done"}


def test_the_window_follows_workers_that_join_and_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    monkeypatch.setattr(cluster, "run_on_worker", slow_shard)
    monkeypatch.setattr(cluster, "_POLL_S", 0.02)
    widths: list[int] = []
    options = {"processes": False, "dashboard_address": "127.0.0.1:0", "protocol": "tcp", "host": "127.0.0.1"}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as elastic:
        phases = iter((3, 1))
        since: list[int] = []

        def watch(running: list[int]) -> bool:
            widths.append(len(running))
            since.append(0)
            if len(since) >= 15 and (count := next(phases, None)) is not None:
                elastic.scale(count)
                since.clear()
            return True

        tasks: Any = [SimpleNamespace(shard=number) for number in range(90)]
        results = list(cluster.run_on_dask(tasks, count=90, workers=1, scheduler=elastic.scheduler_address, poll=watch))
    assert sorted(result["shard"] for result in results) == list(range(90))
    assert max(widths[:15]) <= 2
    assert 4 < max(widths) <= 6
    assert max(widths[-8:]) <= 2
