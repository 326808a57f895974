"""Loading ahead: the same results in the same order by a thread or by processes, and errors that arrive whole."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from multiprocessing.util import Finalize

import pytest
import torch

from shared.errors import DecodeError
from shared.loader import LoaderDiedError, load_ahead


def tasks() -> Iterator[tuple[int, list[int]]]:
    return ((number // 3, [number, number + 1]) for number in count())


def square(task: tuple[int, list[int]]) -> dict[str, torch.Tensor]:
    return {"epoch": torch.tensor(task[0]), "values": torch.tensor(task[1], dtype=torch.float64) ** 2}


def fail_at_four(task: tuple[int, list[int]]) -> int:
    if task[1][0] == 4:
        raise DecodeError("sample 'x.png': torn", reason="decode_failed", hint="mend it")
    return task[1][0]


def missing_at_four(task: tuple[int, list[int]]) -> int:
    if task[1][0] == 4:
        os.stat("/nowhere/at-all")
    return task[1][0]


def die_at_four(task: tuple[int, list[int]]) -> int:
    if task[1][0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return task[1][0]


def linger_when_asked_to_go(task: tuple[int, list[int]]) -> int:
    Finalize(None, time.sleep, (600,), exitpriority=100)
    return task[1][0]


def test_results_and_their_order_do_not_depend_on_workers() -> None:
    by_thread, by_processes = (list(islice(load_ahead(square, tasks(), workers=workers), 9)) for workers in (0, 2))
    for number, (one, other) in enumerate(zip(by_thread, by_processes, strict=True)):
        assert one["epoch"] == other["epoch"] == number // 3
        assert torch.equal(one["values"], other["values"])
        assert one["values"].tolist() == [number**2, (number + 1) ** 2]


def test_a_plan_that_ends_is_made_whole() -> None:
    assert [made["values"][0].item() for made in load_ahead(square, list(islice(tasks(), 5)))] == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("make", "kind"), [(fail_at_four, DecodeError), (missing_at_four, FileNotFoundError)])
def test_an_error_arrives_as_it_was(make: Callable, kind: type[Exception], workers: int) -> None:
    seen = []
    with pytest.raises(kind) as caught:
        seen.extend(load_ahead(make, tasks(), workers=workers))
    assert seen == [0, 1, 2, 3]
    assert "Traceback" not in str(caught.value)
    if isinstance(caught.value, DecodeError):
        assert (caught.value.message, caught.value.hint) == ("sample 'x.png': torn", "mend it")
    else:
        assert caught.value.errno == 2
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_told_in_one_line() -> None:
    with pytest.raises(LoaderDiedError, match=r"^a loader process died: ") as caught:
        list(load_ahead(die_at_four, tasks(), workers=1))
    assert caught.value.exit_code == 75
    assert "\n" not in caught.value.message
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("ended", [ConnectionResetError, EOFError, FileNotFoundError])
def test_a_connection_that_ends_before_its_process_is_known_dead_is_a_death(
    monkeypatch: pytest.MonkeyPatch, ended: type[Exception]
) -> None:
    class Iterator:
        _workers = ()

        def __next__(self) -> int:
            raise ended(104, "reset by peer")

        def _shutdown_workers(self) -> None:
            pass

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", lambda loader: Iterator())
    with pytest.raises(LoaderDiedError, match=rf"^a loader process died: its connection ended \({ended.__name__}\)$"):
        list(load_ahead(square, tasks(), workers=1))


@pytest.mark.slow
def test_a_worker_that_lingers_is_gone_all_the_same() -> None:
    loading = load_ahead(linger_when_asked_to_go, tasks(), workers=1)
    assert next(loading) == 0
    loading.close()
    assert not multiprocessing.active_children()
