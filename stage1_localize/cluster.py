"""Shards on Dask: a bounded window of whole-shard tasks, on a local cluster or a scheduler that is there.

Dask runs a task at least once, so tasks are idempotent and the journal is the truth; futures are released as
they complete.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from shared.errors import InputMissingError, InterruptedRun, UsageError
from stage1_localize.shard import ShardTask, Standstill, run_shard

CONNECT_S = 30
"""How long to wait for a scheduler to answer, in seconds."""

_POLL_S = 0.5
_WINDOW = 2


def run_on_dask(
    tasks: Sequence[ShardTask],
    *,
    workers: int | Literal["auto"],
    scheduler: str | None,
    poll: Callable[[list[int]], bool],
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Run tasks and yield what they return, in the order of completion.

    Args:
        tasks: One a shard.
        workers: Processes of the local cluster; ``auto``: one a core. Unused with ``scheduler``.
        scheduler: Address or scheduler file of a running cluster, or None.
        poll: Called twice a second with the shards in flight; False: submit no more. May raise to end the run.
        say: Told once that there is no worker, which may be so until one joins.

    Raises:
        InputMissingError: The scheduler cannot be reached.
        UsageError: A worker has more than one thread.
        InterruptedRun: Workers die before they reach an image, or the scheduler is gone.
        Exception: What a task raised.
    """
    with _connected(workers, scheduler, len(tasks)) as client, client.as_current():
        waiting = deque(tasks)
        running: dict[Any, ShardTask] = {}
        standstill = Standstill()
        alone = False
        while waiting or running:
            with _scheduler_is_there():
                threads = _threads(client.nthreads())
                if not threads and not alone:
                    say("the Dask scheduler has no worker: waiting until one joins")
                    alone = True
                window = max(1, _WINDOW * threads)
                while waiting and len(running) < window:
                    task = waiting.popleft()
                    running[client.submit(run_shard, task, pure=False)] = task
                done = _ended(running)
            for future in done:
                task = running.pop(future)
                result = _result(future, task, standstill)
                future.release()
                if result is None:
                    waiting.appendleft(task)
                else:
                    yield result
            if not poll([task.shard for task in running.values()]):
                waiting.clear()


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
def _connected(workers: int | Literal["auto"], scheduler: str | None, tasks: int) -> Iterator[Any]:
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
            yield client
        return
    from dask.system import CPU_COUNT

    count = min(CPU_COUNT if workers == "auto" else workers, tasks)
    settings = {"distributed.worker.daemon": True, "distributed.worker.multiprocessing-method": "spawn"}
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
            client.register_plugin(_leave_signals_to_main())
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


def _leave_signals_to_main() -> Any:
    """A plugin for local workers: an interrupt of the whole process group is for the main process to answer.

    Nannies end a worker that ignores SIGTERM by SIGKILL.
    """
    import distributed

    class LeaveSignals(distributed.WorkerPlugin):
        def setup(self, worker: Any) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    return LeaveSignals()
