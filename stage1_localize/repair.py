"""`repair` and `migrate`: a damaged or an older store in, a new whole one out; the old one is left as it is.

Rows that are still what was published are copied to the bit; the others are computed again. If all of these come
out as they were published, the new store has the old one's id.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.artifact import CARD, KIND_VERSIONS, Card, file_sha256, publish, read_card, verify, write_atomic
from shared.corpus import corpus_id, list_corpus, write_corpus
from shared.errors import (
    CorruptError,
    IncompatibleError,
    InterruptedRun,
    QuarantineError,
    SpecMismatchError,
    UsageError,
)
from shared.images import find_sources
from shared.lease import Lease
from shared.region_journal import ShardJournal
from shared.region_layout import QUARANTINE, SAMPLES
from shared.region_record import Sample, detections_digest
from shared.region_verify import verify_store
from shared.region_writer import FINISHED, assemble_shard, create_store, drop_journal, finalise, pending_shards
from shared.regions import RegionStore, SampleRow, open_region_store
from shared.runlog import RunLog
from shared.signals import Signals
from shared.workspace import RESOLVED, begin
from stage1_localize.made_again import note, read_notes
from stage1_localize.recompute import Made, Recomputer, same

REPORT = "report.html"
ORIGIN = "run/origin"
"""Id of the store that this one is made from."""

_HINT = "localize again, or restore the store from a copy"


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        store: The new store; None where there was nothing to repair.
        findings: What was wrong, a line each.
        recomputed: Rows made again, by this call or by an earlier one that it continues.
        differing: Those of them that did not come out as they were published.
        done_before: It had been repaired by an earlier call.
    """

    store: RegionStore | None
    findings: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    differing: tuple[str, ...] = ()
    done_before: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "path": None if self.store is None else str(self.store.path),
            "artifact_id": None if self.store is None else self.store.card.artifact_id,
            "findings": list(self.findings),
            "recomputed": list(self.recomputed),
            "differing": list(self.differing),
        }


def repair(path: Path, *, images: Path, out: Path, overrides: Iterable[str] = (), command: str = "") -> Repaired:
    """Make a whole store from a damaged one; the same call again continues.

    Args:
        path: The damaged store.
        images: Folder or list that it was made from; only the images of damaged rows are opened.
        out: Folder of the new store.
        overrides: ``path.to.key=value`` of settings that named files of the machine that made the store.
        command: Command line for provenance.

    Raises:
        CorruptError: What no row can be compared with is damaged: the card, the lists of samples or quarantine.
        IncompatibleError: Other weights or versions are installed here than made the store.
        QuarantineError: A damaged row's image is gone, or is another by now.
        UsageError: ``out`` is the store itself, or images that do not fit.
        InterruptedRun, DiskFullError: The same call continues.
    """
    card = read_card(path, "region-store")
    if out.resolve() == path.resolve():
        raise UsageError(f"{out}: is the damaged store itself; artifacts are never edited", hint="name another --out")
    found = [*verify(path, card), *verify_store(path, card)]
    if not found and not (out / CARD).exists():
        return Repaired(None)
    findings = tuple(f"{item.file}: {item.problem}" for item in found)
    _refuse_without_lists(path, card)
    damaged = RegionStore(path, card)
    with Lease(out):
        resolved = (path / RESOLVED).read_text() if _intact(path, card, RESOLVED) else ""
        spec, inputs = card.identity.spec, list(card.identity.inputs)
        status, _ = begin(out, kind="region-store", inputs=inputs, spec=spec, resolved=resolved, has_fresh=False)
        if status == "done":
            return _repaired(_whole(out), findings, done_before=True)
        _same_origin(out, card)
        with RunLog(out) as log, Signals() as signals:
            work = _Work(damaged, images, out, overrides, log, signals)
            work.fill()
            _finish(work, card, command)
    return _repaired(open_region_store(out), findings)


def _repaired(store: RegionStore, findings: tuple[str, ...], done_before: bool = False) -> Repaired:
    again = read_notes(store.path)
    differing = tuple(name for name, as_published in again.items() if not as_published)
    return Repaired(store, findings, tuple(again), differing, done_before)


def migrate(path: Path, *, out: Path, command: str = "") -> RegionStore | None:
    """Write an older store anew at this release's version; the same call again continues.

    Every map and detection is copied to the bit, so that the roots stay; the id changes with the version, and the
    new card says which one it supersedes.

    Args:
        path: A whole store of a version that this release reads.
        out: Folder of the new store.
        command: Command line for provenance.

    Returns:
        The new store, or None where the old one is of the current version.

    Raises:
        CorruptError: The old store is damaged.
        UsageError, LockedError, InterruptedRun, DiskFullError: As `repair`.
    """
    card = read_card(path, "region-store")
    major, minor = KIND_VERSIONS["region-store"]
    if card.identity.kind_version == f"{major}.{minor}":
        return None
    if out.resolve() == path.resolve():
        raise UsageError(f"{out}: is the old store itself; artifacts are never edited", hint="name another --out")
    found = [*verify(path, card), *verify_store(path, card)]
    if found:
        raise CorruptError(f"{path.name}: {found[0].file}: {found[0].problem}", hint="mwm repair it first")
    with Lease(out):
        spec, inputs = card.identity.spec, list(card.identity.inputs)
        resolved = (path / RESOLVED).read_text()
        status, _ = begin(out, kind="region-store", inputs=inputs, spec=spec, resolved=resolved, has_fresh=False)
        if status == "done":
            return _whole(out)
        _same_origin(out, card)
        with RunLog(out) as log, Signals() as signals:
            work = _Work(RegionStore(path, card), None, out, (), log, signals)
            work.fill()
            _finish(work, card, command)
    return open_region_store(out)


class _Work:
    """One call's way through the rows."""

    def __init__(
        self,
        store: RegionStore,
        images: Path | None,
        out: Path,
        overrides: Iterable[str],
        log: RunLog,
        signals: Signals,
    ) -> None:
        self.store, self.images, self.out, self.log, self.signals = store, images, out, log, signals
        self.overrides = tuple(overrides)
        self.again: Recomputer | None = None
        self.quarantine = {line["sample_id"]: line for line in _quarantined(store.path)}
        self.layout = create_store(out, sample_ids=store.sample_ids, regions=list(store.regions), grid=list(store.grid))

    def fill(self) -> None:
        """Bring every shard to its end."""
        total = len(self.store)
        for shard in pending_shards(self.out):
            with ShardJournal(self.out, shard) as journal:
                if not journal.assembled:
                    for row in journal.missing:
                        self._stop_if_asked(row)
                        self._append(journal, row)
                        self.log.progress(row + 1, total, "row")
                assemble_shard(journal)

    def _append(self, journal: ShardJournal, row: int) -> None:
        line = self.store.samples[row]
        sample = _sample(line)
        if line.status == "quarantined":
            told = self.quarantine[line.sample_id]
            journal.append_quarantined(row, sample, reason=told["reason"], stage=told["stage"], message=told["message"])
            return
        try:
            maps = self.store.maps([row])[0]
            boxes, scores, regions = self.store.boxes(row)
            if not _detections_match(line, boxes, scores, regions):
                raise CorruptError(f"row {row}: other detections than were published")
        except (CorruptError, OSError):
            made = self._make(row)
            answer = made.answer
            if answer is None:
                raise QuarantineError(
                    f"row {row} ({line.sample_id}) is damaged and cannot be made again: {made.problem}",
                    hint="give the images as they were localized; finished rows are kept",
                ) from None
            as_published = same(answer, line)
            note(self.out, line.sample_id, as_published)
            if not as_published:
                self.log.warn(f"row {row} ({line.sample_id}): made again, it is not to the bit what was published")
            maps, boxes, scores, regions = answer.maps, answer.boxes, answer.scores, answer.box_regions
        journal.append_maps(row, sample, np.array(maps), np.array(boxes), np.array(scores), np.array(regions))

    def _make(self, row: int) -> Made:
        assert self.images is not None  # else the store was found whole
        if self.again is None:  # models are built only if a row needs them
            self.again = Recomputer(self.store, self.images, self.overrides)
        return self.again.make(row)

    def _stop_if_asked(self, row: int) -> None:
        if self.signals.caught is not None:
            raise InterruptedRun(
                f"{self.out.name}: {self.signals.caught} before row {row} of {len(self.store)}; the rest is kept",
                hint="run the same command: it continues",
            )


def _finish(work: _Work, card: Card, command: str) -> None:
    out, path = work.out, work.store.path
    outputs = finalise(out)
    drop_journal(out)
    _corpus(path, out, card, work.images)
    for name in (RESOLVED, REPORT):
        if _intact(path, card, name):
            shutil.copyfile(path / name, out / name)
    if not (out / REPORT).exists() and work.images is not None:
        from stage1_localize.summary import write_report

        prompts = {region["name"]: region["texts"] for region in card.identity.spec["regions"]}
        by_id = {source.sample_id: source for source in find_sources(work.images.absolute())}
        absent = [name for name in work.store.sample_ids if name not in by_id]
        if absent:
            raise QuarantineError(
                f"{REPORT} is damaged, and {len(absent)} images for a new one are not there, e.g. {absent[0]}",
                hint="give all images that were localized",
            )
        write_report(
            out,
            outputs,
            prompts=prompts,
            sources=[by_id[name] for name in work.store.sample_ids],
            facts={"repaired from": card.artifact_id[:12]},
            warnings=work.log.warnings,
        )
    publish(
        out,
        kind="region-store",
        inputs=card.identity.inputs,
        spec=card.identity.spec,
        outputs=outputs,
        command=command,
        metrics={**card.provenance.metrics, "recomputed": len(read_notes(out))},
        supersedes=card.artifact_id,
    )


def _corpus(path: Path, out: Path, card: Card, images: Path | None) -> None:
    """The list of images, copied if it is whole, else made again from them."""
    wanted = next(item.artifact_id for item in card.identity.inputs if item.kind == "corpus")
    old, new = path / "corpus", out / "corpus"
    try:
        told = read_card(old, "corpus")
        whole = told.artifact_id == wanted and not verify(old, told)
    except (CorruptError, IncompatibleError, UsageError):
        whole = False
    if whole:
        if not (new / CARD).exists():
            shutil.rmtree(new, ignore_errors=True)
            shutil.copytree(old, new)
        return
    assert images is not None
    rows = list_corpus(find_sources(images.absolute()))
    if corpus_id(rows) != wanted:
        raise CorruptError(
            "corpus: its list is damaged, and the images given are not those that were localized", hint=_HINT
        )
    write_corpus(new, rows)


def _whole(out: Path) -> RegionStore:
    """The store that an earlier call made, if it still is what it made."""
    card = read_card(out, "region-store")
    found = [*verify(out, card), *verify_store(out, card)]
    if found:
        raise CorruptError(
            f"{out.name}: was made before, and is damaged: {found[0].file}: {found[0].problem}",
            hint="name another --out",
        )
    return open_region_store(out)


def _same_origin(out: Path, card: Card) -> None:
    """Refuse to go on with what another store's repair, or a run of localize, has begun here."""
    kept = out / ORIGIN
    begun = kept.read_text() if kept.exists() else None
    if begun is None and not (out / "journal").exists() and not (out / FINISHED).exists():
        write_atomic(kept, card.artifact_id.encode())
    elif begun != card.artifact_id:
        raise SpecMismatchError(
            f"{out}: holds what was begun from {'another run' if begun is None else f'store {begun[:12]}'}, "
            f"asked: store {card.artifact_id[:12]}",
            hint="name another --out",
        )


def _refuse_without_lists(path: Path, card: Card) -> None:
    for name, wanted in ((SAMPLES, "samples_sha256"), (QUARANTINE, "quarantine_sha256")):
        place = path / name
        if not place.is_file() or file_sha256(place) != card.identity.outputs.get(wanted):
            raise CorruptError(
                f"{path.name}/{name}: damaged; what was published of each row stands only there", hint=_HINT
            )


def _quarantined(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (path / QUARANTINE).read_bytes().splitlines()]


def _intact(path: Path, card: Card, name: str) -> bool:
    wanted = card.provenance.files.get(name)
    return (path / name).is_file() and not (path / name).is_symlink() and file_sha256(path / name) == wanted


def _sample(line: SampleRow) -> Sample:
    return Sample(
        sample_id=line.sample_id,
        source_sha256=line.source_sha256,
        pixel_sha256=line.pixel_sha256,
        shape=line.shape,
        spacing_mm=line.spacing_mm,
        orientation=line.frame.get("orientation"),
        group=line.group,
    )


def _detections_match(line: SampleRow, boxes: np.ndarray, scores: np.ndarray, regions: np.ndarray) -> bool:
    return detections_digest(boxes, scores, regions) == line.detections_digest


def lines(done: Repaired, shown: int = 5) -> Sequence[str]:
    """What was wrong and what was done, for people."""
    if done.store is None:
        return ["nothing to repair: every byte is what was published"]
    found = [f"found: {finding}" for finding in done.findings[:shown]]
    if len(done.findings) > shown:
        found.append(f"found: and {len(done.findings) - shown} more")
    card = done.store.card
    told = "the id that it had" if card.artifact_id == card.provenance.supersedes else "another id than before"
    if done.differing:
        told += f"; {len(done.differing)} rows differ from what was published, e.g. {done.differing[0]}"
    return [
        *found,
        "already done: region-store"
        if done.done_before
        else f"made: region-store ({len(done.recomputed)} of {len(done.store)} rows made again)",
        f"where: {done.store.path}",
        f"digest: sha256:{card.artifact_id} ({told})",
        f"next: mwm audit {done.store.path}",
    ]
