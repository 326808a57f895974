"""A request to stop: remembered, so that a run ends at a place of its own choosing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


class Signals:
    """Remember SIGTERM or SIGINT instead of dying; the second one of a kind acts as it did before.

    Attributes:
        caught: Name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._give_back(number)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        # A second signal may be handled in the middle of the first: then there is nothing left to give back.
        if (handler := self._before.pop(number, self)) is not self:
            signal.signal(number, handler)


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as SIGINT does, wherever no `Signals` remembers it.

    Without it, Python dies at once: no lease is given back, and the caller sees no exit code of ours.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)
