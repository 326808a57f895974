"""What `doctor` looks at of the machine: memory, disk, limits, language, clock."""

from __future__ import annotations

import locale
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shared.forecast import machine_bytes, size

SHARED_MEMORY = Path("/dev/shm")
_MEMORY_BYTES, _DISK_BYTES, _SHM_BYTES, _FILES = 6 << 30, 1 << 30, 32 << 20, 512


class Check(NamedTuple):
    """One line of the examination.

    Attributes:
        name: Of what was looked at.
        state: ``ok``; ``BAD``: needed and wrong; ``absent``: needed by some features only.
        found: What is there.
        expected: What should be.
        remedy: What to do about it.
    """

    name: str
    state: Literal["ok", "BAD", "absent"]
    found: str
    expected: str = ""
    remedy: str = ""

    def lines(self) -> list[str]:
        """For a person."""
        mark = {"ok": "ok  ", "BAD": "BAD ", "absent": "-   "}[self.state]
        if self.state == "ok":
            return [f"{mark} {self.name:<14} {self.found}"]
        more = f"; expected {self.expected}" if self.expected else ""
        return [f"{mark} {self.name:<14} {self.found}{more}", *([f"     {self.remedy}"] if self.remedy else [])]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**self._asdict(), "ok": self.state != "BAD"}


def _judged(name: str, good: bool, found: str, expected: str, remedy: str) -> Check:
    return Check(name, "ok" if good else "BAD", found, expected, remedy)


def _memory() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = machine_bytes()
    if total is None:
        return Check("memory", "ok", f"{cores} cores, memory unknown")
    limit = _container_bytes()
    usable = min(total, limit or total)
    found = f"{cores} cores, {size(usable)}" + (
        f" (this container; the machine has {size(total)})" if usable < total else ""
    )
    return _judged("memory", usable >= _MEMORY_BYTES, found, "8 GB", "fewer workers (--set workers=1), smaller batches")


def _container_bytes() -> int | None:
    """The memory limit of this control group, or None."""
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            continue
    return None


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    return _judged("disk", free >= _DISK_BYTES, f"{size(free)} free here", "1 GB; a tour writes 0.6 GB", "make room")


def _shm() -> Check:
    """Containers often have 64 MB or less; workers pass batches through it."""
    if not SHARED_MEMORY.is_dir():
        state: Literal["ok", "BAD"] = "BAD" if sys.platform.startswith("linux") else "ok"
        return Check("shm", state, f"no {SHARED_MEMORY}", "shared memory", "docker run --shm-size=1g")
    total = shutil.disk_usage(SHARED_MEMORY).total
    return _judged(
        "shm", total >= _SHM_BYTES, f"{size(total)} of shared memory", size(_SHM_BYTES), "docker run --shm-size=1g"
    )


def _files() -> Check:
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    endless = soft == resource.RLIM_INFINITY
    told = "no limit of open files" if endless else f"{soft} open files"
    return _judged("files", endless or soft >= _FILES, told, f"{_FILES} or more", "ulimit -n 4096")


def _temporary() -> Check:
    folder = Path(tempfile.gettempdir())
    usable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    free = shutil.disk_usage(folder).free if usable else 0
    found = f"{folder}, {size(free)} free" if usable else f"{folder} cannot be written in"
    return _judged(
        "temporary", usable and free > 64 << 20, found, "64 MB in a writable folder", "set TMPDIR to such a folder"
    )


def _home() -> Check:
    """Libraries below (numba, matplotlib, torch) keep caches there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    good = place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return _judged(
        "cache",
        good,
        f"{folder}{'' if good else ' cannot be written in'}",
        "a writable folder",
        "set XDG_CACHE_HOME to one",
    )


def _language() -> Check:
    found = {sys.getfilesystemencoding().lower(), locale.getpreferredencoding(False).lower()}
    good = found <= {"utf-8", "utf8"}
    return _judged(
        "encoding",
        good,
        ", ".join(sorted(found)),
        "utf-8, for names and recipes",
        "export LC_ALL=C.UTF-8 (or PYTHONUTF8=1)",
    )


def _clock() -> Check:
    """A clock behind the installation's own files makes leases look live for ever."""
    now, installed = time.time(), Path(__file__).stat().st_mtime
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    return _judged("clock", now > installed - 3600, stamp, "later than this installation", "set the clock")


def _local_ports() -> Check:
    """A local Dask cluster talks over them."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
    except OSError as error:
        return Check(
            "local ports",
            "BAD",
            f"127.0.0.1: {error.strerror}",
            "a free port, for workers",
            "--set workers=0 runs without",
        )
    return Check("local ports", "ok", "workers can be reached on 127.0.0.1")


MACHINE_CHECKS: tuple[Callable[[], Check], ...] = (
    _memory, _disk, _shm, _files, _temporary, _home, _language, _clock, _local_ports,
)  # fmt: skip
