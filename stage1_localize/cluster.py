"""Shards on Dask: a bounded window of whole-shard tasks, on a local cluster or a scheduler that is there.

Dask runs a task at least once, so tasks are idempotent and the journal is the truth; futures are released as
they complete.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from shared.errors import InputMissingError, InterruptedRun
from stage1_localize.shard import ShardTask, read_state, run_shard

CONNECT_S = 30
"""How long to wait for a scheduler to answer, in seconds."""

_POLL_S = 0.5
_WINDOW = 2
_MODELS_DIE_MAX = 3


def run_on_dask(
    tasks: Sequence[ShardTask],
    *,
    workers: int | Literal["auto"],
    scheduler: str | None,
    poll: Callable[[list[int]], bool],
) -> Iterator[dict[str, Any]]:
    """Run tasks and yield what they return, in the order of completion.

    Args:
        tasks: One a shard.
        workers: Processes of the local cluster; ``auto``: one a core. Unused with ``scheduler``.
        scheduler: Address or scheduler file of a running cluster, or None.
        poll: Called twice a second with the shards in flight; False: submit no more. May raise to end the run.

    Raises:
        InputMissingError: The scheduler cannot be reached.
        InterruptedRun: Workers die before they reach an image.
        Exception: What a task raised.
    """
    import distributed

    with _connected(workers, scheduler, len(tasks)) as client, client.as_current():
        waiting = deque(tasks)
        running: dict[Any, ShardTask] = {}
        deaths: dict[int, tuple[str, int]] = {}
        while waiting or running:
            window = max(1, _WINDOW * sum(client.nthreads().values()))
            while waiting and len(running) < window:
                task = waiting.popleft()
                running[client.submit(run_shard, task, pure=False)] = task
            try:
                done = distributed.wait(list(running), timeout=_POLL_S, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                done = set()
            for future in done:
                task = running.pop(future)
                result = _result(future, task, deaths)
                future.release()
                if result is None:
                    waiting.appendleft(task)
                else:
                    yield result
            if not poll([task.shard for task in running.values()]):
                waiting.clear()


def _result(future: Any, task: ShardTask, deaths: dict[int, tuple[str, int]]) -> dict[str, Any] | None:
    """What a finished future holds; None if its task must be submitted again."""
    from distributed.scheduler import KilledWorker

    if future.status == "finished":
        result: dict[str, Any] = future.result()
        return result
    if future.status in ("lost", "cancelled"):
        return None
    error = future.exception()
    if not isinstance(error, KilledWorker):
        raise error
    # Dask gave the task up after several deaths. Each death narrows down the image, so as long as the state
    # moves it goes back; a state that stands still says that workers die before any image.
    state = repr(read_state(Path(task.folder), task.shard))
    before, count = deaths.get(task.shard, ("", 0))
    deaths[task.shard] = state, count + 1 if state == before else 1
    if deaths[task.shard][1] >= _MODELS_DIE_MAX:
        raise InterruptedRun(
            f"shard {task.shard}: its workers die before they reach an image",
            hint="most likely memory: fewer workers (--set workers=1) or a smaller micro_batch",
        )
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
        with client:
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
