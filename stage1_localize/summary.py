"""The report page of a run: what was asked, what was found, what was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.artifact import write_atomic
from shared.errors import DecodeError
from shared.images import Source, read_image
from shared.region_arrays import ShardedArray
from shared.region_layout import ABSENT, ARRAYS, SAMPLES, decode_probability
from shared.region_samples import SampleTable
from shared.report import Example, localize_report

REPORT = "report.html"
_EXAMPLES = 8
_COVERAGE_ROWS_MAX = 1000


def write_report(
    out: Path,
    outputs: Mapping[str, Any],
    *,
    prompts: Mapping[str, Sequence[str]],
    sources: Sequence[Source],
    facts: Mapping[str, object],
    warnings: Sequence[str],
) -> None:
    """Write ``report.html`` of a finalised store.

    Args:
        out: The store's folder.
        outputs: From `shared.region_writer.finalise`.
        prompts: Region -> its wordings.
        sources: Of every row, for pictures of a few.
        facts: Settings worth a glance; counts are added.
        warnings: What a reader should act upon.
    """
    samples = SampleTable(out / SAMPLES, outputs["samples"], outputs["samples_sha256"])
    good = [sample.row for sample in samples if sample.status == "ok"]
    stored = ShardedArray(out / ARRAYS / "maps")
    measured = _spread(good, _COVERAGE_ROWS_MAX)
    coverage: dict[str, list[float]] = {name: [] for name in prompts}
    for row in measured:
        for name, share in zip(prompts, (_maps(stored, row) >= ABSENT // 2).mean(axis=(1, 2)), strict=True):
            coverage[name].append(float(share))
    examples = []
    for row in _spread(good, _EXAMPLES):
        try:
            image = read_image(sources[row])
        except DecodeError:  # it was read when its maps were made; since then it went away
            continue
        maps = decode_probability(_maps(stored, row))
        examples.append(Example(samples[row].sample_id, image.pixels, dict(zip(prompts, maps, strict=True))))
    page = localize_report(
        prompts=prompts,
        examples=examples,
        coverage=coverage,
        quarantined=outputs["quarantine_reasons"],
        facts={
            "images": outputs["samples"],
            "quarantined": outputs["quarantined"],
            "detections": outputs["detections"],
            "shares measured on": f"{len(measured)} images",
            **facts,
        },
        warnings=warnings,
    )
    write_atomic(out / REPORT, page.encode())


def _maps(stored: ShardedArray, row: int) -> np.ndarray[Any, Any]:
    maps = np.empty((1, *stored.shape[1:]), np.uint8)
    stored.read([row], maps)
    return maps[0]


def _spread(rows: Sequence[int], count: int) -> list[int]:
    """At most ``count`` rows, evenly spaced."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]
