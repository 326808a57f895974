"""States that a run resumes from: safetensors and JSON, renamed in whole, digested, the last few kept.

No pickle is ever written or read. A folder of states looks like::

    state.json               beside it: the step of the newest state that was saved
    state/step-00000120/     tensors.safetensors, state.json (meta and the digests of both)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.artifact import file_sha256, fsync_folder, write_atomic
from shared.errors import CorruptError, DiskFullError

if TYPE_CHECKING:
    import torch

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")


def save_state(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Save a state so that a kill or a power cut leaves it whole or absent.

    Args:
        folder: Home of the states, created if absent.
        step: Steps done, from 0; a state of the same step is replaced.
        tensors: Any devices and strides; stored contiguous.
        meta: JSON; floats come back to the bit.
        keep: Newest states to keep, at least 1.

    Returns:
        The folder of this state.

    Raises:
        DiskFullError: With the bytes needed; older states are untouched.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    draft = folder / f".{target.name}.draft"
    for torn in folder.glob(".step-*.draft"):  # of a run that was killed while it saved
        shutil.rmtree(torn, ignore_errors=True)
    # Clones: two names may share storage, which safetensors refuses.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        draft.mkdir()
        save_file(plain, draft / _TENSORS)
        _fsync(draft / _TENSORS)
        body = {"step": step, "meta": dict(meta), "tensors_sha256": file_sha256(draft / _TENSORS)}
        write_atomic(draft / _STATE, _dump({**body, "sha256": _digest(body)}))
        fsync_folder(draft)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(draft, target)
        fsync_folder(folder)
        write_atomic(_marker(folder), _dump({"step": step}))
    except Exception as error:  # safetensors wraps the OSError of a full disk in its own class
        shutil.rmtree(draft, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            size = sum(value.numel() * value.element_size() for value in plain.values())
            raise DiskFullError(
                f"{folder.name}: disk full; a state of step {step} needs {size} bytes",
                hint="free some space and run the same command again: it continues",
            ) from error
        raise
    for old in _states(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest_state(
    folder: Path, warn: Callable[[str], None] = lambda text: None
) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]] | None:
    """Load the newest state that is whole.

    Args:
        folder: Home of the states.
        warn: Told of every newer state that was broken or is gone.

    Returns:
        ``(step, tensors, meta)``, or None where no state was ever saved.

    Raises:
        CorruptError: States were saved, and none of them is usable: never a silent new run.
    """
    from safetensors.torch import load

    states = _states(folder)
    saved = states[-1:] or _marker(folder).exists()
    for path in reversed(states):
        try:
            body = json.loads((path / _STATE).read_bytes())
            digest = body.pop("sha256")
            data = (path / _TENSORS).read_bytes()
            if _digest(body) != digest or hashlib.sha256(data).hexdigest() != body["tensors_sha256"]:
                raise ValueError("its digest does not match")
            tensors = load(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = "a file is missing" if isinstance(error, OSError) else "not what was saved"
            warn(f"state {path.name} is broken ({reason}); trying the one before")
            continue
        newest = _newest(folder)
        if newest is not None and body["step"] < newest:
            warn(f"resuming from step {body['step']}; step {newest} had been saved: {newest - body['step']} steps lost")
        return body["step"], tensors, body["meta"]
    if saved:
        raise CorruptError(
            f"{folder.name}: states were saved here, and none is usable",
            hint="restore run/ from a copy, or --fresh to keep it aside and start anew",
        )
    return None


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _marker(folder: Path) -> Path:
    """Outlives the folder of states, so that its loss is noticed."""
    return folder.with_name(f"{folder.name}.json")


def _newest(folder: Path) -> int | None:
    try:
        return int(json.loads(_marker(folder).read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dump(value)).hexdigest()


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
