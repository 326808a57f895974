"""The first signal is remembered, the second acts, and afterwards all is as before."""

import os
import signal
import threading

import pytest

from shared.signals import Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_is_remembered_and_the_second_acts(number: signal.Signals) -> None:
    acted: list[int] = []
    before = signal.signal(number, lambda *_: acted.append(1))
    try:
        with Signals() as signals:
            assert signals.caught is None
            os.kill(os.getpid(), number)
            assert (signals.caught, acted) == (number.name, [])
            os.kill(os.getpid(), number)
            assert acted == [1]
        os.kill(os.getpid(), number)
        assert acted == [1, 1]
    finally:
        signal.signal(number, before)


def test_other_threads_may_use_it_too() -> None:
    seen: list[str | None] = []

    def use() -> None:
        with Signals() as signals:
            seen.append(signals.caught)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [None]


def test_two_signals_at_once_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = signal.signal
    with Signals() as signals:

        def late(number: int, handler: object) -> object:
            monkeypatch.setattr(signal, "signal", plain)
            signals._catch(signal.SIGTERM, None)  # arrives while the first one is being noted
            return plain(number, handler)

        monkeypatch.setattr(signal, "signal", late)
        signals._catch(signal.SIGTERM, None)
        assert signals.caught == "SIGTERM"
