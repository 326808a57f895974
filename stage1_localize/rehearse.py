"""What `localize` would do and cost: some images are localized in this process and thrown away."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from shared.corpus import CorpusRow, list_corpus
from shared.errors import QuarantineError
from shared.forecast import Forecast, kept_aside, peak_bytes, refuse_unusable, size, spread
from shared.images import Image, Source, find_sources
from shared.pseudonyms import unsalted
from shared.region_layout import plan_rows_per_shard, quarter
from shared.region_shards import encode_chunk
from shared.runlog import duration
from shared.workspace import look
from stage1_localize.answer import Answer, Failure, answer, read
from stage1_localize.config import LocalizeConfig
from stage1_localize.examples import EXAMPLES_MAX
from stage1_localize.job import even_micro_batch, inputs_of, specify
from stage1_localize.parts import Parts, build_parts, resolve

_LINES_BYTES = 700
"""A sample's lines in the store's and the corpus' lists; measured."""
_CARD_BYTES = 12_000


@dataclass(frozen=True)
class Rehearsed:
    """A forecast and what was computed for it, for the stages after.

    Attributes:
        forecast: Of the run.
        config: Every option spelled out.
        images: Sample id -> image, of those that were localized.
        sources: Their files.
        maps: Their region maps, 0..254.
        count: Images of the whole corpus.
    """

    forecast: Forecast
    config: LocalizeConfig
    images: Mapping[str, Image]
    sources: Mapping[str, Source]
    maps: Mapping[str, UInt8[np.ndarray, "K s s"]]
    count: int


@unsalted()
def rehearse(
    config: LocalizeConfig, *, images: Path, out: Path, scheduler: str | None = None, fresh: bool = False
) -> Rehearsed:
    """Check the inputs as `localize` does and estimate the run; nothing is written.

    Args:
        config: Of the run.
        images: Of the run.
        out: Of the run; need not exist.
        scheduler: Of the run; then the time is for one worker, since the cluster's size is not known here.
        fresh: Of the run.

    Raises:
        UsageError: What `localize` would refuse before it computes.
        QuarantineError: None of the images tried can be used.
    """
    started = time.perf_counter()
    config = resolve(config)
    parts = build_parts(config.grounder, config.segmenter, config.asked())
    sources = find_sources(images.absolute())
    rows = plan_rows_per_shard(len(sources), len(config.regions), (config.grid_px, config.grid_px))
    config = config.model_copy(update={"micro_batch": even_micro_batch(config.micro_batch, rows)})
    refuse_unusable(out)
    standing, done = "new", 0
    if out.is_dir() and not kept_aside(out, fresh):
        corpus = list_corpus(sources)
        standing, _ = look(out, kind="region-store", inputs=inputs_of(corpus, parts), spec=specify(config, parts))
        done = _rows_done(out) if standing == "continue" else len(sources) if standing == "done" else 0
    parent_bytes = peak_bytes()
    found = {"images": f"{len(sources)} found, {_formats(sources)}"}
    if standing == "done":
        return Rehearsed(Forecast(out, standing, found), config, {}, {}, {}, len(sources))

    places = spread(len(sources), 1 + config.micro_batch)
    tried = list_corpus([sources[place] for place in places])
    seen, answers, failures, seconds = _localize(config, parts, [sources[place] for place in places], tried)
    if not answers:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(failures.items()))
        raise QuarantineError(f"images {images}: none of the {len(places)} images tried can be used: {reasons}")
    warnings = [
        f"{count} of {len(places)} images tried would be quarantined: {reason}" for reason, count in failures.items()
    ]
    shards = -(-len(sources) // rows)
    workers = _workers(config, shards, scheduler)
    batches = -(-rows // config.micro_batch)
    startup = time.perf_counter() - started - seconds[-1]
    todo = (len(sources) - done) / len(sources)
    wall = -(-shards // workers) * batches * seconds[-1] * todo + startup * (2 if config.workers != 0 else 1)
    per_image = seconds[-1] / config.micro_batch
    stored = [_stored_bytes(maps) for maps in answers.values()]
    per_row = float(np.mean(stored)) + _LINES_BYTES
    disk = (
        int(per_row * len(sources))
        + _report_bytes(config, seen, answers, min(EXAMPLES_MAX, len(sources)))
        + _CARD_BYTES
    )
    memory = peak_bytes() if config.workers == 0 else workers * peak_bytes() + parent_bytes
    process = "in this process" if config.workers == 0 else f"{workers} worker{'s' * (workers > 1)}"
    forecast = Forecast(
        out,
        standing,
        found,
        seconds=wall,
        disk_bytes=disk,
        memory_bytes=memory,
        how={
            "time": f"{len(answers)} images tried: {per_image:.2f} s an image in micro-batches of "
            f"{config.micro_batch} x {len(sources) - done} images to do, {shards} shards, {process}; "
            f"start-up {duration(startup)}",
            "disk": f"{size(float(np.mean(stored)))} an image for its {len(config.regions)} maps as compressed, "
            f"x {len(sources)}, and the report",
            "memory": f"{size(peak_bytes())} at the peak of this trial, {process}",
        },
        warnings=warnings,
    )
    kept = {source.sample_id: source for source in (sources[place] for place in places) if source.sample_id in answers}
    return Rehearsed(forecast, config, {name: seen[name] for name in answers}, kept, answers, len(sources))


def _localize(
    config: LocalizeConfig, parts: Parts, sources: Sequence[Source], corpus: Sequence[CorpusRow]
) -> tuple[dict[str, Image], dict[str, UInt8[np.ndarray, "K s s"]], Counter[str], list[float]]:
    """One image, which also loads the models, then a micro-batch as a worker makes it.

    Returns:
        Images and maps by sample id, failures by reason, seconds of both trials.
    """
    seen: dict[str, Image] = {}
    maps: dict[str, UInt8[np.ndarray, "K s s"]] = {}
    failures: Counter[str] = Counter()
    seconds: list[float] = []
    digests = {row.sample_id: row.source_sha256 for row in corpus}
    before = _one_thread()
    try:
        for few in (sources[:1], sources[1:] or sources):
            part = dict(enumerate(few))
            started = time.perf_counter()
            opened = {row: read(source, digests[source.sample_id]) for row, source in part.items()}
            images = {row: image for row, image in opened.items() if isinstance(image, Image)}
            ids = {row: source.sample_id for row, source in part.items()}
            padding = config.micro_batch - len(part) if seconds else 0
            places = [*part, *[-1] * padding]
            results = answer(images, ids, places, parts, config.asked(), config.grid_px)
            seconds.append(time.perf_counter() - started)
            for row, result in {**opened, **results}.items():
                if isinstance(result, Failure):
                    failures[result.reason] += 1
                elif isinstance(result, Answer):
                    seen[ids[row]], maps[ids[row]] = images[row], result.maps
    finally:
        if before is not None:
            sys.modules["torch"].set_num_threads(before)
    return seen, maps, failures, seconds


def _one_thread() -> int | None:
    """As in a worker; returns what to set again, None where torch is not used."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    before: int = torch.get_num_threads()
    torch.set_num_threads(1)
    return before


def _stored_bytes(maps: UInt8[np.ndarray, "K s s"]) -> int:
    """Of a row in both arrays, with its place in their indices and its boxes."""
    return len(encode_chunk(maps, compressed=True)) + quarter(maps).nbytes + 4 + 2 * 16 + 64


def _report_bytes(
    config: LocalizeConfig, images: Mapping[str, Image], maps: Mapping[str, UInt8[np.ndarray, "K s s"]], count: int
) -> int:
    """Of a report with so many examples, drawn from those at hand."""
    from shared.region_layout import decode_probability
    from shared.report import Example, localize_report

    examples = [
        Example(name, images[name].pixels, dict(zip(config.regions, decode_probability(maps[name]), strict=True)))
        for name, _ in zip(cycle(maps), range(count), strict=False)
    ]
    coverage = {name: [0.0] for name in config.regions}
    page = localize_report(prompts=config.regions, examples=examples, coverage=coverage, quarantined={}, facts={})
    return len(page.encode())


def _workers(config: LocalizeConfig, shards: int, scheduler: str | None) -> int:
    if config.workers == 0 or scheduler is not None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores if config.workers == "auto" else config.workers, shards))


def _rows_done(out: Path) -> int:
    from shared.region_journal import LAYOUT
    from shared.region_writer import open_layout, pending_shards
    from stage1_localize.shard import read_state

    if not (out / LAYOUT).exists():
        return 0
    layout, pending = open_layout(out), set(pending_shards(out))
    return sum(
        read_state(out, shard).done if shard in pending else len(layout.rows(shard)) for shard in range(layout.shards)
    )


def _formats(sources: Sequence[Source]) -> str:
    from shared.images import SUFFIXES

    files = {source.path for source in sources}
    names = Counter(
        next(
            (end[1:] for end in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(end)),
            "DICOM by its mark",
        )
        for path in files
    )
    return ", ".join(f"{count} {name}" for name, count in names.most_common()) + f", {size(_bytes(files))}"


def _bytes(files: set[Path]) -> int:
    return sum(path.stat().st_size for path in files)
