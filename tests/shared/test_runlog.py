"""The run log: what people read, what files keep."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InterruptedRun
from shared.runlog import RunLog, duration, read_metrics, scrub


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_says_lines_to_the_stream_and_the_file(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream) as log:
        log.info("100 samples")
        log.warn("3 samples have no map")
        assert log.warnings == ["3 samples have no map"]
    assert stream.getvalue() == "100 samples\nwarning: 3 samples have no map\n"
    lines = (tmp_path / "run/run.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["info: 100 samples", "warning: 3 samples have no map"]


def fail_inside(folder, message):
    with RunLog(folder, stream=io.StringIO()):
        raise OSError(message)


def test_files_hold_no_absolute_path(tmp_path):
    secret = tmp_path / "jane doe"
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.info(f"reading {secret}/scans/a.png")
    with pytest.raises(OSError, match="broken"):
        fail_inside(tmp_path, f"broken: {secret}/scans/a.png")
    text = (tmp_path / "run/run.log").read_text()
    assert str(tmp_path) not in text
    assert "OSError: broken" in text
    assert "a.png" in text
    assert "tests/shared/test_runlog.py" in text  # the traceback still tells where


class OfAKindError(InterruptedRun):
    kind = "lost"


def test_a_stop_of_any_kind_is_one_line_and_no_traceback(tmp_path):
    with pytest.raises(OfAKindError), RunLog(tmp_path, stream=io.StringIO()):
        raise OfAKindError("another process ended")
    (line,) = (tmp_path / "run/run.log").read_text().splitlines()
    assert line.endswith("info: stopped: another process ended")


def test_metrics_survive_a_torn_line_and_rewind(tmp_path):
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        for step in range(1, 6):
            log.metric(step, loss=1 / step, fold=step % 2)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        assert log.rewind(4, fold=0) == 0
        assert log.rewind(3, fold=0) == 1
        assert log.rewind(2) == 2
        log.metric(3, loss=float("nan"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1]) == {"step": 3, "loss": None}


def test_broken_lines_of_a_power_cut_are_dropped_and_counted(tmp_path):
    path = tmp_path / "run/metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"step": 1, "loss": 2}\n' + bytes(40) + b'\n[3]\n{"step": 2, "loss": 1}\n{"step"')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        assert log.warnings == ["run/metrics.jsonl: 2 broken lines dropped"]
        assert path.read_bytes().count(b"\n") == 2
        assert log.rewind(1) == 1
        log.metric(2, loss=1)
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        assert not log.warnings
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_rewind_that_is_cut_off_loses_no_line(tmp_path, monkeypatch):
    def cut(*names):
        raise KeyboardInterrupt

    with RunLog(tmp_path, stream=io.StringIO()) as log:
        for step in range(1, 6):
            log.metric(step, loss=1)
        monkeypatch.setattr("os.replace", cut)
        with pytest.raises(KeyboardInterrupt):
            log.rewind(3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_plain_progress_is_sparse_and_ends_with_the_last_step(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream, interval_s=1000) as log:
        for step in range(1, 101):
            log.progress(step, 100, "step", loss=0.41234, img_per_s=312.4)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/100 loss 0.412 312 img/s"
    assert lines[1:] == ["step 100/100 loss 0.412 312 img/s"]


def test_plain_progress_tells_the_time_left(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, stream=stream, interval_s=0) as log:
        log.progress(10, 20, "step")
        log.progress(11, 20, "step")
    first, second = stream.getvalue().splitlines()
    assert "eta" not in first
    assert second.endswith("eta 0s")


def test_terminal_progress_draws_and_clears(tmp_path):
    stream = Terminal()
    with RunLog(tmp_path, stream=stream) as log:
        log.progress(1, 2, "step", loss=0.5)
        log.info("between")
        log.progress(2, 2, "step", loss=0.5)
    assert "between" in stream.getvalue()
    assert "step" not in (tmp_path / "run/run.log").read_text()  # a live line is not logged


@given(st.lists(st.text("abcXYZ019._-", min_size=1, max_size=8), min_size=2, max_size=5))
def test_scrub_keeps_only_the_last_part(parts):
    assert scrub("x /" + "/".join(parts)) == f"x <path>/{parts[-1]}"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("images /data/Jane Doe/MRN 1/scans: no such folder", "images <path>/scans: no such folder"),
        ("cannot read /data/Doe, Jane/MRN:1/x.png", "cannot read <path>/x.png"),
        ("head: /data/Jane Doe/MRN 1/h@sha256:ab\ngrid_px: 3/4", "head: <path>/h@sha256:ab\ngrid_px: 3/4"),
        ("/data/Jane O'Doe/MRN 1/x.png is gone", "<path>/x.png is gone"),
        ("'/data/Jane O'Doe/MRN 1/x.png' is gone", "'<path>/x.png' is gone"),
        ("from /data/a/x to /srv/Jane Doe/MRN 1/y", "from <path>/y"),
    ],
)
def test_scrub_takes_paths_with_spaces_without_quotes_whole(text, kept):
    assert scrub(text) == kept


def test_relative_paths_and_rates_stay():
    assert scrub("area = height / width / 2") == "area = height / width / 2"
    assert scrub("run/metrics.jsonl at 312 img/s, 3/4 done") == "run/metrics.jsonl at 312 img/s, 3/4 done"


def test_duration_rounds():
    assert duration(59.4) == "59s"
    assert duration(59.6) == "1m00"
