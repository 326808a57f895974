"""Event files: TensorBoard itself reads back what a run wrote, each point once however the run was cut off."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.runlog import RunLog, read_metrics
from tests.shared.event_files import pictures, points


def write(folder: Path, first: int, last: int, *, rewind: int | None = None, **marks: int) -> None:
    with RunLog(folder, stream=io.StringIO()) as log:
        if rewind is not None:
            log.rewind(rewind, **marks)
        for step in range(first, last + 1):
            log.metric(step, loss=1 / step, note="text", broken=float("nan"), **marks)
            log.progress(step, 9, "step", loss=1 / step, img_per_s=10.0 * step)


def test_numbers_are_read_back_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1, 4)
    found = points(tmp_path)
    assert found == {
        "loss": [(step, np.float32(1 / step)) for step in range(1, 5)],
        "img_per_s": [(step, 10.0 * step) for step in range(1, 5)],
    }


def test_a_run_cut_off_and_continued_has_each_point_once(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, rewind=0)
    (file,) = (tmp_path / "run/tb").iterdir()
    file.write_bytes(file.read_bytes()[:-3])  # a kill in the middle of a record
    write(tmp_path, 4, 6, rewind=3)
    write(tmp_path, 7, 7, rewind=6)
    assert [step for step, _ in points(tmp_path)["loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert len(list((tmp_path / "run/tb").iterdir())) == 3


def test_the_parts_of_a_run_have_lines_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, 1, 4, rewind=0, fold=1)
    write(tmp_path, 1, 4, rewind=0, fold=2)
    write(tmp_path, 2, 2, rewind=1, fold=2)
    assert [step for step, _ in points(tmp_path, "fold-1")["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in points(tmp_path, "fold-2")["loss"]] == [1, 2]


def test_a_picture_is_read_back(tmp_path: Path) -> None:
    pixels = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.picture(3, "a", lambda: pixels)
    ((step, found),) = pictures(tmp_path)["a"]
    assert step == 3
    assert np.array_equal(found, pixels)


def test_without_tensorboard_a_run_says_so_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream) as log:
        for step in (1, 2):
            log.metric(step, loss=0.5)
            log.picture(step, "a", lambda: pytest.fail("made for nobody"))
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("TensorBoard is not installed")
    assert len(read_metrics(tmp_path)) == 2
    assert not (tmp_path / "run/tb").exists()


def test_a_tensorboard_that_does_not_fit_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(folder: Path) -> None:
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr("shared.runlog.Events", unfit)
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream) as log:
        log.metric(1, loss=0.5)
    assert stream.getvalue().startswith("TensorBoard cannot be loaded (TypeError): no run/tb")


def test_progress_alone_writes_no_events(tmp_path: Path) -> None:
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.progress(1, 2, "image", img_per_s=3.0)
    assert not (tmp_path / "run/tb").exists()
