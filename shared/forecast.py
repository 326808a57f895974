"""What a dry run says: whether the inputs fit, and what the run would cost, with how each figure was got.

Figures come from a rehearsal: a little of the real work, done in this process and thrown away.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.artifact import CARD
from shared.errors import LockedError
from shared.lease import lease_holder
from shared.runlog import duration
from shared.workspace import refuse_unwritable


@dataclass(frozen=True)
class Forecast:
    """What the same command without ``--dry-run`` would do.

    Attributes:
        out: Its folder.
        standing: ``new``, ``continue`` or ``done``.
        inputs: Name -> what was found.
        seconds: Wall time, estimated; 0 where the run is done.
        disk_bytes: Size of the finished folder, estimated.
        memory_bytes: Peak of all processes, estimated.
        how: How ``time``, ``disk`` and ``memory`` were got.
        warnings: What the reader should act upon.
    """

    out: Path
    standing: str
    inputs: Mapping[str, str]
    seconds: float = 0.0
    disk_bytes: int = 0
    memory_bytes: int = 0
    how: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def lines(self) -> list[str]:
        """For a person."""
        told = {
            "new": "new",
            "continue": "an unfinished run of these settings: it would be continued",
            "done": "already done: the same command would do nothing",
        }
        rows = [*self.inputs.items(), (f"out {self.out}", told[self.standing])]
        if self.standing != "done":
            rows += [
                ("time", f"about {duration(self.seconds)}: {self.how['time']}"),
                ("disk", f"about {size(self.disk_bytes)}: {self.how['disk']}"),
                ("memory", f"about {size(self.memory_bytes)}: {self.how['memory']}"),
            ]
        return [f"{name}: {text}" for name, text in rows] + [f"warning: {text}" for text in self.all_warnings()]

    def all_warnings(self) -> list[str]:
        """Those of the inputs, and whether disk and memory of this machine suffice."""
        found = list(self.warnings)
        if self.standing == "done":
            return found
        free, memory = free_bytes(self.out), machine_bytes()
        if self.disk_bytes > free:
            found.append(f"disk: {size(self.disk_bytes)} are needed, {size(free)} are free")
        if memory is not None and self.memory_bytes > memory:
            found.append(f"memory: {size(self.memory_bytes)} are needed, this machine has {size(memory)}")
        return found

    def tried_with(self, images: int, of: int) -> Forecast:
        """The same, which says so where a trial had fewer images a step than the run will have."""
        if images == of:
            return self
        few = f"of {of} images a step {images} were tried and multiplied, as whole steps take long here"
        how = {**self.how, "time": f"{self.how['time']}; {few}"}
        return replace(self, how=how, warnings=[*self.warnings, f"memory: of the trial, whole steps need more; {few}"])

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "standing": self.standing,
            "inputs": dict(self.inputs),
            "seconds": round(self.seconds, 3),
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "how": dict(self.how),
            "warnings": self.all_warnings(),
        }


def refuse_unusable(out: Path) -> None:
    """Raise where a run could not take ``out`` now.

    Raises:
        UsageError: It cannot be made or written in.
        LockedError: A live process writes in it.
    """
    refuse_unwritable(out)
    holder = lease_holder(out)
    if holder is not None:
        raise LockedError(f"{out}: process {holder} is writing here", hint="wait for it, or stop it")


def kept_aside(out: Path, fresh: bool) -> bool:
    """Whether ``--fresh`` would move something away first, so that the run begins anew."""
    return fresh and out.is_dir() and ((out / CARD).exists() or (out / "run").is_dir())


def peak_bytes() -> int:
    """Most memory that this process has held so far."""
    with contextlib.suppress(OSError):  # Linux; getrusage there begins with what the parent held when it forked
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_bytes() -> int | None:
    """Memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def free_bytes(folder: Path) -> int:
    """Free disk where ``folder`` is, or would be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size(count: float) -> str:
    """Bytes for people.

    >>> [size(count) for count in (900, 1500, 45_600_000, 7.2e9)]
    ['900 B', '2 kB', '46 MB', '7.2 GB']
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}" if unit == "GB" else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spaced: the first images of a corpus look alike.

    >>> spread(10, 3), spread(2, 3)
    ([1, 5, 8], [0, 1])
    """
    most = min(count, most)
    return [(2 * index + 1) * count // (2 * most) for index in range(most)]
