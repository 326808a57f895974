"""A folder that appears whole or not at all: made aside, renamed in last."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.artifact import fsync_folder
from shared.errors import UsageError
from shared.lease import Lease
from shared.workspace import refuse_inside_artifact, refuse_unwritable


def refuse_taken(out: Path) -> None:
    """Raise UsageError where ``out`` cannot become the folder: a file, not empty, or inside an artifact."""
    refuse_inside_artifact(out)
    refuse_unwritable(out)
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out}: not empty", hint="name another folder with --out")


@contextmanager
def made_aside(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that takes its place at the end; what a kill left there is cleared away.

    Raises:
        LockedError: Another process is making the same folder.
    """
    out = Path(os.path.realpath(out))
    aside = out.with_name(f".{out.name}.export")
    try:
        with Lease(aside):
            whole = aside / "whole"
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
