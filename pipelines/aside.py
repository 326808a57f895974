"""A folder that appears whole or not at all: made aside, renamed in last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.artifact import fsync_folder
from shared.errors import LockedError, UsageError
from shared.lease import LEASE, Lease
from shared.workspace import refuse_inside_artifact, refuse_unwritable

_ASIDE = ".export"
_WHOLE = "whole"


def refuse_taken(out: Path) -> None:
    """Raise UsageError where ``out`` cannot become the folder: a file, not empty, or inside an artifact."""
    refuse_inside_artifact(out)
    refuse_unwritable(out)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out}: not empty", hint="name another folder with --out")


@contextmanager
def made_aside(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that takes its place at the end; what kills left beside it is cleared away.

    Raises:
        LockedError: Another process is making the same folder.
    """
    out = Path(os.path.realpath(out))
    _clear_remains(out.parent)
    aside = out.with_name(f".{out.name}{_ASIDE}")
    try:
        with Lease(aside):
            whole = aside / _WHOLE
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir()
            try:
                yield whole
                fsync_folder(whole)
                os.rename(whole, out)
                fsync_folder(out.parent)
            finally:
                shutil.rmtree(whole, ignore_errors=True)
    finally:
        with suppress(OSError):  # another export to the same place holds it, or has removed it
            aside.rmdir()


def _clear_remains(parent: Path) -> None:
    """Remove what exports that were killed have left in a folder, under whatever name they were to appear."""
    for aside in parent.glob(f".*{_ASIDE}"):
        if not (aside / LEASE).is_file() or any(path.name not in (LEASE, _WHOLE) for path in aside.iterdir()):
            continue  # not made here, or being made at this moment
        with suppress(LockedError, OSError):
            with Lease(aside):
                shutil.rmtree(aside / _WHOLE, ignore_errors=True)
            aside.rmdir()
