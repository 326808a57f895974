"""What one task does: one whole shard, row by row from where its journal ends; safe to run twice or to kill.

Beside the journal lies ``shard-K.state``: which rows are being tried, so that the next attempt knows what a
worker died of. After a death its micro-batch is tried row by row; a row whose own trial dies is quarantined
as ``worker_killed``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import LockedError
from shared.images import Image, Source
from shared.region_journal import JOURNAL, ShardJournal, full_disk_is_named
from shared.region_record import Sample
from shared.region_writer import assemble_shard
from stage1_localize.answer import Answer, Failure, answer, read
from stage1_localize.config import PartConfig
from stage1_localize.contracts import Region
from stage1_localize.parts import Parts, parts_of_this_process

STOP = "run/stop"
"""A file with the token of a run that has been asked to stop; workers look for it between micro-batches."""

_LOCK_WAIT_S = 120.0


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs; small, and pickled whole.

    Attributes:
        folder: The store in the making, as the workers see it.
        shard: Number of the shard.
        token: Names this run; what an earlier run left in the state file does not count as deaths.
        sources: Of the shard's rows, in order.
        digests: sha256 of each source file, as the corpus lists it.
        regions: What is asked.
        grounder: From the recipe.
        segmenter: From the recipe.
        parts_digest: `Parts.digest` where the run was started.
        grid_px: Side of the stored maps.
        micro_batch: Images a model call.
    """

    folder: str
    shard: int
    token: str
    sources: tuple[Source, ...]
    digests: tuple[str, ...]
    regions: tuple[Region, ...]
    grounder: PartConfig
    segmenter: PartConfig
    parts_digest: str
    grid_px: int
    micro_batch: int


@dataclass
class ShardState:
    """What is being tried in a shard, and how far it is.

    Attributes:
        token: Of the run that wrote it.
        trying: Rows whose computation has begun; empty between micro-batches.
        alone: The rows of ``trying`` are being tried one by one.
        cleared: Rows of this micro-batch that survived their own trial.
        deaths: Attempts of this shard in this run that ended without a word.
        done: Rows in the journal.
        quarantined: Those of them that failed, as far as this attempt has seen.
    """

    token: str = ""
    trying: list[int] = field(default_factory=list)
    alone: bool = False
    cleared: list[int] = field(default_factory=list)
    deaths: int = 0
    done: int = 0
    quarantined: int = 0


def run_shard(
    task: ShardTask, stopped: Callable[[], bool] | None = None, between: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Finish a shard.

    Args:
        task: The shard.
        stopped: Asked between micro-batches; by default, whether the run's stop file is there.
        between: Called between micro-batches (runs without Dask report progress by it).

    Returns:
        ``shard``, ``status`` (``done`` or ``stopped``) and, if done, ``rows quarantined digest``; no arrays.

    Raises:
        DiskFullError: What was finished is kept.
        LockedError: A worker of an earlier run still holds the shard.
    """
    stopped = stopped or (lambda: _stop_asked(task))
    with _opened(task) as journal:
        if not journal.assembled:
            work = _Work(task, journal)
            while (batch := work.next_batch()) is not None:
                if stopped():
                    return {"shard": task.shard, "status": "stopped"}
                work.finish(batch)
                if between is not None:
                    between()
        done = assemble_shard(journal)
    return {"status": "done", **asdict(done)}


def read_state(folder: Path, shard: int) -> ShardState:
    """State of a shard; an empty one where there is none or it is torn."""
    try:
        return ShardState(**json.loads(_state_path(folder, shard).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return ShardState()


class _Work:
    """A shard being worked on: its open journal, its state, its parts (built when first needed)."""

    def __init__(self, task: ShardTask, journal: ShardJournal) -> None:
        self.task = task
        self.journal = journal
        self.folder = Path(task.folder)
        self.start = journal.rows.start
        self.missing = set(journal.missing)
        self.failed = {entry.line.row for entry in journal.entries() if entry.quarantine is not None}
        self.state = self._learn_from_the_last_attempt()

    def next_batch(self) -> range | None:
        """The first micro-batch that lacks a row."""
        if not self.missing:
            return None
        size = self.task.micro_batch
        first = self.start + (min(self.missing) - self.start) // size * size
        return range(first, min(first + size, self.journal.rows.stop))

    def finish(self, batch: range) -> None:
        """Compute a micro-batch and keep the rows of it that are missing."""
        self._parts()  # before any row is being tried: a model that does not fit is no image's fault
        wanted = [row for row in batch if row in self.missing]
        if self.state.alone:
            self._try_alone(batch, [row for row in wanted if row not in self.state.cleared])
            wanted = [row for row in wanted if row in self.missing]
        self._save(trying=wanted)
        for row, result in self._compute(batch, [row for row in batch if row not in self.failed]).items():
            if row in self.missing:
                self._keep(row, *result)
        self._save(trying=[], alone=False, cleared=[])

    def _try_alone(self, batch: range, rows: list[int]) -> None:
        for row in rows:
            self._save(trying=[row])
            self._compute(batch, [row])
            self._save(trying=[], cleared=[*self.state.cleared, row])

    def _compute(self, batch: range, rows: list[int]) -> dict[int, tuple[Image | None, Answer | Failure]]:
        parts = self._parts()
        read_rows = {row: read(self._source(row), self.task.digests[row - self.start]) for row in rows}
        images = {row: image for row, image in read_rows.items() if isinstance(image, Image)}
        padding = [-1] * (self.task.micro_batch - len(batch))
        ids = {row: self._source(row).sample_id for row in batch}
        answers = answer(images, ids, [*batch, *padding], parts, self.task.regions, self.task.grid_px)
        results: dict[int, tuple[Image | None, Answer | Failure]] = {}
        for row, image in read_rows.items():
            results[row] = (image, answers[row]) if isinstance(image, Image) else (None, image)
        return results

    def _keep(self, row: int, image: Image | None, result: Answer | Failure) -> None:
        source = self._source(row)
        sample = Sample(
            sample_id=source.sample_id,
            source_sha256=self.task.digests[row - self.start],
            pixel_sha256=image.pixel_sha256 if image else None,
            shape=image.pixels.shape if image else None,
            spacing_mm=image.spacing_mm if image else None,
            group=source.group,
        )
        if isinstance(result, Failure):
            self.journal.append_quarantined(
                row, sample, reason=result.reason, stage=result.stage, message=result.message
            )
            self.failed.add(row)
        else:
            self.journal.append_maps(row, sample, result.maps, result.boxes, result.scores, result.box_regions)
        self.missing.discard(row)

    def _learn_from_the_last_attempt(self) -> ShardState:
        last = read_state(self.folder, self.task.shard)
        if last.token != self.task.token:
            return ShardState(token=self.task.token)
        died_of = [row for row in last.trying if row in self.missing]
        if not died_of:
            return ShardState(token=self.task.token, deaths=last.deaths)
        last.deaths += 1
        # Alone and dead: that row it was. All cleared alone, yet dead together: none of them can be told apart.
        if last.alone and (len(last.trying) == 1 or set(died_of) <= set(last.cleared)):
            for row in died_of:
                message = f"{self._source(row).sample_id}: the worker process died each time this image was tried"
                self._keep(row, None, Failure("worker_killed", "worker", message))
        last.alone = True
        return last

    def _save(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.state, name, value)
        self.state.done = len(self.journal.rows) - len(self.missing)
        self.state.quarantined = len(self.failed)
        path = _state_path(self.folder, self.task.shard)
        temporary = path.with_suffix(".state.tmp")
        with full_disk_is_named(self.folder, 4096):
            temporary.write_text(json.dumps(asdict(self.state)))
            os.replace(temporary, path)

    def _parts(self) -> Parts:
        return parts_of_this_process(self.task.grounder, self.task.segmenter, self.task.regions, self.task.parts_digest)

    def _source(self, row: int) -> Source:
        return self.task.sources[row - self.start]


def _opened(task: ShardTask) -> ShardJournal:
    """Open the journal, waiting for a worker that was given up, or orphaned, to let go of it."""
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return ShardJournal(Path(task.folder), task.shard)
        except LockedError:
            if time.monotonic() > until or _stop_asked(task):
                raise
            time.sleep(0.2)


def _stop_asked(task: ShardTask) -> bool:
    try:
        return (Path(task.folder) / STOP).read_text() == task.token
    except FileNotFoundError:
        return False


def _state_path(folder: Path, shard: int) -> Path:
    return folder / JOURNAL / f"shard-{shard:05d}.state"
