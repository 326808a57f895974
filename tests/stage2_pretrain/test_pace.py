"""The clock of an epoch: rates and waits by a clock that the test turns; a continued run is read as it was last."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.runlog import RunLog
from stage2_pretrain.pace import Pace, pace_curves
from tests.shared.event_files import points

SECONDS = st.floats(0.001, 1e4)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.tuples(SECONDS, SECONDS, st.integers(1, 9)), min_size=1, max_size=9))
def test_rates_follow_from_waits_and_work(steps: list[tuple[float, float, int]]) -> None:
    clock = Clock()

    def source() -> Iterator[tuple[int, list[str]]]:
        for index, (wait_s, _, count) in enumerate(steps):
            clock.now_s += wait_s
            yield index, ["x"] * count

    pace = Pace(clock)
    clock.now_s += 50  # set-up before the first batch is no time of an epoch
    begun = pace.follow(source())
    for epoch in steps:
        next(begun)
        clock.now_s += epoch[1]
        row = pace.close_epoch()
        wait_s, work_s, count = epoch
        assert row["images_per_s"] == pytest.approx(count / (wait_s + work_s))
        assert row["data_wait_share"] == pytest.approx(wait_s / (wait_s + work_s))


def test_the_source_is_closed_with_it() -> None:
    closed = []

    def source() -> Iterator[tuple[int, list[str]]]:
        try:
            while True:
                yield 0, ["x"]
        finally:
            closed.append(True)

    inner = source()
    begun = Pace().follow(inner)
    next(begun)
    begun.close()
    assert closed


def test_of_an_epoch_done_twice_the_last_is_shown(tmp_path: Path) -> None:
    def write(first: int, last: int, speed: float) -> None:
        with RunLog(tmp_path, stream=io.StringIO()) as log:
            log.rewind(2 * (first - 1))
            for epoch in range(first, last + 1):
                log.timing(2 * epoch, epoch=epoch, images_per_s=speed * epoch, data_wait_share=0.25)

    assert pace_curves(tmp_path)["images a second"] == ([], [])
    write(1, 3, 10.0)
    with (tmp_path / "run/timings.jsonl").open("a") as file:
        file.write('{"step": 8, "epo')  # a kill in the middle of a line
    write(3, 4, 100.0)
    curves = pace_curves(tmp_path)
    assert curves["images a second"] == ([1, 2, 3, 4], [10.0, 20.0, 300.0, 400.0])
    assert curves["time lost to data, %"] == ([1, 2, 3, 4], [25.0] * 4)
    assert [value for _, value in points(tmp_path)["images_per_s"]] == [10.0, 20.0, 300.0, 400.0]
