"""Make what a model will need next, in order, while it computes: by a thread here, or by worker processes.

What is made must be a function of its task alone; then the number of workers changes nothing but the time.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Generic, TypeVar

from shared.errors import InterruptedRun, MwmError

Task = TypeVar("Task")
Made = TypeVar("Made")

_AHEAD = 2
_END = object()
_STOPS = {signal.SIGINT, signal.SIGTERM}


class LoaderDiedError(InterruptedRun):
    """A loader process was killed from outside, most often for want of memory (exit 75)."""

    kind = "loader-died"


def load_ahead(make: Callable[[Task], Made], tasks: Iterable[Task], *, workers: int = 0) -> Generator[Made, None, None]:
    """Make each task's result, in the order of the tasks, two a worker ahead of the caller.

    Args:
        make: Called with one task after the other. With workers it is pickled once, and each worker has its own copy.
        tasks: May be endless.
        workers: Processes. 0: one thread of this process.

    Raises:
        LoaderDiedError: A worker was killed.
        MwmError: What ``make`` raised, as it was.
    """
    return _by_thread(make, tasks) if workers == 0 else _by_processes(make, tasks, workers)


@contextmanager
def loader_deaths() -> Iterator[None]:
    """Tell a killed worker in one line: torch raises its RuntimeError wherever the main thread is just then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _death(str(error).splitlines()[0]) from None


def _death(how: str) -> LoaderDiedError:
    return LoaderDiedError(
        f"a loader process died: {how}",
        hint="most likely memory: lower loader_workers, cache_mib or batch_size; the same command continues",
    )


def _by_thread(make: Callable[[Task], Made], tasks: Iterable[Task]) -> Generator[Made, None, None]:
    plan = iter(tasks)
    waiting: deque[Future[Made]] = deque()
    # One thread: results are made in order, so nothing that ``make`` keeps needs a lock.
    with ThreadPoolExecutor(1) as pool:
        try:
            for task in plan:
                waiting.append(pool.submit(make, task))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _by_processes(make: Callable[[Task], Made], tasks: Iterable[Task], workers: int) -> Generator[Made, None, None]:
    from torch.utils.data import DataLoader

    torch_loader: Any = DataLoader  # typed for integers as indices only
    loader = torch_loader(
        _Maker(make),
        sampler=tasks,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        multiprocessing_context="spawn",  # fork with threads of zarr or torch hangs
        worker_init_fn=_leave_stops_to_the_main_process,
    )
    with loader_deaths():
        with _stops_held_back():
            results: Any = iter(loader)
        try:
            while (made := _receive(results)) is not _END:
                if isinstance(made, _Failed):
                    raise made.error
                yield made
        finally:
            # By name, not when collected: a traceback may keep the iterator, and its processes, alive for long.
            results._shutdown_workers()
            for worker in results._workers:
                # One slow to leave: torch asks it to by SIGTERM after five seconds, which it leaves to this process.
                worker.kill()
                worker.join()


def _receive(results: Iterator[Any]) -> Any:
    """The next result, or `_END`.

    A worker killed while its tensors travel breaks their connection a moment before the system calls it dead;
    torch, finding it alive, passes the connection's error on. What ``make`` raises never comes this way.
    """
    try:
        return next(results, _END)
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        raise _death(f"its connection ended ({type(error).__name__})") from None


class _Maker(Generic[Task, Made]):
    """The data set that torch's loader asks for: its indices are our tasks."""

    def __init__(self, make: Callable[[Task], Made]) -> None:
        self._make = make

    def __getitem__(self, task: Task) -> Made | _Failed:
        try:
            return self._make(task)
        except (MwmError, OSError) as error:
            return _Failed(error)


class _Failed:
    """An error on its way home: torch would rebuild it with a traceback for a message."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextmanager
def _stops_held_back() -> Iterator[None]:
    """Processes started meanwhile begin with SIGINT and SIGTERM blocked: an interrupt finds none of them unready."""
    resource_tracker.ensure_running()  # its own start would unblock them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_stops_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process answers it, and ends its workers."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
