"""Processes that stop when asked, report a death, and leave nothing running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import InterruptedRun
from stage1_localize.fit_pool import refuse_if_stopped, run_tasks

ROOT = Path(__file__).parents[2]


def double(number: int) -> int:
    return 2 * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def last(folder: str) -> None:
    """Says who it is, then works until it is asked to stop."""
    Path(folder, str(os.getpid())).touch()
    while True:
        refuse_if_stopped()
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds: float = 60) -> bool:
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.1)
    return true()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_task_is_done_once(workers: int) -> None:
    assert sorted(run_tasks(double, [1, 2, 3], workers=workers, stopped=lambda: False)) == [2, 4, 6]


def test_a_killed_process_is_an_interruption_not_a_hang() -> None:
    with pytest.raises(InterruptedRun, match="a worker process was killed"):
        list(run_tasks(die, [1, 2], workers=1, stopped=lambda: False))


def test_running_tasks_end_when_asked(tmp_path: Path) -> None:
    started = lambda: len(list(tmp_path.iterdir())) == 1  # noqa: E731
    assert list(run_tasks(last, [str(tmp_path)], workers=1, stopped=started)) == []
    assert not alive(int(next(tmp_path.iterdir()).name))


def test_in_this_process_a_task_ends_when_asked(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    assert list(run_tasks(last, [str(tmp_path)], workers=0, stopped=lambda: next(asked))) == []


def test_processes_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "from tests.stage1_localize.test_fit_pool import last\n"
        "from stage1_localize.fit_pool import run_tasks\n"
        f"if __name__ == '__main__': list(run_tasks(last, [{str(tmp_path)!r}], workers=1, stopped=lambda: False))"
    )
    script = tmp_path.with_suffix(".py")
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert until(lambda: any(tmp_path.iterdir()))
    child = int(next(tmp_path.iterdir()).name)
    assert alive(child)
    parent.kill()
    parent.wait()
    assert until(lambda: not alive(child), 20)
