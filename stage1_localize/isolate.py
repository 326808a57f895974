"""A shard in a process of its own, where `localize` without Dask does not risk itself again.

A run with ``workers: 0`` that died left in a state file what it was trying. The same command then lets another
process try it: if that dies too, this one lives on, starts the next, and so finds the image.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shared.errors import MwmError
from stage1_localize.shard import ShardTask, Standstill, run_shard, stop_asked

_POLL_S = 0.2
_STOPS = {signal.SIGINT, signal.SIGTERM}


def run_isolated(task: ShardTask, poll: Callable[[list[int]], Any]) -> dict[str, Any]:
    """`run_shard` in processes, one after the other until one ends with a word.

    Args:
        task: The shard.
        poll: Called five times a second with the shard; may raise to end the run.

    Raises:
        InterruptedRun: The processes die before they reach an image.
        Exception: What the task raised.
    """
    context = multiprocessing.get_context("spawn")
    standstill = Standstill()
    while True:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_tell, args=(task, theirs, os.getpid()), daemon=True)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # Ctrl-C is for this process to answer
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        try:
            while not ours.poll(_POLL_S):
                poll([task.shard])
            told = ours.recv()
        except EOFError:
            standstill.note(task)
            continue
        finally:
            process.kill()
            process.join()
            ours.close()
        if isinstance(told, Exception):
            raise told
        return dict(told)


def _tell(task: ShardTask, to: Connection, parent: int) -> None:
    try:
        # An orphan ends with its micro-batch, and lets go of the shard.
        told: Any = run_shard(task, stopped=lambda: stop_asked(task) or os.getppid() != parent)
    except Exception as error:
        told = _portable(error, task.shard)
    to.send(told)


def _portable(error: Exception, shard: int) -> Exception:
    """The error, or one that names it where it cannot travel: no word at all would pass for a death."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return MwmError(f"shard {shard}: {type(error).__name__} at {where}", hint="the same command tells in full")
    return error
