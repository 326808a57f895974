"""The corpus artifact: which samples, from which bytes; no pixels.

Its identity is the ids, groups and sha256 of the source files: the same images and ids give the same id
wherever they lie. Decoding is not part of it, so it is known before the first image is decoded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import rfc8785

from shared.artifact import CARD, KIND_VERSIONS, Card, Identity, open_artifact, publish, write_atomic
from shared.canonical import canonical_json
from shared.errors import CorruptError, InputMissingError
from shared.images import Source

SAMPLES = "samples.jsonl"
_HASHING_THREADS = 4
_HASHED_AT_ONCE = 4096
"""Files handed to the threads at a time: a million that wait would cost a gigabyte."""


@dataclass(frozen=True, slots=True)
class CorpusRow:
    """One sample of a corpus; its place in the sorted list is its row everywhere downstream."""

    sample_id: str
    source_sha256: str
    slice_index: int | None = None
    group: str | None = None


def list_corpus(sources: Sequence[Source]) -> list[CorpusRow]:
    """Digest the files behind ``sources``, each file once; rows in the order of the sample ids.

    Raises:
        InputMissingError: A file vanished since it was listed.
    """
    names = {str(source.path): source.sample_id for source in reversed(sources)}
    digests: dict[str, str] = {}
    files = iter(names.items())
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        while some := list(islice(files, _HASHED_AT_ONCE)):
            digests |= zip((path for path, _ in some), pool.map(_sha256_of, some), strict=True)
    rows = (CorpusRow(s.sample_id, digests[str(s.path)], s.slice_index, s.group) for s in sources)
    return sorted(rows, key=lambda row: row.sample_id)


def corpus_id(rows: Sequence[CorpusRow]) -> str:
    """The artifact id that `write_corpus` will publish, without writing anything."""
    major, minor = KIND_VERSIONS["corpus"]
    identity = Identity(kind="corpus", kind_version=f"{major}.{minor}", spec=_SPEC, outputs=_outputs(_lines(rows)))
    return hashlib.sha256(rfc8785.dumps(identity.model_dump(mode="json"))).hexdigest()


def write_corpus(folder: Path, rows: Sequence[CorpusRow], *, command: str = "") -> Card:
    """Publish the corpus artifact in a folder of its own; what an interrupted attempt left there is removed.

    Args:
        folder: Created; must not be published yet.
        rows: Sorted by sample id, as `list_corpus` returns them.
        command: Command line with paths replaced by placeholders.
    """
    if folder.exists() and not (folder / CARD).exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CARD).exists():
        write_atomic(folder / SAMPLES, _lines(rows))
    return publish(folder, kind="corpus", inputs=(), spec=_SPEC, outputs=_outputs(_lines(rows)), command=command)


def open_corpus(reference: str | Path) -> tuple[Card, list[CorpusRow]]:
    """Read a published corpus, given as ``PATH[@sha256:...]``.

    Raises:
        CorruptError: ``samples.jsonl`` is not what was published.
        IncompatibleError, InputMissingError, LockedError: As `shared.artifact.open_artifact`.
    """
    folder, card = open_artifact(reference, "corpus")
    try:
        lines = (folder / SAMPLES).read_bytes()
    except FileNotFoundError:
        raise CorruptError(f"{folder / SAMPLES}: missing") from None
    if _outputs(lines.splitlines(keepends=True)) != card.identity.outputs:
        raise CorruptError(f"{folder / SAMPLES}: changed since it was published", hint="restore it from a copy")
    rows = []
    for line in lines.splitlines():
        fields = json.loads(line)
        fields.pop("row")
        rows.append(CorpusRow(**fields))
    return card, rows


_SPEC: dict[str, Any] = {"rows": "sorted by sample_id", "ids": "NFC", "digest": "sha256 of the source file"}


def _lines(rows: Sequence[CorpusRow]) -> Iterator[bytes]:
    for number, row in enumerate(rows):
        body = {
            "row": number,
            "sample_id": row.sample_id,
            "source_sha256": row.source_sha256,
            "slice_index": row.slice_index,
            "group": row.group,
        }
        yield canonical_json(body) + b"\n"


def _outputs(lines: Iterable[bytes]) -> dict[str, Any]:
    count, digest = 0, hashlib.sha256()
    for line in lines:
        count += line.endswith(b"\n")
        digest.update(line)
    return {"count": count, "samples_sha256": digest.hexdigest()}


def _sha256_of(named: tuple[str, str]) -> str:
    path, sample_id = named
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise InputMissingError(f"image {sample_id}: vanished while the corpus was listed") from None
