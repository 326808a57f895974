"""Which rows a repair has made again: of the whole repair, however many calls and kills it took."""

from __future__ import annotations

import json
import os
from pathlib import Path

from shared.artifact import full_disk_is_named

NOTES = "run/made-again.jsonl"
"""A line each; no part of the artifact."""
_LINE_BYTES = 1 << 12


def note(out: Path, sample_id: str, as_published: bool) -> None:
    """Say that a row has been made again; call it before the row is kept, so that no kill leaves one uncounted.

    Args:
        out: Folder of the new store.
        sample_id: The row's; one that is tried again is noted twice, and counts once.
        as_published: Whether it came out, to the bit, as it was published.

    Raises:
        DiskFullError: No room.
    """
    line = json.dumps({"sample_id": sample_id, "as_published": as_published})
    with full_disk_is_named(out, _LINE_BYTES), (out / NOTES).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")  # first the end of a line that a kill may have torn
        file.flush()
        os.fsync(file.fileno())


def read_notes(out: Path) -> dict[str, bool]:
    """Sample -> whether it came out as it was published."""
    again: dict[str, bool] = {}
    if (out / NOTES).exists():
        for line in (out / NOTES).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                told = json.loads(line)
                again[told["sample_id"]] = bool(told["as_published"])
            except (ValueError, KeyError, TypeError):  # torn: its row was not kept, and is made once more
                continue
    return again
