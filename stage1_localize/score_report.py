"""The folder of a score: ``report.html`` for a person, ``scores.json`` for a program; neither is part of the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

from shared.artifact import write_atomic
from shared.charts import Row, arms_chart, histogram, line_chart
from shared.errors import DecodeError
from shared.figures import REGION_COLOURS, contour, paint, picture
from shared.images import Source, read_image
from shared.page import Section, lines, page, table
from shared.regions import RegionStore, decode_probability
from stage1_localize.score import Measured
from stage1_localize.score_labels import Truth, true_pixels

SCORES = "scores.json"
REPORT = "report.html"
_WORST = 8
_TRUTH = (0, 120, 255)
"""White would be lost on bright tissue, and no region has this blue."""
_CHARTED = {
    "dice": "Dice of maps at 0.5",
    "iou": "IoU of maps at 0.5",
    "soft_dice": "soft Dice",
    "found_share": "true pixels found",
    "precision": "box precision",
    "recall": "box recall",
    "f1": "box F1",
    "average_precision": "box average precision",
}
_TABLED = {
    "outside_share": "share of the map outside the truth",
    "coverage": "share of the image in the map",
    "true_coverage": "share of the image in the truth",
    "pixel_ece": "pixels: calibration error (ECE)",
    "pixel_brier": "pixels: Brier score",
    "box_ece": "boxes: calibration error (ECE)",
    "box_brier": "boxes: Brier score",
    "false_regions": "images without it in which a box is found",
    "false_pixels": "share of such an image in the map",
}
_COUNTS = {"images": "with the region", "images_without": "known without it", "images_unknown": "unknown"}


def write_score(
    out: Path,
    store: RegionStore,
    truth: Truth,
    scores: Mapping[str, Mapping[str, Any]],
    measured: Mapping[str, Sequence[Measured]],
    *,
    sources: Sequence[Source] = (),
    exhaustive: bool,
) -> None:
    """Write both files.

    Args:
        out: Folder, made if it is not there.
        store: That was scored.
        truth: What it was compared with.
        scores: From `score_store`.
        measured: Likewise; the lowest become pictures where there are sources.
        sources: The store's images.
        exhaustive: Whether images without annotations counted as images without the region.
    """
    out.mkdir(parents=True, exist_ok=True)
    body = as_dict(store, truth, scores, exhaustive)
    write_atomic(out / SCORES, (json.dumps(body, indent=1) + "\n").encode())
    write_atomic(out / REPORT, _page(store, truth, scores, measured, sources, exhaustive).encode())


def as_dict(
    store: RegionStore, truth: Truth, scores: Mapping[str, Mapping[str, Any]], exhaustive: bool
) -> dict[str, Any]:
    """Scores and what they are of, as JSON."""
    return {
        "store": store.card.artifact_id,
        "labels": truth.labels.sha256,
        "images_scored": len(truth.rows),
        "images_elsewhere": truth.elsewhere,
        "images_quarantined": truth.quarantined,
        "exhaustive": exhaustive,
        "ignored": sorted(truth.ignored),
        "categories": {region: list(names) for region, names in truth.categories.items()},
        "threshold": 0.5,
        "regions": dict(scores),
        "warnings": list(truth.warnings),
    }


def _page(
    store: RegionStore,
    truth: Truth,
    scores: Mapping[str, Mapping[str, Any]],
    measured: Mapping[str, Sequence[Measured]],
    sources: Sequence[Source],
    exhaustive: bool,
) -> str:
    arms = {region: list(_rows(found)) for region, found in scores.items()}
    arms = {region: rows for region, rows in arms.items() if rows}
    curves = {
        region: ([row[0] for row in found["dice_by_threshold"]], [row[1] for row in found["dice_by_threshold"]])
        for region, found in scores.items()
        if "dice_by_threshold" in found
    }
    sections = [
        Section(
            "How well the store agrees with the labels",
            arms_chart(arms),
            "Maps count at 0.5, boxes at an overlap (IoU) of 0.5; no threshold was chosen on these labels. "
            "Intervals: whole groups drawn again; with few groups they are too narrow, with one they say nothing.",
        ),
        Section("Further scores", _table(scores)),
        Section(
            "Dice, were the maps cut elsewhere",
            line_chart(curves, x_label="threshold", y_label="Dice", zero=True) if curves else "",
            "Only the value at 0.5 is a score. The best of a curve was chosen on the labels it is measured on: "
            "to use another threshold, choose it on some images and measure it on others.",
        ),
        Section(
            "Calibration: does a probability of 0.8 mean right in 8 of 10?",
            _calibration(scores),
            "A well calibrated store lies on the line of right = said; below it, it is too sure. Boxes: share that "
            "overlaps a true box by half or more.",
        ),
        Section("Scores of the boxes found", _histograms(scores)),
        Section("Where it agrees least", _worst(store, truth, measured, sources), _WORST_NOTE if sources else ""),
        Section("What was scored", _counts(truth, scores), _UNKNOWN[exhaustive]),
        Section("Noticed", lines(truth.warnings)),
    ]
    facts = {
        "images scored": len(truth.rows),
        "store": store.card.artifact_id[:12],
        "labels": truth.labels.sha256[:12],
        "grounder": store.grounder or "unknown",
    }
    return page("Score of a region store", "Region maps and boxes compared with labels.", sections, facts)


_WORST_NOTE = "Tint: the store's map, its line at 0.5. Blue line: the labels. The lowest Dice first."
_UNKNOWN = {
    True: "The labels were declared exhaustive: an image without an annotation of a region does not hold it.",
    False: "An image without an annotation of a region says nothing of it (unknown). Where the labels name "
    "everything there is, --exhaustive counts such images as images without it.",
}


def _rows(found: Mapping[str, Any]) -> Iterator[Row]:
    for key, name in _CHARTED.items():
        if key in found:
            value, low, high = found[key]
            yield name, value, low, high


def _table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (name, *(_told(found.get(key)) for found in scores.values()))
        for key, name in _TABLED.items()
        if any(key in found for found in scores.values())
    ]
    return table(("score (95 % interval)", *scores), rows) if rows else ""


def _told(triple: Sequence[float] | None) -> str:
    return "–" if triple is None else f"{triple[0]:.3f} ({triple[1]:.3f} to {triple[2]:.3f})"


def _calibration(scores: Mapping[str, Mapping[str, Any]]) -> str:
    charts = []
    for region, found in scores.items():
        series = {
            name: ([row[0] for row in found[key]], [row[1] for row in found[key]])
            for key, name in (("pixel_reliability", "pixels"), ("box_reliability", "boxes"))
            if key in found
        }
        if series:
            series = {"right = said": ([0.0, 1.0], [0.0, 1.0]), **series}
            chart = line_chart(series, x_label="probability said", y_label="share that is right", zero=True)
            charts.append(f"<div><h3>{escape(region)}</h3>{chart}</div>")
    return f'<div class="row wide">{"".join(charts)}</div>' if charts else ""


def _histograms(scores: Mapping[str, Mapping[str, Any]]) -> str:
    figures = ""
    for place, (region, found) in enumerate(scores.items()):
        if "box_scores" in found:
            counts = found["box_scores"]
            middles = np.repeat((np.arange(len(counts)) + 0.5) / len(counts), counts)
            chart = histogram(middles.tolist(), x_label="score of a box", style=place % 5 + 1)
            figures += f"<figure><h3>{escape(region)}</h3>{chart}</figure>"
    return f'<div class="row wide">{figures}</div>' if figures else ""


def _worst(
    store: RegionStore, truth: Truth, measured: Mapping[str, Sequence[Measured]], sources: Sequence[Source]
) -> str:
    if not sources:
        return '<p class="muted">Give --images to see pictures: a store holds maps, not pixels.</p>'
    by_id = {source.sample_id: source for source in sources}
    parts = ""
    for place, (region, found) in enumerate(measured.items()):
        figures = ""
        for one in sorted(found, key=lambda each: (each.dice, each.row))[:_WORST]:
            sample, item = store.samples[one.row], truth.rows[one.row]
            source = by_id.get(sample.sample_id)
            if source is None:
                continue
            try:
                image = read_image(source)
            except DecodeError:  # it was read when its maps were made; since then it went away
                continue
            if image.pixel_sha256 != sample.pixel_sha256:
                continue
            shown = decode_probability(store.maps([one.row])[0, store.regions.index(region)])
            things = [thing for thing in item.things if thing.region in truth.categories[region]]
            colour = REGION_COLOURS[place % len(REGION_COLOURS)]
            drawn = paint(image.pixels, [(shown, colour)], side_px=320)
            height, width = store.grid
            drawn = draw_truth(drawn, true_pixels(things, item, (height, width)))
            figures += (
                f"<figure>{picture(drawn, f'{sample.sample_id}: {region}')}<figcaption><b>Dice {one.dice:.2f}</b>"
                f"<br>{escape(sample.sample_id)}</figcaption></figure>"
            )
        if figures:
            parts += f'<h3>{escape(region)}</h3><div class="row few">{figures}</div>'
    return parts or '<p class="muted">None of the images given is one of those scored.</p>'


def draw_truth(pixels: UInt8[np.ndarray, "H W 3"], truth: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture with the border of the truth as a line; blurred a little, for a sheer edge has no line at 0.5."""
    return contour(pixels, ndimage.uniform_filter(truth.astype(np.float32), 3), _TRUTH)


def _counts(truth: Truth, scores: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            region,
            ", ".join(truth.categories[region]),
            "outlines" if truth.outlined(region) else "boxes alone",
            *(int(found[key]) for key in _COUNTS),
            int(found["groups"]),
        )
        for region, found in scores.items()
    ]
    return table(("region", "category", "truth", *(f"images {name}" for name in _COUNTS.values()), "groups"), rows)
