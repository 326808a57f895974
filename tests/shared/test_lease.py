import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.errors import LockedError
from shared.lease import LEASE, Lease, lease_holder
from shared.workspace import begin

HOLD = """
import sys, time
from pathlib import Path
from shared.lease import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
RACE = """
import sys, time
from pathlib import Path
from shared.errors import LockedError
from shared.lease import Lease
for _ in range(20):
    try:
        with Lease(Path(sys.argv[1])):
            start = time.monotonic()
            time.sleep(0.02)
            print(start, time.monotonic())
    except LockedError:
        time.sleep(0.005)
"""


def hold(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_one_writer_a_folder(tmp_path: Path) -> None:
    with Lease(tmp_path):
        assert lease_holder(tmp_path) == os.getpid()
        with pytest.raises(LockedError), Lease(tmp_path):
            pass
    assert lease_holder(tmp_path) is None
    assert not (tmp_path / LEASE).exists()


def test_a_killed_writers_lease_is_taken_over_at_once(tmp_path: Path) -> None:
    other = hold(tmp_path)
    with pytest.raises(LockedError, match=str(other.pid)), Lease(tmp_path):
        pass
    other.kill()
    other.communicate()
    with Lease(tmp_path):
        assert lease_holder(tmp_path) == os.getpid()


def test_no_moment_of_a_kill_locks_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*paths: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("shared.lease.os.link", die)
        patched.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # nor does anything else run
        with pytest.raises(Killed), Lease(tmp_path):
            pass
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    with Lease(tmp_path):
        assert begin(tmp_path, kind="encoder", inputs=[], spec={}, resolved="")[0] == "new"


def test_a_file_system_without_links_has_leases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("shared.lease.os.link", refuse)
    with Lease(tmp_path):
        assert lease_holder(tmp_path) == os.getpid()
        with pytest.raises(LockedError), Lease(tmp_path):
            pass
    assert not list(tmp_path.iterdir())


def test_of_many_that_find_a_dead_lease_one_wins(tmp_path: Path) -> None:
    other = hold(tmp_path)
    other.kill()
    other.communicate()
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    held = sorted(
        tuple(map(float, line.split())) for racer in racers for line in racer.communicate(timeout=60)[0].splitlines()
    )
    assert held
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(held)), "two writers at once"


def test_another_machines_lease_is_dead_after_two_silent_minutes(tmp_path: Path) -> None:
    path = tmp_path / LEASE
    path.write_text(json.dumps({"pid": 1, "started": "1", "boot": "another"}))
    assert lease_holder(tmp_path) == 1
    os.utime(path, (time.time() - 121, time.time() - 121))
    assert lease_holder(tmp_path) is None


def test_a_live_writer_in_another_container_of_this_machine_is_not_dead(tmp_path: Path) -> None:
    path = tmp_path / LEASE
    other = hold(tmp_path)
    elsewhere = re.sub(r"pid:\[\d+\]", "pid:[1]", path.read_text())
    other.kill()
    other.communicate()
    path.write_text(elsewhere)  # the same boot; of its pids nothing is known here
    assert lease_holder(tmp_path) == other.pid
    os.utime(path, (time.time() - 121, time.time() - 121))
    assert lease_holder(tmp_path) is None


def test_a_lease_that_another_took_over_is_neither_kept_alive_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.lease._HEARTBEAT_S", 0.01)
    path = tmp_path / LEASE
    with Lease(tmp_path) as lease:
        taken = tmp_path / "taken"
        taken.write_text(json.dumps({"pid": 1, "started": "1", "boot": "another", "nonce": "another"}))
        os.utime(taken, (1, 1))
        os.replace(taken, path)
        assert lease._thread is not None
        lease._thread.join(30)
        assert not lease._thread.is_alive()
        assert path.stat().st_mtime == 1
    assert json.loads(path.read_text())["nonce"] == "another"


def test_a_torn_lease_does_not_lock_for_ever(tmp_path: Path) -> None:
    path = tmp_path / LEASE
    path.write_text('{"pid": ')
    assert lease_holder(tmp_path) is not None
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert lease_holder(tmp_path) is None
