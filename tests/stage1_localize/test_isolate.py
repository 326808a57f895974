"""A shard in a process of its own: what it says arrives."""

import multiprocessing
import os
from types import SimpleNamespace
from typing import Any

import pytest

from shared.errors import MwmError
from stage1_localize import isolate


class OfTwoArgumentsError(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def of_a_hidden_class() -> Exception:
    class LocalError(Exception):
        pass

    return LocalError("of a class that no other process can find")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (of_a_hidden_class(), "shard 3: LocalError at test_isolate.py:"),
        (OfTwoArgumentsError("a", "b"), "OfTwoArguments"),
    ],
)
def test_an_error_that_cannot_travel_is_named_and_no_death(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(isolate, "run_shard", fail)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    task: Any = SimpleNamespace(shard=3)
    isolate._tell(task, theirs, os.getpid())
    heard = ours.recv()
    # With distributed in the process, tblib's pickling carries some errors as they are: that is well, too.
    assert told in (heard.message if isinstance(heard, MwmError) else type(heard).__name__)
