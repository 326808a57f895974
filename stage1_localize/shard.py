"""What one task does: one whole shard, row by row from where its journal ends; safe to run twice or to kill.

Beside the journal lies ``shard-K.state``: which rows are being tried, so that the next attempt, in this run or
in the next, knows what a process died of. After a death its micro-batch is tried row by row; a row whose own
trial died three times is quarantined as ``worker_killed``. Once is no proof: ``kill -9`` looks the same. A death that
took the whole run with it proves less still: somebody may kill a run again and again. It takes twelve of those.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.artifact import full_disk_is_named
from shared.errors import InterruptedRun, LockedError
from shared.images import Image, Source
from shared.region_journal import JOURNAL, ShardJournal
from shared.region_record import Sample
from shared.region_writer import assemble_shard
from stage1_localize.answer import Answer, Failure, answer, read
from stage1_localize.config import PartConfig
from stage1_localize.contracts import Region
from stage1_localize.parts import Parts, parts_of_this_process

STOP = "run/stop"
"""A file with the token of a run that has been asked to stop; workers look for it between micro-batches."""

_LOCK_WAIT_S = 120.0
_SEEN, _WITH_ITS_RUN = 4, 1
"""Weight of a worker's death that its run lived to see, and of one that ended the run too."""
_DEATHS_MAX = 3 * _SEEN
_STANDSTILLS_MAX = 3


@dataclass(frozen=True)
class ShardTask:
    """Everything a worker needs; small, and pickled whole.

    Attributes:
        folder: The store in the making, as the workers see it.
        shard: Number of the shard.
        token: Names this run; its stop file holds it.
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
        died: Row, or ``together``, of this micro-batch -> weight of the trials that ended without a word.
        done: Rows in the journal.
        quarantined: Those of them that failed, as far as this attempt has seen.
    """

    token: str = ""
    trying: list[int] = field(default_factory=list)
    alone: bool = False
    cleared: list[int] = field(default_factory=list)
    died: dict[str, int] = field(default_factory=dict)
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
    stopped = stopped or (lambda: stop_asked(task))
    with _opened(task) as journal:
        if not journal.assembled:
            try:
                work = _Work(task, journal, stopped)
                while (batch := work.next_batch()) is not None:
                    if stopped():
                        return {"shard": task.shard, "status": "stopped"}
                    work.finish(batch)
                    if between is not None:
                        between()
            except (Exception, KeyboardInterrupt):
                forget_trials(Path(task.folder), task.shard)
                raise
        done = assemble_shard(journal)
    return {"status": "done", **asdict(done)}


def read_state(folder: Path, shard: int) -> ShardState:
    """State of a shard; an empty one where there is none or it is torn."""
    try:
        return ShardState(**json.loads(_state_path(folder, shard).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return ShardState()


def forget_trials(folder: Path, shard: int) -> None:
    """Of an attempt that ended with a word, or was ended by us: no image was its death."""
    path, state = _state_path(folder, shard), read_state(folder, shard)
    if not state.trying and not state.alone:
        return
    try:
        path.write_text(json.dumps(asdict(replace(state, trying=[], alone=False, cleared=[], died={}))))
    except OSError:  # a full disk; a state that is gone says no more than that nothing was tried
        path.unlink(missing_ok=True)


def excuse(task: ShardTask) -> None:
    """Of a worker that has been told to go and may be killed in the middle of an image: no image was its death."""
    path, state = _state_path(Path(task.folder), task.shard), read_state(Path(task.folder), task.shard)
    if state.trying:
        _replace_state(path, replace(state, trying=[]))


class Standstill:
    """Tells deaths that narrow down an image, and so move the state, from deaths before any image is reached."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[str, int]] = {}

    def note(self, task: ShardTask) -> None:
        """A worker of the shard died.

        Raises:
            InterruptedRun: The state has stood still over several deaths.
        """
        state = repr(read_state(Path(task.folder), task.shard))
        before, count = self._seen.get(task.shard, ("", 0))
        self._seen[task.shard] = state, count + 1 if state == before else 1
        if self._seen[task.shard][1] >= _STANDSTILLS_MAX:
            raise InterruptedRun(
                f"shard {task.shard}: its workers die before they reach an image",
                hint="most likely memory: fewer workers (--set workers=1) or a smaller micro_batch",
            )


class _Work:
    """A shard being worked on: its open journal, its state, its parts (built when first needed)."""

    def __init__(self, task: ShardTask, journal: ShardJournal, stopped: Callable[[], bool]) -> None:
        self.task = task
        self.stopped = stopped
        self.journal = journal
        self.folder = Path(task.folder)
        self.start = journal.rows.start
        self.missing = set(journal.missing)
        self.failed = {entry.line.row for entry in journal.entries() if entry.quarantine is not None}
        self.state = read_state(self.folder, task.shard)
        self._learn_from_the_last_attempt()

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
            if not self._try_alone(batch, [row for row in wanted if row not in self.state.cleared]):
                return
            wanted = [row for row in wanted if row in self.missing]
        self._save(trying=wanted)
        for row, result in self._compute(batch, [row for row in batch if row not in self.failed]).items():
            if row in self.missing:
                self._keep(row, *result)
        self._save(trying=[], alone=False, cleared=[], died={})

    def _try_alone(self, batch: range, rows: list[int]) -> bool:
        """Try rows one by one; False if it was stopped meanwhile, with what was learned so far in the state."""
        for row in rows:
            if self.stopped():
                return False
            self._save(trying=[row])
            self._compute(batch, [row])
            self._save(trying=[], cleared=[*self.state.cleared, row])
        return True

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

    def _learn_from_the_last_attempt(self) -> None:
        last = self.state
        died_of = [row for row in last.trying if row in self.missing]
        if not died_of and (last.trying or not last.alone):
            self.state = ShardState(token=self.task.token)
            return
        if died_of and last.alone:
            # All cleared alone, yet dead together: none of them can be told apart.
            trial = "together" if set(died_of) <= set(last.cleared) else str(died_of[0])
            weight = _SEEN if last.token == self.task.token else _WITH_ITS_RUN
            last.died[trial] = last.died.get(trial, 0) + weight
            if last.died[trial] >= _DEATHS_MAX:
                for row in died_of:
                    message = f"{self._source(row).sample_id}: the process died each time this image was tried"
                    self._keep(row, None, Failure("worker_killed", "worker", message))
        # At once: if this process is killed before it tries anything, that is no death of these rows.
        self._save(token=self.task.token, trying=[], alone=True)

    def _save(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.state, name, value)
        self.state.done = len(self.journal.rows) - len(self.missing)
        self.state.quarantined = len(self.failed)
        with full_disk_is_named(self.folder, 4096):
            _replace_state(_state_path(self.folder, self.task.shard), self.state)

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
            if time.monotonic() > until or stop_asked(task):
                raise
            time.sleep(0.2)


def stop_asked(task: ShardTask) -> bool:
    """Whether the run that the task belongs to has been asked to stop."""
    try:
        return (Path(task.folder) / STOP).read_text() == task.token
    except FileNotFoundError:
        return False


def _replace_state(path: Path, state: ShardState) -> None:
    temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(vars(state)))
    os.replace(temporary, path)


def _state_path(folder: Path, shard: int) -> Path:
    return folder / JOURNAL / f"shard-{shard:05d}.state"
