"""The folder of compared wordings: ``report.html`` with their maps side by side, ``wordings.json`` for a program."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from shared.artifact import write_atomic
from shared.charts import arms_chart
from shared.figures import REGION_COLOURS, paint, picture
from shared.page import Section, lines, page, table
from stage1_localize.score_report import draw_truth
from stage1_localize.wordings import Pictured

WORDINGS = "wordings.json"
REPORT = "report.html"
_PICTURES_MAX = 64
_PANELS_MAX = 6
_SIDE_PX = 256


def write_wordings(out: Path, told: Mapping[str, Any], pictured: Sequence[Pictured]) -> None:
    """Write both files.

    Args:
        out: Folder, made if it is not there.
        told: From `compare_wordings`.
        pictured: Likewise.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / WORDINGS, (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(out / REPORT, _page(told, pictured).encode())


def _page(told: Mapping[str, Any], pictured: Sequence[Pictured]) -> str:
    sections: list[Section] = []
    for place, (name, region) in enumerate(told["regions"].items()):
        sections += _region(name, region, pictured, place)
    sections.append(Section("Noticed", lines(told["warnings"])))
    facts = {
        "images": told["images"],
        "grounder": told["grounder"]["name"],
        "segmenter": told["segmenter"]["name"],
        "seed": told["seed"],
    }
    return page("Wordings side by side", "Each wording was asked alone, on the same images.", sections, facts)


def _region(name: str, region: Mapping[str, Any], pictured: Sequence[Pictured], place: int) -> Iterator[Section]:
    asked = {text: row for text, row in region["wordings"].items() if "refused" not in row}
    refused = {text: row for text, row in region["wordings"].items() if "refused" in row}
    few = " One group alone: intervals say nothing." if region["groups"] == 1 else ""
    if asked:
        columns = ["wording", "images found in", "mean of its maps"]
        labelled = any("dice" in row for row in asked.values())
        rows = [
            [text, _triple(row["found_share"]), _triple(row["mass"]), *([_triple(row["dice"])] if labelled else [])]
            for text, row in asked.items()
        ]
        columns += ["Dice with the labels"] if labelled else []
        chart = arms_chart({name: [(text, *row["dice"]) for text, row in asked.items()]}) if labelled else ""
        yield Section(
            f"{name}: what each wording finds",
            chart + table(columns, rows),
            "Maps count at 0.5; in brackets 95 % intervals from resampled groups. The wording with the best Dice here "
            "was chosen on these labels: measure it on other images." + few
            if labelled
            else "In brackets 95 % intervals from resampled groups. Without labels, nothing here says which is right."
            + few,
        )
    if region["pairs"]:
        rows = [
            [
                " / ".join(pair["wordings"]),
                _triple(pair["dice"]) if "dice" in pair else "–",
                pair["images"],
                "–" if pair["correlation"] is None else f"{pair['correlation']:.3f}",
            ]
            for pair in region["pairs"]
        ]
        yield Section(
            f"{name}: how far wordings agree",
            table(("wordings", "Dice of both maps", "images where either finds", "correlation of soft maps"), rows),
            "Wordings that agree may be wrong together; those that do not cannot both be right.",
        )
    if refused:
        yield Section(
            f"{name}: refused",
            table(("wording", "why", "hint"), [[t, row["refused"], row["hint"] or "–"] for t, row in refused.items()]),
            "The grounder does not serve these; a run with them would stop.",
        )
    if asked and pictured:
        note = "Tint: the wording's map, its line at 0.5."
        if any(name in item.truth for item in pictured):
            note += " Blue line: the labels."
        yield Section(f"{name}: pictures", _pictures(name, list(asked), pictured, place), note)


def _pictures(name: str, texts: Sequence[str], pictured: Sequence[Pictured], place: int) -> str:
    colour = REGION_COLOURS[place % len(REGION_COLOURS)]
    rows = ""
    for item in pictured[: max(1, _PICTURES_MAX // len(texts))]:
        figures = ""
        for text in texts:
            shown = item.maps[name, text]
            drawn = paint(item.pixels, [(shown, colour)], side_px=_SIDE_PX)
            if name in item.truth:
                drawn = draw_truth(drawn, item.truth[name])
            share = f"{100 * float((shown >= 0.5).mean()):.1f} % of the image"
            figures += (
                f"<figure>{picture(drawn, f'{item.sample_id}: {text}')}<figcaption><b>{escape(text)}</b><br>{share}"
                "</figcaption></figure>"
            )
        rows += f'<div class="case"><h3>{escape(item.sample_id)}</h3><div class="row">{figures}</div></div>'
    panels = min(len(texts), _PANELS_MAX)
    return f'<div class="cases" style="--panels:{panels};--phone:{min(panels, 2)}">{rows}</div>'


def _triple(triple: Sequence[float]) -> str:
    return f"{triple[0]:.3f} ({triple[1]:.3f} to {triple[2]:.3f})"
