"""`localize`: text prompts and images in, a published region store out; the same call again continues."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shared.artifact import CARD, Input, publish, refuse_without_room
from shared.config import dump_yaml, failures_allowed
from shared.corpus import CorpusRow, corpus_id, list_corpus, write_corpus
from shared.decode import VERSION as DECODE_VERSION
from shared.errors import CorruptError, InterruptedRun, QuarantineError
from shared.images import Source, find_sources
from shared.lease import Lease
from shared.region_journal import LAYOUT
from shared.region_layout import Layout, plan_rows_per_shard
from shared.region_writer import FINISHED, create_store, drop_journal, finalise, pending_shards
from shared.regions import RegionStore, open_region_store
from shared.runlog import RunLog, scrub
from shared.signals import Signals
from shared.workspace import begin, set_aside
from stage1_localize.config import LocalizeConfig
from stage1_localize.fuse import VERSION as FUSE_VERSION
from stage1_localize.grounders import GROUNDERS
from stage1_localize.parts import Parts, build_parts, for_workers, resolve
from stage1_localize.segmenters import SEGMENTERS
from stage1_localize.shard import STOP, ShardTask, forget_trials, read_state, run_shard
from stage1_localize.summary import write_report

BEGUN = "run/store-begun"
_STOP_WAIT_S = 30.0
_COMPRESSED_SHARE = 0.4
"""Of the raw maps that stays after lz4; measured .32 on 224 px maps."""


def localize(
    config: LocalizeConfig,
    *,
    images: Path,
    out: Path,
    scheduler: str | None = None,
    fresh: bool = False,
    command: str = "",
) -> RegionStore:
    """Compute a probability map for every image and region, and publish them as a region store.

    Args:
        config: Prompts, parts and limits.
        images: Folder of images, or a CSV or JSONL list of them.
        out: The run's folder, which becomes the store; the same call on it continues, or is done at once.
        scheduler: Address or scheduler file of a running Dask cluster that sees the same folders; None: local.
        fresh: Keep an existing run aside and start anew.
        command: Command line for provenance, paths replaced by placeholders.

    Returns:
        The published store.

    Raises:
        UsageError: Prompts, parts, images or folder that do not fit (nothing has been computed).
        QuarantineError: More images failed than ``max_failures``; the rest is kept.
        InterruptedRun: SIGTERM or SIGINT; the same call continues.
        DiskFullError: No room; the same call continues.
        LockedError: Another process writes in ``out``.
    """
    config = resolve(config)
    parts = build_parts(config.grounder, config.segmenter, config.asked())
    out = out.resolve()
    sources = find_sources(images.absolute())
    if fresh:
        set_aside(out)
    with Lease(out):
        corpus = list_corpus(sources)
        inputs = inputs_of(corpus, parts)
        grid = (config.grid_px, config.grid_px)
        rows_per_shard = plan_rows_per_shard(len(corpus), len(config.regions), grid)
        config = config.model_copy(update={"micro_batch": even_micro_batch(config.micro_batch, rows_per_shard)})
        spec = specify(config, parts)
        status, _ = begin(
            out, kind="region-store", inputs=inputs, spec=spec, resolved=scrub(dump_yaml(config)), fresh=fresh
        )
        if status != "done":
            with RunLog(out) as log:
                run = _Run(config, parts, sources, corpus, out, log, command)
                with run.signals:
                    run.compute(scheduler)
                    run.finish(inputs, spec)
    return open_region_store(out)


def inputs_of(corpus: Sequence[CorpusRow], parts: Parts) -> list[Input]:
    """What a store is made from: the images, and artifacts that the parts bring."""
    return [Input(role="images", kind="corpus", artifact_id=corpus_id(corpus)), *parts.inputs]


def specify(config: LocalizeConfig, parts: Parts) -> dict[str, Any]:
    """What decides the maps, as float-free JSON: the ``spec`` of the store's card."""
    return {
        "regions": [{"name": region.name, "texts": list(region.texts)} for region in config.asked()],
        **parts.described,
        "fusion": {"rule": "noisy-or of detections, max of wordings", "version": FUSE_VERSION},
        "encoding": "floor(254 p + 0.5), uint8, 255 absent",
        "grid": [config.grid_px, config.grid_px],
        "decoding": {"version": DECODE_VERSION},
        "numeric": {"dtype": "float32", "device": "cpu", "threads": 1, "micro_batch": config.micro_batch},
    }


def even_micro_batch(asked: int, rows_per_shard: int) -> int:
    """The micro-batch that cuts a shard into as many pieces as ``asked`` does, but with the least padding.

    >>> even_micro_batch(8, 1024), even_micro_batch(8, 9), even_micro_batch(8, 3)
    (8, 5, 3)
    """
    pieces = -(-rows_per_shard // asked)
    return -(-rows_per_shard // pieces)


class _Run:
    """One call's way from sources to a card."""

    def __init__(
        self,
        config: LocalizeConfig,
        parts: Parts,
        sources: Sequence[Source],
        corpus: Sequence[CorpusRow],
        out: Path,
        log: RunLog,
        command: str,
    ) -> None:
        self.config, self.parts, self.out, self.log, self.command = config, parts, out, log, command
        self.sources, self.corpus = sources, corpus
        self.grounder = for_workers(config.grounder, GROUNDERS)
        self.segmenter = for_workers(config.segmenter, SEGMENTERS)
        self.token = secrets.token_hex(8)
        self.layout = self._create()
        self.counts: dict[int, tuple[int, int]] = {}
        self.done = self.quarantined = 0
        """Sums of ``counts``, kept beside them: at a hundred million images there are a hundred thousand shards."""
        self.signals = Signals()
        self.stop_at: float | None = None

    def compute(self, scheduler: str | None) -> None:
        """Bring every shard to its end."""
        pending = pending_shards(self.out)
        unfinished = set(pending)
        for shard in range(self.layout.shards):
            state = read_state(self.out, shard)
            rows = len(self.layout.rows(shard))
            self._count(shard, state.done if shard in unfinished else rows, state.quarantined)
        kept = self.done
        if kept:
            self.log.info(f"continuing: {kept} of {self.layout.samples} images are done")
        if not pending:
            return
        self._refuse_without_room(self.layout.samples - kept)
        (self.out / STOP).unlink(missing_ok=True)
        self.kept, self.started = kept, time.monotonic()
        try:
            for result in self._results(pending, scheduler):
                if result["status"] == "done":
                    self._count(result["shard"], result["rows"], result["quarantined"])
            self._stop_if_asked()
        except (Exception, KeyboardInterrupt):
            for shard in pending:
                forget_trials(self.out, shard)
            raise

    def finish(self, inputs: Sequence[Input], spec: dict[str, Any]) -> None:
        """Digest, report, publish."""
        outputs = finalise(self.out, progress=self._read_back)
        self._refuse_failures(outputs["quarantined"])
        if outputs["ok"] == 0:
            raise QuarantineError(f"{self.out.name}: none of {outputs['samples']} images could be used")
        drop_journal(self.out)
        for reason, count in sorted(outputs["quarantine_reasons"].items()):
            self.log.warn(f"{count} of {outputs['samples']} images quarantined: {reason}; see quarantine.jsonl")
        for region in outputs["regions"]:
            if region["empty"] == outputs["ok"]:
                self.log.warn(f"region '{region['name']}' was found in none of {outputs['ok']} images")
        write_report(
            self.out,
            outputs,
            prompts=self.config.regions,
            sources=self.sources,
            facts={"grounder": self.config.grounder.name, "segmenter": self.config.segmenter.name},
            warnings=self.log.warnings,
        )
        publish(
            self.out,
            kind="region-store",
            inputs=inputs,
            spec=spec,
            outputs=outputs,
            command=self.command,
            metrics={"images": outputs["samples"], "quarantined": outputs["quarantined"]},
        )

    def _create(self) -> Layout:
        if (self.out / BEGUN).exists() and not (self.out / LAYOUT).exists() and not (self.out / FINISHED).exists():
            raise CorruptError(
                f"{self.out}: a run was begun here, but its journal is gone",
                hint="restore it from a copy, or --fresh to keep the rest aside and start anew",
            )
        if not (self.out / "corpus" / CARD).exists():
            write_corpus(self.out / "corpus", self.corpus, command=self.command)
        layout = create_store(
            self.out,
            sample_ids=[row.sample_id for row in self.corpus],
            regions=[region.name for region in self.config.asked()],
            grid=(self.config.grid_px, self.config.grid_px),
        )
        (self.out / BEGUN).touch()
        return layout

    def _task(self, shard: int) -> ShardTask:
        rows = self.layout.rows(shard)
        return ShardTask(
            folder=str(self.out),
            shard=shard,
            token=self.token,
            sources=tuple(self.sources[rows.start : rows.stop]),
            digests=tuple(row.source_sha256 for row in self.corpus[rows.start : rows.stop]),
            regions=self.config.asked(),
            grounder=self.grounder,
            segmenter=self.segmenter,
            parts_digest=self.parts.digest,
            grid_px=self.config.grid_px,
            micro_batch=self.config.micro_batch,
        )

    def _results(self, pending: Sequence[int], scheduler: str | None) -> Iterator[dict[str, Any]]:
        tasks = map(self._task, pending)  # one by one: each holds a thousand sources
        if scheduler is None and self.config.workers == 0:
            states = (read_state(self.out, shard) for shard in pending)
            if any(state.trying or state.alone for state in states):
                from stage1_localize.isolate import run_isolated

                self.log.info("an earlier run died among images: each is tried again in a process of its own")
                yield from (run_isolated(task, self._poll) for task in tasks)
                return
            for task in tasks:
                watch = partial(self._watch, [task.shard])
                yield run_shard(task, stopped=lambda: self.signals.caught is not None, between=watch)
        else:
            from stage1_localize.cluster import run_on_dask

            yield from run_on_dask(
                tasks,
                workers=self.config.workers,
                count=len(pending),
                scheduler=scheduler,
                on_gpus=any(part.options.get("device") == "cuda" for part in (self.grounder, self.segmenter)),
                poll=self._poll,
                say=self.log.info,
            )

    def _poll(self, running: Sequence[int]) -> bool:
        """Look at the shards in flight; False once the run has been asked to stop."""
        self._watch(running)
        if self.signals.caught is None:
            return True
        if self.stop_at is None:
            (self.out / STOP).write_text(self.token)
            self.stop_at = time.monotonic() + _STOP_WAIT_S
        if time.monotonic() > self.stop_at:  # a slow micro-batch: its worker is ended, its rows are done again
            self._stop_if_asked()
        return False

    def _watch(self, running: Sequence[int]) -> None:
        for shard in running:
            state = read_state(self.out, shard)
            if state.token == self.token:
                self._count(shard, state.done, state.quarantined)
        rate = (self.done - self.kept) / max(time.monotonic() - self.started, 1e-9)
        self.log.progress(self.done, self.layout.samples, "image", img_per_s=rate)
        self._refuse_failures(self.quarantined)

    def _count(self, shard: int, done: int, quarantined: int) -> None:
        before = self.counts.get(shard, (0, 0))
        self.counts[shard] = done, quarantined
        self.done += done - before[0]
        self.quarantined += quarantined - before[1]

    def _refuse_failures(self, count: int) -> None:
        allowed = failures_allowed(self.config.max_failures, self.layout.samples)
        if count > allowed:
            raise QuarantineError(
                f"{self.out.name}: {count} of {self.layout.samples} failed so far, max_failures allows {allowed}",
                hint="raise max_failures and run the same command: it continues with what is done",
            )

    def _refuse_without_room(self, rows: int) -> None:
        needed = int(self.layout.bytes_max * _COMPRESSED_SHARE * rows / self.layout.samples)
        refuse_without_room(self.out, needed, f"{rows} images")

    def _read_back(self, done: int, total: int) -> None:
        self.log.progress(done, total, "row read back")
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.signals.caught is not None:
            raise InterruptedRun(
                f"{self.out.name}: {self.signals.caught} after {self.done} of {self.layout.samples} images, "
                "which are kept",
                hint="run the same command: it continues",
            )
