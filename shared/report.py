"""One-file HTML reports: no request leaves the page, nothing needs a script, all text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from shared.artifact import NOT_FOR_DIAGNOSIS
from shared.figures import REGION_COLOURS, histogram, interval_chart, line_chart, overlay, picture

_STYLE = """
:root{--bg:#fbfbfa;--card:#fff;--ink:#1b222c;--muted:#5d6775;--line:#e3e6ea;--c1:#b45f06;--c2:#0b7a75;--c3:#b0256b;
--c4:#4553c7;--c5:#557a12;--ok:#1c7c3c;--bad:#b3261e;--warn:#fff4dc;--warnink:#5f4300}
@media(prefers-color-scheme:dark){:root{--bg:#11151c;--card:#191f29;--ink:#e8ecf2;--muted:#9aa6b6;--line:#2b3442;
--c1:#ffb347;--c2:#4fd1c5;--c3:#f687b3;--c4:#9aa5ff;--c5:#a3d154;--ok:#68d391;--bad:#fc8b84;--warn:#3a2f14;
--warnink:#ffdd94}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif}main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}h2{font-size:1.2rem;margin:0 0 10px}
.sub{color:var(--muted);margin:0 0 18px;max-width:75ch}.notice{display:inline-block;background:var(--warn);
color:var(--warnink);border-radius:6px;padding:4px 12px;font-size:.9rem;margin:0 0 20px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px;margin:0 0 18px;
overflow-x:auto}.muted,.note{color:var(--muted);font-size:.92rem;max-width:85ch}.note{margin:12px 0 0}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(165px,1fr));gap:12px 20px;margin:0 0 20px}
dt{color:var(--muted);font-size:.82rem}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:.93rem}th{text-align:left;color:var(--muted);font-weight:500}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code{font:.88em ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:0 0 16px}
.row.wide{grid-template-columns:repeat(auto-fit,minmax(300px,1fr))}figure{margin:0}
figure img{width:100%;height:auto;border-radius:8px;display:block;background:#000}
figcaption{font-size:.85rem;color:var(--muted);margin-top:5px;overflow-wrap:anywhere}figcaption b{color:var(--ink)}
.chart{width:100%;max-width:560px;height:auto;display:block}.chart.small{max-width:340px}
.chart text{fill:var(--muted);font-size:12px}.chart .grid{stroke:var(--line)}
.chart polyline{fill:none;stroke-width:2;stroke-linejoin:round}.chart .bar{stroke:var(--c2);stroke-width:5;
stroke-linecap:round;opacity:.45}.chart .dot,.chart .column{fill:var(--c2)}
.legend{font-size:.85rem;color:var(--muted);margin:4px 0 0;display:flex;flex-wrap:wrap;gap:4px 16px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.legend b{color:var(--ink);font-weight:500}.ok{color:var(--ok);font-weight:600}.bad{color:var(--bad);font-weight:600}
.chip{border:1px solid var(--line);border-radius:99px;padding:1px 10px;margin:0 4px 4px 0;display:inline-block;
font-size:.88rem}footer{color:var(--muted);font-size:.85rem}
@media print{body{background:#fff}section{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Section:
    """A card of a page: heading as text, body as HTML, a note as text."""

    heading: str
    body: str
    note: str = ""


@dataclass(frozen=True)
class Example:
    """One image with what was made of it.

    Attributes:
        sample_id: Shown under the pictures.
        image: Float [C, H, W] in [0, 1].
        maps: Region name -> float [h, w] in [0, 1].
        hidden: Bool [gh, gw], or None.
        reconstruction: Float [C, H, W] in [0, 1], or None.
    """

    sample_id: str
    image: np.ndarray[Any, Any]
    maps: Mapping[str, np.ndarray[Any, Any]]
    hidden: np.ndarray[Any, Any] | None = None
    reconstruction: np.ndarray[Any, Any] | None = None


def page(title: str, subtitle: str, sections: Iterable[Section], facts: Mapping[str, object] | None = None) -> str:
    """A whole HTML page.

    Args:
        title: Also the window's.
        subtitle: One or two sentences.
        sections: Cards, top to bottom.
        facts: Short values shown above the cards.
    """
    shown = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in (facts or {}).items()
    )
    cards = "".join(
        f"<section><h2>{escape(item.heading)}</h2>{item.body}"
        + (f'<p class="note">{escape(item.note)}</p>' if item.note else "")
        + "</section>"
        for item in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><main>'
        f'<h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p><p class="notice">{NOT_FOR_DIAGNOSIS}</p>'
        + (f"<dl>{shown}</dl>" if shown else "")
        + f"{cards}<footer>Mask What Matters. {NOT_FOR_DIAGNOSIS}</footer></main></body></html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers are set right, everything is escaped."""
    head, lines = "".join(f"<th>{escape(name)}</th>" for name in columns), []
    for row in rows:
        cells = "".join(
            f'<td class="n">{_shown(cell)}</td>' if isinstance(cell, int | float) else f"<td>{_shown(cell)}</td>"
            for cell in row
        )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def gallery(examples: Iterable[Example]) -> str:
    """A row of pictures an example: image, region maps, drawn mask, reconstruction."""
    rows = []
    for item in examples:
        figures = [_figure(overlay(item.image), "image", item.sample_id)]
        for index, (name, region_map) in enumerate(item.maps.items()):
            colour = REGION_COLOURS[index % len(REGION_COLOURS)]
            figures.append(_figure(overlay(item.image, region_map, colour=colour), "region map", name))
        if item.hidden is not None:
            share = f"{item.hidden.mean():.0%} of the image hidden"
            figures.append(_figure(overlay(item.image, hidden=item.hidden), "drawn mask", share))
        if item.reconstruction is not None:
            figures.append(
                _figure(overlay(item.reconstruction), "reconstruction", "hidden patches as the model fills them")
            )
        rows.append(f'<div class="row">{"".join(figures)}</div>')
    return "".join(rows)


def chips(texts: Iterable[str]) -> str:
    """Short texts side by side, e.g. the wordings of a prompt."""
    return "".join(f'<span class="chip">{escape(text)}</span>' for text in texts)


def localize_report(
    *,
    prompts: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    coverage: Mapping[str, Sequence[float]],
    quarantined: Mapping[str, int],
    facts: Mapping[str, object],
    warnings: Sequence[str] = (),
) -> str:
    """Report of stage 1.

    Args:
        prompts: Region -> its wordings.
        examples: Some images with their maps.
        coverage: Region -> share of each image at a probability of 0.5 or more.
        quarantined: Reason -> images left out.
        facts: Counts and settings worth a glance.
        warnings: What a reader should act upon.
    """
    asked = table(
        ("region", "wordings", "images", "of them empty", "median share"),
        [
            (
                name,
                ", ".join(texts),
                len(coverage[name]),
                sum(value == 0 for value in coverage[name]),
                f"{np.median(coverage[name]):.1%}" if coverage[name] else "none",
            )
            for name, texts in prompts.items()
        ],
    )
    spread = "".join(
        f"<figure>{histogram(values, x_label='share of the image')}<figcaption>{escape(name)}</figcaption></figure>"
        for name, values in coverage.items()
    )
    sections = [
        Section("What was asked", asked),
        Section("What was found", gallery(examples), "Tint: probability. Outline: probability 0.5."),
        Section("How much of the images each region covers", f'<div class="row wide">{spread}</div>'),
        _left_out(quarantined, warnings),
    ]
    return page(
        "Region store", "Text prompts turned into a probability map for each image and region.", sections, facts
    )


def pretrain_report(
    *,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    hidden: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    examples: Sequence[Example],
    facts: Mapping[str, object],
    warnings: Sequence[str] = (),
) -> str:
    """Report of stage 2.

    Args:
        curves: Name -> steps and loss.
        hidden: Name (inside, outside, overall) -> epochs and share hidden, 0 to 1.
        examples: With drawn masks and reconstructions.
        facts: Counts and settings worth a glance.
        warnings: What a reader should act upon.
    """
    charts = (
        f'<div class="row wide"><div>{line_chart(curves, x_label="step", y_label="loss")}</div>'
        f"<div>{line_chart(hidden, x_label='epoch', y_label='share hidden', zero=True)}</div></div>"
    )
    sections = [
        Section("What the encoder saw and what it filled in", gallery(examples)),
        Section("How it went", charts),
        _left_out({}, warnings),
    ]
    return page("Encoder", "Pretrained by reconstructing what the prompts say matters.", sections, facts)


def finetune_report(
    *,
    scores: Sequence[tuple[str, float, float, float]],
    classes: Sequence[str],
    confusion: Sequence[Sequence[int]],
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    facts: Mapping[str, object],
    note: str,
    warnings: Sequence[str] = (),
) -> str:
    """Report of stage 3.

    Args:
        scores: Name, value, lower and upper end of its 95 % interval, on the test part.
        classes: Names in the order of ``confusion``.
        confusion: Rows are labels, columns predictions; counts.
        curves: Name -> steps or epochs and values.
        facts: Counts and settings worth a glance.
        note: How to read the scores: number of groups, how intervals are made.
        warnings: What a reader should act upon.
    """
    rows = [(name, f"{value:.3f}", f"{low:.3f} to {high:.3f}") for name, value, low, high in scores]
    body = table(("score", "value", "95 % interval"), rows) + interval_chart(scores)
    matrix = table(
        ("label \\ predicted", *classes), [(name, *row) for name, row in zip(classes, confusion, strict=True)]
    )
    sections = [
        Section("Scores on the test part, touched once", body, note),
        Section("Which class was taken for which", matrix),
        Section("How it went", line_chart(curves, x_label="epoch", y_label="value")),
        _left_out({}, warnings),
    ]
    return page("Model", "An encoder with labels: scores on images of groups it never saw.", sections, facts)


def audit_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Verdicts as a table."""
    lines = "".join(
        f"<tr><td>{escape(str(row['artifact']))}</td><td>{escape(str(row['check']))}</td>"
        f'<td class="n">{int(row["checked"])}</td>'
        f'<td class="{"ok" if row["verdict"] == "identical" else "bad"}">{escape(str(row["verdict"]))}</td>'
        f"<td>{escape(str(row['detail']))}</td></tr>"
        for row in rows
    )
    head = '<th>artifact</th><th>check</th><th class="n">checked</th><th>verdict</th><th>detail</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def audit_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Report of an audit."""
    bad = sum(row["verdict"] != "identical" for row in rows)
    told = "Every check passed." if not bad else f"{bad} of {len(rows)} checks did not pass."
    return page("Audit", told, [Section("Verdicts", audit_table(rows))])


def _left_out(quarantined: Mapping[str, int], warnings: Sequence[str]) -> Section:
    lines = [(reason, count) for reason, count in sorted(quarantined.items())]
    body = table(("reason", "images"), lines) if lines else ""
    body += "".join(f"<p>{escape(text)}</p>" for text in warnings)
    return Section("Left out and noticed", body or '<p class="muted">Nothing was left out; no warnings.</p>')


def _figure(pixels: np.ndarray[Any, Any], what: str, caption: str) -> str:
    shown = picture(pixels, f"{what}: {caption}")
    return f"<figure>{shown}<figcaption><b>{escape(what)}</b> {escape(caption)}</figcaption></figure>"


def _shown(cell: object) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else escape(str(cell))
