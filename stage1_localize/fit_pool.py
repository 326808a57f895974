"""Independent tasks in processes that end when they are asked to, and when their parent dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from typing import Any, TypeVar

from shared.errors import InterruptedRun

T = TypeVar("T")
_POLL_S = 0.3
_asked: Callable[[], bool] = lambda: False  # noqa: E731


class Stopped(Exception):
    """A task ended early because it was asked to."""


def refuse_if_stopped() -> None:
    """Called by tasks, often.

    Raises:
        Stopped: The run has been asked to stop.
    """
    if _asked():
        raise Stopped


def run_tasks(
    function: Callable[[T], Any], tasks: Sequence[T], *, workers: int, stopped: Callable[[], bool]
) -> Iterator[Any]:
    """Results as they come, in any order; ends early, without an error, once ``stopped`` says so.

    Args:
        function: Of a module, for processes; calls `refuse_if_stopped` where it takes long.
        tasks: Pickled to the processes.
        workers: Processes; 0: this one.
        stopped: Asked several times a second.

    Raises:
        InterruptedRun: A process was killed from outside, for want of memory perhaps.
        Exception: What a task raises.
    """
    if workers == 0 or not tasks:
        yield from _run_here(function, tasks, stopped)
        return
    context = get_context("spawn")
    event = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _begin, (event, os.getpid()))
    try:
        waiting = {pool.submit(function, task) for task in tasks}
        while waiting and not stopped():
            done, waiting = wait(waiting, _POLL_S, FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        if not stopped():
            raise InterruptedRun(
                "a worker process was killed; what was finished is kept",
                hint="run the same command: it continues; for want of memory, with --set workers=0",
            ) from None
    finally:
        event.set()
        pool.shutdown(cancel_futures=True)


def _run_here(function: Callable[[T], Any], tasks: Sequence[T], stopped: Callable[[], bool]) -> Iterator[Any]:
    global _asked
    before, _asked = _asked, stopped
    try:
        for task in tasks:
            refuse_if_stopped()
            yield function(task)
    except Stopped:
        return
    finally:
        _asked = before


def _begin(event: Any, parent: int) -> None:
    """In a new process: leave signals to the parent, and do not outlive it."""
    global _asked
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):
            signal.signal(number, signal.SIG_IGN)
    _asked = event.is_set

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
