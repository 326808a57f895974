"""The report page of a run: what was asked, what was found, what was left out."""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.artifact import write_atomic
from shared.errors import DecodeError
from shared.images import Source, read_image
from shared.region_arrays import ShardedArray
from shared.region_layout import ARRAYS, QUARANTINE, SAMPLES, decode_probability
from shared.region_samples import SampleTable
from shared.report import Example, LeftOut, localize_report
from stage1_localize.examples import choose, measure, read_maps, spread

REPORT = "report.html"
_MEASURED_MAX = 1000
_LEFT_OUT_MAX = 120
_LEFT_OUT_OF_A_REASON_MAX = 20


def write_report(
    out: Path,
    outputs: Mapping[str, Any],
    *,
    prompts: Mapping[str, Sequence[str]],
    sources: Sequence[Source],
    facts: Mapping[str, object],
    warnings: Sequence[str],
) -> None:
    """Write ``report.html`` of a finalised store; neither memory nor page grow with its rows.

    Args:
        out: The store's folder.
        outputs: From `shared.region_writer.finalise`.
        prompts: Region -> its wordings.
        sources: Of every row, for pictures of a few.
        facts: Settings worth a glance; counts are added.
        warnings: What a reader should act upon.
    """
    samples = SampleTable(out / SAMPLES, outputs["samples"], outputs["samples_sha256"])
    good = array("q", (sample.row for sample in samples if sample.status == "ok"))
    regions = list(prompts)
    measured = measure(out / ARRAYS, spread(good, _MEASURED_MAX), len(regions))
    by_row = {item.row: item for item in measured}
    stored = ShardedArray(out / ARRAYS / "maps")
    examples = []
    for row, why in choose(measured, regions).items():
        try:
            image = read_image(sources[row])
        except DecodeError:  # it was read when its maps were made; since then it went away
            continue
        maps = decode_probability(read_maps(stored, row))
        examples.append(
            Example(
                samples[row].sample_id,
                image.pixels,
                dict(zip(regions, maps, strict=True)),
                why=why,
                scores={name: score for name, score in zip(regions, by_row[row].scores, strict=True) if score >= 0},
            )
        )
    page = localize_report(
        prompts=prompts,
        examples=examples,
        coverage={name: [item.shares[place] for item in measured] for place, name in enumerate(regions)},
        scores={
            name: [item.scores[place] for item in measured if not math.isnan(item.scores[place])]
            for place, name in enumerate(regions)
        },
        measured=len(measured),
        quarantined=outputs["quarantine_reasons"],
        left_out=left_out(out / QUARANTINE),
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


def left_out(path: Path) -> list[LeftOut]:
    """The first quarantined samples of each reason, as published, in the order of their rows.

    Args:
        path: ``quarantine.jsonl``.
    """
    kept, of_reason = [], Counter[str]()
    with path.open("rb") as lines:
        for line in lines:
            entry = json.loads(line)
            of_reason[entry["reason"]] += 1
            if of_reason[entry["reason"]] <= _LEFT_OUT_OF_A_REASON_MAX:
                kept.append(LeftOut(entry["sample_id"], entry["reason"], entry["message"]))
                if len(kept) == _LEFT_OUT_MAX:
                    break
    return kept
