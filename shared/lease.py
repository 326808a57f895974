"""One writer a folder: an exclusive lease with a heartbeat, and what a folder's next run should do."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from shared.errors import LockedError

LEASE = "lease.json"
_HEARTBEAT_S = 10.0
_STALE_S = 120.0


class Lease:
    """Exclusive right to write in a folder, as a context manager.

    A lease left by a dead process of this boot and pid namespace is taken over at once; one from another
    machine, boot or container after two minutes without a heartbeat.

    Args:
        folder: Created if absent.

    Raises:
        LockedError: Another live process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEASE
        self._nonce = secrets.token_hex(16)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(8):
            try:
                self._create()
            except FileExistsError:
                self._remove_if_dead()
                continue
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
            return self
        raise LockedError(f"{self.path.parent}: another writer took the lease")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join()
        finally:  # also when a second signal comes while the thread ends
            if self._is_ours():
                self.path.unlink(missing_ok=True)

    def _create(self) -> None:
        """Make the file with its content at once: a kill between the two would lock the folder for seconds."""
        pid = os.getpid()
        body = json.dumps({"pid": pid, "started": _start_time(pid), "boot": _boot_id(), "nonce": self._nonce})
        draft = self.path.with_name(f".{LEASE}.{self._nonce}.tmp")
        try:
            draft.write_text(body)
            try:
                os.link(draft, self.path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                with self.path.open("x") as file:
                    file.write(body)
        finally:
            draft.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_S):
            with suppress(OSError):  # a file server that is away for a moment; the next beat tries again
                if not self._is_ours():
                    return
                os.utime(self.path)

    def _is_ours(self) -> bool:
        """Whether the lease there is this one: after long silence, e.g. of a laptop asleep, another may have it."""
        try:
            body = json.loads(self.path.read_bytes())
        except (FileNotFoundError, ValueError):
            return False
        return isinstance(body, dict) and body.get("nonce") == self._nonce

    def _remove_if_dead(self) -> None:
        # The folder is locked meanwhile: else, of two processes that find a lease dead, the slower one
        # could remove the lease that the faster one has just taken.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            holder = lease_holder(self.path.parent)
            if holder is not None:
                raise LockedError(
                    f"{self.path.parent}: process {holder} is writing here",
                    hint="wait for it, or stop it; the same command then continues",
                )
            self.path.unlink(missing_ok=True)
        finally:
            os.close(folder)


def lease_holder(folder: Path) -> int | None:
    """The pid of the live process that writes in ``folder``, or None."""
    path = folder / LEASE
    try:
        text = path.read_text()
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        lease: dict[str, Any] = json.loads(text)
        pid = int(lease["pid"])
    except (ValueError, KeyError, TypeError):
        # Created an instant ago and not written yet, or torn by a crash.
        return -1 if age_s < 5 else None
    if lease.get("boot") == _boot_id():
        return pid if _start_time(pid) == lease.get("started") else None
    return pid if age_s < _STALE_S else None


def _boot_id() -> str:
    """Where a pid means the same process: a boot, and in it a pid namespace; containers share the first only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"
    try:
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return boot


def _start_time(pid: int) -> str | None:
    """Start of a process in clock ticks: tells a reused pid from the process that took the lease."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if Path("/proc/self").exists() else "unknown"
    return None if fields[0] == "Z" else fields[19]
