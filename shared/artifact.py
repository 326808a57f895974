"""Artifacts: folders that are published once, by a card renamed in last, and never edited.

A folder without ``artifact.json`` is no artifact. The id of an artifact is a digest of what it is (kind,
inputs, specification, outputs), never of when, where or how long.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rfc8785
from pydantic import Field, ValidationError

from shared.config import Strict
from shared.errors import CorruptError, DiskFullError, IncompatibleError, InputMissingError, LockedError, UsageError
from shared.lease import lease_holder

CARD = "artifact.json"
KIND_VERSIONS = {
    "corpus": (1, 0),
    "region-store": (1, 0),
    "head": (1, 0),
    "encoder": (1, 0),
    "model": (1, 0),
    "study": (1, 0),
    "audit-report": (1, 0),
}
"""Kind -> (major, minor) that this release writes. It reads the same major and no newer minor."""

_CARD_BYTES_MAX = 64 << 20
_PIN_MIN = 12
NOT_FOR_DIAGNOSIS = "Research software. Not for diagnosis."


class Input(Strict):
    """An artifact that another one was made from."""

    role: str
    kind: str
    artifact_id: str


class Identity(Strict):
    """What an artifact is: everything its id is computed from. Holds no float, time, host or path."""

    kind: str
    kind_version: str
    inputs: tuple[Input, ...] = ()
    spec: dict[str, Any]
    outputs: dict[str, Any]


class Provenance(Strict):
    """How an artifact came to be; outside its id."""

    created: str = Field(description="UTC time, ISO 8601.")
    tool: str
    command: str = Field(description="Command line with paths replaced by placeholders.")
    environment: dict[str, str]
    supersedes: str | None = None
    files: dict[str, str] = Field(description="sha256 of every published file but the Zarr chunks.")
    notice: str = NOT_FOR_DIAGNOSIS
    metrics: dict[str, Any] = Field(default_factory=dict, description="Numbers of interest; never identity.")


class Card(Strict):
    """The content of ``artifact.json``."""

    artifact_id: str
    identity: Identity
    provenance: Provenance
    card_sha256: str

    @property
    def spec_digest(self) -> str:
        """Digest of inputs and specification, known before a run."""
        return spec_digest(self.identity.inputs, self.identity.spec)


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` found wrong: the file (relative to the artifact) and what is the matter."""

    file: str
    problem: str


@dataclass(frozen=True)
class Artifact:
    """A published folder and its card."""

    path: Path
    card: Card


def spec_digest(inputs: Sequence[Input], spec: Mapping[str, Any]) -> str:
    """sha256 of the RFC 8785 JSON of ``{inputs, spec}``: alone decides continue, done or refused."""
    return _sha256(rfc8785.dumps({"inputs": [item.model_dump() for item in inputs], "spec": dict(spec)}))


def publish(
    folder: Path,
    *,
    kind: str,
    inputs: Sequence[Input],
    spec: Mapping[str, Any],
    outputs: Mapping[str, Any],
    command: str = "",
    metrics: Mapping[str, Any] | None = None,
    supersedes: str | None = None,
) -> Card:
    """Turn a finished folder into an artifact: digest its files, then rename the card in.

    Args:
        folder: Complete but for its card.
        kind: A key of `KIND_VERSIONS`.
        inputs: What it was made from.
        spec: Float-free JSON that decides the results.
        outputs: Float-free JSON: counts and digests.
        command: Command line with paths replaced by placeholders.
        metrics: Numbers worth showing; kept out of the id.
        supersedes: Artifact id this one replaces.

    Returns:
        The published card.

    Raises:
        UsageError: The folder is already published; artifacts are never edited.
        DiskFullError: No room for the card, or for what other writers left unwritten.
    """
    if (folder / CARD).exists():
        raise UsageError(f"{folder}: already published; artifacts are never edited")
    for leftover in folder.glob("**/.*.tmp"):  # a kill in `write_atomic`; the file was then written anew
        leftover.unlink()
    files = {name: file_sha256(folder / name) for name in published_files(folder, kind)}
    major, minor = KIND_VERSIONS[kind]
    identity = Identity(
        kind=kind, kind_version=f"{major}.{minor}", inputs=tuple(inputs), spec=dict(spec), outputs=dict(outputs)
    )
    provenance = Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tool=f"mwm {_version('mask-what-matters')}",
        command=command,
        environment={name: _version(name) for name in ("torch", "timm", "zarr", "numpy", "dask")},
        supersedes=supersedes,
        files=files,
        metrics=dict(metrics or {}),
    )
    body: dict[str, Any] = {
        "artifact_id": _sha256(rfc8785.dumps(identity.model_dump(mode="json"))),
        "identity": identity.model_dump(mode="json"),
        "provenance": provenance.model_dump(mode="json"),
    }
    body["card_sha256"] = _sha256(rfc8785.dumps(body))
    _make_durable(folder, files)
    write_atomic(folder / CARD, rfc8785.dumps(body))
    return Card.model_validate(body)


def read_card(folder: Path, kind: str | None = None) -> Card:
    """Read and check the card of a published artifact.

    Args:
        folder: The artifact.
        kind: The kind expected, or None for any.

    Raises:
        InputMissingError: No such folder.
        LockedError: Unpublished, and a live writer holds its lease.
        IncompatibleError: Unpublished, of another kind, or whole but of a version this release cannot read.
        CorruptError: The card was changed since it was published. ``card_sha256`` means the same in every kind and
            version, so damage never passes for a newer release.
    """
    path = folder / CARD
    if not folder.is_dir():
        raise InputMissingError(f"{folder}: no such artifact folder")
    if not path.is_file():
        holder = lease_holder(folder)
        if holder is not None:
            raise LockedError(f"{folder}: being written by process {holder}", hint="wait until it is published")
        raise IncompatibleError(f"{folder}: not published: it has no {CARD}", hint="finish the run that writes it")
    raw = _bytes(path)
    body = _parse(path, raw)
    # Before anything on the card is believed, its version included: a damaged one is no newer release's.
    if not _sealed(body, raw):
        raise CorruptError(f"{path}: changed since it was published", hint="restore the artifact from a copy")
    _check_version(folder, body, kind)
    try:
        card = Card.model_validate(body)
    except ValidationError as error:
        raise CorruptError(f"{path}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None
    if _sha256(rfc8785.dumps(body["identity"])) != card.artifact_id:
        raise CorruptError(f"{path}: its id does not belong to its content")
    return card


def open_artifact(reference: str | Path, kind: str) -> tuple[Path, Card]:
    """Open an input given as ``PATH[@sha256:...]``.

    Raises:
        IncompatibleError: Unpublished, another kind, or not the pinned digest.
        InputMissingError, LockedError, CorruptError: As `read_card`.
    """
    text, pin_mark, pin = str(reference).partition("@sha256:")
    card = read_card(Path(text), kind)
    if pin_mark and len(pin) < _PIN_MIN:
        raise UsageError(f"{reference}: a pin has at least {_PIN_MIN} hexadecimal digits, found {len(pin)}")
    if not card.artifact_id.startswith(pin):
        raise IncompatibleError(f"{text}: artifact id sha256:{card.artifact_id[:16]}..., pinned sha256:{pin[:16]}...")
    return Path(text), card


def find_beside(folder: Path, artifact_id: str) -> Path | None:
    """The artifact of an id among the folders beside this one; its card is read, not checked."""
    for card in sorted(folder.resolve().parent.glob(f"*/{CARD}")):
        try:
            body = json.loads(_bytes(card))
        except (OSError, ValueError, RecursionError):
            continue  # a damaged neighbour is not looked for
        if isinstance(body, dict) and body.get("artifact_id") == artifact_id:
            return card.parent
    return None


def verify(folder: Path, card: Card) -> list[Finding]:
    """Compare every published file with the card: changed, missing and unlisted ones are findings."""
    found = []
    listed = card.provenance.files
    present = set(published_files(folder, card.identity.kind))
    for name in sorted(set(listed) | present):
        if name not in present:
            found.append(Finding(name, "missing"))
        elif name not in listed:
            found.append(Finding(name, "not listed on the card"))
        elif file_sha256(folder / name) != listed[name]:
            found.append(Finding(name, "changed since it was published"))
    return found


def published_files(folder: Path, kind: str) -> Iterator[str]:
    """Relative posix paths of what a card lists: not itself, ``run/``, the lease, nor a region store's Zarr chunks."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        top = name.split("/", 1)[0]
        if top == "run" or name in (CARD, "lease.json") or not (path.is_file() or path.is_symlink()):
            continue
        if kind == "region-store" and top == "regions.zarr" and path.name != "zarr.json":
            continue
        yield name


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    if path.is_symlink():
        return "symlink"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that a reader, or a power cut, sees the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with full_disk_is_named(path.parent, len(data) if isinstance(data, bytes) else 1 << 20):
        try:
            with temporary.open("wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk its room is needed
            raise
        os.replace(temporary, path)
        fsync_folder(path.parent)


@contextmanager
def full_disk_is_named(folder: Path, wanted_bytes: int) -> Iterator[None]:
    """Turn a full disk into the error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{folder}: disk full, {wanted_bytes} bytes more were needed",
            hint="make room, then run the same command: it continues",
        ) from None


def refuse_without_room(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskFullError before anything is computed for which there is no room in the end."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskFullError(
            f"{folder}: about {needed_bytes} bytes are needed for {what}, {free} are free",
            hint="make room, then run the same command",
        )


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_durable(folder: Path, names: Iterable[str]) -> None:
    """Bring files and their folders to disk: a power cut must not leave a card without what it lists."""
    folders = {folder}
    for name in names:
        path = folder / name
        folders.update(folder / parent for parent in Path(name).parents)
        if not path.is_symlink():
            with full_disk_is_named(path.parent, path.stat().st_size), path.open("rb") as file:
                os.fsync(file.fileno())
    for inner in sorted(folders, reverse=True):
        fsync_folder(inner)


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > _CARD_BYTES_MAX:
        raise CorruptError(f"{path}: {path.stat().st_size} bytes, a card has at most {_CARD_BYTES_MAX}")
    return path.read_bytes()


def _sealed(body: Mapping[str, Any], raw: bytes) -> bool:
    """Whether a card of any kind and version is as it was written: RFC 8785, under the digest of its other fields."""
    rest = {key: value for key, value in body.items() if key != "card_sha256"}
    try:
        return _sha256(rfc8785.dumps(rest)) == body.get("card_sha256") and rfc8785.dumps(body) == raw
    except (ValueError, RecursionError):  # numbers or text that RFC 8785 cannot hold, or nested too deep
        return False


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise CorruptError(f"{path}: not JSON", hint="restore the artifact from a copy") from None
    if not isinstance(body, dict):
        raise CorruptError(f"{path}: expected a JSON object")
    return body


def _check_version(folder: Path, body: dict[str, Any], kind: str | None) -> None:
    identity = body.get("identity")
    found = identity.get("kind") if isinstance(identity, dict) else None
    version = str(identity.get("kind_version")) if isinstance(identity, dict) else ""
    if not isinstance(found, str):
        raise CorruptError(f"{folder / CARD}: has no identity", hint="restore the artifact from a copy")
    if found not in KIND_VERSIONS:
        raise IncompatibleError(f"{folder}: unknown artifact kind {found!r}")
    if kind is not None and found != kind:
        raise IncompatibleError(f"{folder}: found kind '{found}', expected kind '{kind}'")
    major, minor = KIND_VERSIONS[found]
    try:
        its_major, its_minor = (int(part) for part in version.split("."))
    except ValueError:
        raise CorruptError(f"{folder}: kind_version {version!r}") from None
    if its_major != major or its_minor > minor:
        raise IncompatibleError(f"{folder}: {found} {version}; this release reads {major}.0 to {major}.{minor}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "absent"
