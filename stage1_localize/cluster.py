"""Shards on Dask: a bounded window of whole-shard tasks, on a local cluster or a scheduler that is there.

Dask runs a task at least once, so tasks are idempotent and the journal is the truth; futures are released as
they complete.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from shared.errors import InputMissingError, InterruptedRun, UsageError
from stage1_localize.shard import ShardTask, Standstill, excuse, run_shard, stop_asked

CONNECT_S = 30
"""How long to wait for a scheduler to answer, in seconds."""

_POLL_S = 0.5
_PROFILING = ("profile", "profile-cycle")
"""Callbacks of a Dask worker."""

_WINDOW = 2
_AT_WORK: dict[str, ShardTask] = {}
"""In a worker's process: its address -> its shard."""


def run_on_dask(
    tasks: Iterable[ShardTask],
    *,
    count: int,
    workers: int | Literal["auto"],
    scheduler: str | None,
    on_gpus: bool = False,
    poll: Callable[[list[int]], bool],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Run tasks and yield what they return, in the order of completion.

    Args:
        tasks: One a shard; taken as there is room for them.
        count: How many there are.
        workers: Processes of the local cluster; ``auto``: one a core, or a GPU. Unused with ``scheduler``.
        scheduler: Address or scheduler file of a running cluster, or None.
        on_gpus: Parts compute on cuda: each process of the local cluster sees one GPU only.
        poll: Called twice a second with the shards in flight; False: submit no more. May raise to end the run.
        say: Told once that there is no worker, which may be so until one joins.

    Raises:
        InputMissingError: The scheduler cannot be reached.
        UsageError: A worker has more than one thread.
        InterruptedRun: Workers die before they reach an image, or the scheduler is gone.
        Exception: What a task raised.
    """
    with _connected(workers, on_gpus, scheduler, count) as client, client.as_current():
        waiting, again = iter(tasks), deque[ShardTask]()
        running: dict[Any, ShardTask] = {}
        standstill = Standstill()
        alone = stopping = False
        pending = True
        while pending or running:
            with _scheduler_is_there():
                threads = _threads(client.nthreads())
                if not threads and not alone:
                    say("the Dask scheduler has no worker: waiting until one joins")
                    alone = True
                window = max(1, _WINDOW * threads)
                while pending and len(running) < window:
                    task = again.popleft() if again else next(waiting, None)
                    if task is None:
                        pending = False
                        break
                    running[client.submit(run_on_worker, task, pure=False)] = task
                done = _ended(running)
            for future in done:
                task = running.pop(future)
                result = _result(future, task, standstill)
                future.release()
                if result is None or result["status"] == "left":
                    again.append(task)
                    pending = not stopping
                else:
                    yield result
            if not poll([task.shard for task in running.values()]):
                pending, stopping = False, True


def run_on_worker(task: ShardTask) -> dict[str, Any]:
    """`run_shard` in a Dask worker, which may be told to go: then it ends with its micro-batch.

    Returns:
        What `run_shard` does; ``status`` ``left``: the worker goes, and the shard waits for another.
    """
    import distributed

    worker = distributed.get_worker()
    _AT_WORK[worker.address] = task
    try:
        result = run_shard(task, stopped=lambda: _is_leaving(worker) or stop_asked(task))
    finally:
        del _AT_WORK[worker.address]
    return {**result, "status": "left"} if result["status"] == "stopped" and not stop_asked(task) else result


def _is_leaving(worker: Any) -> bool:
    return worker.status.name not in ("running", "paused")


def _threads(workers: Mapping[str, int]) -> int:
    """Threads of all workers, each of which has one.

    Asked again and again, for workers join late. An image that kills a worker kills what its other threads are
    doing as well: after a few such deaths, images beside it would be quarantined for it.
    """
    for address, threads in workers.items():
        if threads > 1:
            raise UsageError(
                f"Dask worker {address}: has {threads} threads, expected 1: they would die of each other's images",
                hint="dask worker --nthreads 1 --nworkers N; what is finished is kept",
            )
    return len(workers)


def _ended(running: Iterable[Any]) -> set[Any]:
    """Futures that have ended by now, or within half a second; of a lost scheduler, none ever would."""
    import distributed

    try:
        done: set[Any] = distributed.wait(list(running), timeout=_POLL_S, return_when="FIRST_COMPLETED").done
    except TimeoutError:
        return set()
    return done


@contextmanager
def _scheduler_is_there() -> Iterator[None]:
    """Name the one thing that can be wrong where the scheduler is only asked."""

    try:
        yield
    except (OSError, CancelledError):
        raise InterruptedRun(
            "the Dask scheduler does not answer any more; finished images are kept",
            hint="start it and its workers again, then run the same command: it continues",
        ) from None


def _result(future: Any, task: ShardTask, standstill: Standstill) -> dict[str, Any] | None:
    """What a finished future holds; None if its task must be submitted again."""
    from distributed.scheduler import KilledWorker

    if future.status == "finished":
        with _scheduler_is_there():
            result: dict[str, Any] = future.result()
        return result
    if future.status in ("lost", "cancelled"):
        return None
    error = future.exception()
    if not isinstance(error, KilledWorker):
        raise error
    # Dask gave the task up after several deaths. Each narrows down the image, so the task goes back.
    standstill.note(task)
    return None


@contextmanager
def _connected(workers: int | Literal["auto"], on_gpus: bool, scheduler: str | None, tasks: int) -> Iterator[Any]:
    import dask
    import distributed

    if scheduler is not None:
        target = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
        try:
            client = distributed.Client(**target, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise InputMissingError(
                f"scheduler {scheduler}: cannot be reached ({type(error).__name__})",
                hint="give an address such as tcp://HOST:8786, or a scheduler file",
            ) from None
        with _hushed("distributed.client"), client:
            client.register_plugin(_manners())
            yield client
        return
    from dask.system import CPU_COUNT

    gpus = visible_gpus() if on_gpus else []
    count = min((len(gpus) or CPU_COUNT) if workers == "auto" else workers, tasks)
    settings = {
        "distributed.worker.daemon": True,
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.worker.profile.enabled": False,  # see `_manners`
    }
    with dask.config.set(settings):
        cluster = distributed.LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # None would listen on every interface
            silence_logs=logging.CRITICAL,
        )
        with cluster, distributed.Client(cluster, set_as_default=False) as client:
            client.register_plugin(_manners(gpus))
            yield client


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    """Keep the tracebacks of a lost connection off the terminal; `_scheduler_is_there` tells of it in one line."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _manners(gpus: Sequence[str] = ()) -> Any:
    """A plugin for workers: what they do about signals, about being told to go, and which GPU is theirs; no profiles.

    A nanny answers SIGTERM (a batch system's notice before it takes the machine) by telling its worker to go, and
    kills it some seconds later. The worker itself must survive the signal, which may have been sent to all processes:
    a death without a word would count against the images at hand. So must a local one survive an interrupt of the
    whole process group, which is for the main process to answer.

    Dask looks at a worker's stack a hundred times a second and keeps an hour of what it saw, which no command here
    shows: 70 kB a second, so that every worker grew by some 250 MiB in its first hour.

    Args:
        gpus: Of a local cluster, as CUDA_VISIBLE_DEVICES names them: the first worker gets the first, and so on.
    """
    import distributed

    class Manners(distributed.WorkerPlugin):
        name = "mask-what-matters"

        def setup(self, worker: Any) -> None:
            for name in _PROFILING:
                if (callback := worker.periodic_callbacks.pop(name, None)) is not None:
                    callback.stop()
            if worker.nanny:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus[worker.name % len(gpus)]

        def teardown(self, worker: Any) -> None:
            if (task := _AT_WORK.get(worker.address)) is not None:
                excuse(task)

    return Manners()


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
