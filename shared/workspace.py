"""A run's folder before it is an artifact: new, to be continued, done, or somebody else's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import rfc8785

from shared.artifact import CARD, Card, Input, fsync_folder, read_card, spec_digest, write_atomic
from shared.errors import CorruptError, SpecMismatchError, UsageError
from shared.lease import LEASE, lease_holder

SPEC = "run/spec.json"


RESOLVED = "resolved.yaml"
"""What ran, every setting spelled out."""


def begin(
    out: Path,
    *,
    kind: str,
    inputs: Sequence[Input],
    spec: Mapping[str, Any],
    resolved: str,
    fresh: bool = False,
    has_fresh: bool = True,
) -> tuple[Literal["new", "continue", "done"], Card | None]:
    """Decide what the same command does in this folder; call it while holding the folder's lease.

    Args:
        out: The run's folder.
        kind: Kind of artifact that it will hold.
        inputs: Artifacts read.
        spec: What decides the results.
        resolved: Content of ``resolved.yaml``, rewritten unless done.
        fresh: The caller has asked for a new run; `set_aside` must have been called before the lease.
        has_fresh: The command has ``--fresh``, so that hints may name it.

    Returns:
        ``("new" | "continue", None)`` or ``("done", card)``.

    Raises:
        SpecMismatchError: The folder holds a run of another specification; names the keys that differ.
        CorruptError: The folder's record of its run is damaged.
        UsageError: The folder holds something that is not a run.
    """
    status, card = look(out, kind=kind, inputs=inputs, spec=spec, has_fresh=has_fresh)
    if status == "done":
        return status, card
    (out / "run").mkdir(exist_ok=True)
    for folder in (out, out.resolve().parent):  # else a power cut could take away all that is synced in them
        fsync_folder(folder)
    # First of all, and its draft below run/ too: a kill from here on leaves a folder that is known for a run.
    write_atomic(out / SPEC, rfc8785.dumps(_wanted(kind, inputs, spec)))
    write_atomic(out / RESOLVED, resolved.encode())
    return status, None


def look(
    out: Path, *, kind: str, inputs: Sequence[Input], spec: Mapping[str, Any], has_fresh: bool = True
) -> tuple[Literal["new", "continue", "done"], Card | None]:
    """What `begin` would decide, without writing; arguments, result and errors are its own.

    Raises:
        UsageError: Also where the folder cannot be made or written in.
    """
    refuse_inside_artifact(out)
    wanted = _wanted(kind, inputs, spec)
    if (out / CARD).exists():
        card = read_card(out, kind)
        if card.spec_digest != spec_digest(inputs, spec):
            identity = card.identity.model_dump(mode="json")
            refuse_other(out, {key: identity[key] for key in ("kind", "inputs", "spec")}, wanted, has_fresh)
        return "done", card
    refuse_unwritable(out)
    if (out / SPEC).exists():
        found = _read_spec(out, has_fresh)
        if rfc8785.dumps(found) != rfc8785.dumps(wanted):
            refuse_other(out, found, wanted, has_fresh)
        return "continue", None
    if out.is_dir() and any(path.name not in (LEASE, "run") for path in out.iterdir() if not _draft(path)):
        raise UsageError(f"{out}: not empty, and not a run of mwm", hint="name another folder with --out")
    return "new", None


def _draft(path: Path) -> bool:
    """What a kill leaves of a file that was being written, and `publish` clears away."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def refuse_inside_artifact(out: Path) -> None:
    """Raise UsageError where ``out``, a file or a folder to be written, lies inside a published artifact."""
    for parent in out.resolve().parents:
        if (parent / CARD).exists():
            raise UsageError(f"{out}: lies inside the published artifact {parent}", hint="name a place outside of it")


def refuse_unwritable(out: Path) -> None:
    """Raise UsageError where ``out`` is a file, or a folder that this user can neither make nor write in."""
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"{place}: a file, expected a folder", hint="name another folder with --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{place}: this user may not write here", hint="name another folder with --out")


def _read_spec(out: Path, has_fresh: bool) -> dict[str, Any]:
    try:
        found = json.loads((out / SPEC).read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptError(
            f"{out}: {SPEC} is not what a run wrote there",
            hint=f"restore it from a copy, or {_anew(has_fresh)}",
        )
    return found


def _wanted(kind: str, inputs: Sequence[Input], spec: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "inputs": [item.model_dump() for item in inputs], "spec": dict(spec)}


def set_aside(out: Path) -> Path | None:
    """Move an existing run out of the way for ``--fresh``; nothing is deleted.

    Returns:
        Where it was moved, or None if there was nothing.

    Raises:
        UsageError: A live writer holds the folder.
    """
    if not out.exists():
        return None
    out = out.resolve()
    for folder in (out, *(path.parent for path in out.glob(f"*/{LEASE}"))):
        holder = lease_holder(folder)
        if holder is not None:
            raise UsageError(f"{folder}: process {holder} is writing here; --fresh would pull it away")
    if not all(map(_draft, out.iterdir())) and not (out / CARD).exists() and not (out / "run").is_dir():
        raise UsageError(f"{out}: not a run of mwm; --fresh would move it away", hint="name another folder with --out")
    number = 1
    while (aside := out.with_name(f"{out.name}.old-{number}")).exists():
        number += 1
    os.rename(out, aside)
    return aside


def _anew(has_fresh: bool) -> str:
    return "--fresh to keep the folder aside and start anew" if has_fresh else "name another folder with --out"


def refuse_other(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], has_fresh: bool) -> NoReturn:
    """Raise SpecMismatchError for a folder that holds another run; names the keys that differ."""
    keys = sorted(_differing(found, wanted, ""))
    shown = ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
    raise SpecMismatchError(
        f"{out}: holds a run of another specification; differing: {shown}",
        hint="name another folder with --out" + (f", or {_anew(True)}" if has_fresh else ""),
    )


def _differing(found: Any, wanted: Any, path: str) -> set[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        names = set(found) | set(wanted)
        return {
            key
            for name in names
            for key in _differing(found.get(name), wanted.get(name), f"{path}.{name}" if path else str(name))
        }
    return set() if found == wanted else {f"{path} ({found!r} there, {wanted!r} asked)"[:160]}
