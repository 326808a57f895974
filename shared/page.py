"""The page of every report: one file, no request, no text that is not escaped, no script but its own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from numbers import Integral, Real

from shared.artifact import NOT_FOR_DIAGNOSIS

_NAVIGATION_FROM = 5
_LONG_TEXT = 16
_MARK = (
    '<svg viewBox="0 0 26 26" aria-hidden="true"><rect width="26" height="26" rx="6" fill="#1b2230"/>'
    '<path d="M6 6h4v4H6zM16 6h4v4h-4zM6 16h4v4H6zM16 16h4v4h-4z" fill="#566172"/>'
    '<path d="M11 6h4v4h-4zM6 11h4v4H6zM11 11h4v4h-4zM16 11h4v4h-4zM11 16h4v4h-4z" fill="#ffb020"/></svg>'
)


@dataclass(frozen=True)
class Section:
    """A card of a page.

    Attributes:
        heading: Text.
        body: HTML.
        note: Text below the body.
        loud: The note is what a reader must not miss.
    """

    heading: str
    body: str
    note: str = ""
    loud: bool = False


@dataclass(frozen=True)
class Made:
    """An artifact in a lineage.

    Attributes:
        name: Of its folder.
        kind: Of the artifact.
        artifact_id: 64 hexadecimal digits.
        inputs: Artifact ids or names of what it was made from.
        seconds: Its making took, or None where it was there already.
    """

    name: str
    kind: str
    artifact_id: str
    inputs: Sequence[str] = ()
    seconds: float | None = None


def page(title: str, subtitle: str, sections: Iterable[Section], facts: Mapping[str, object] | None = None) -> str:
    """A whole HTML page.

    Its content policy forbids every request and every script but the one packaged here, by digest.

    Args:
        title: Also the window's.
        subtitle: One or two sentences.
        sections: Cards, top to bottom; from five on, links to them stand at the top.
        facts: Short values shown above the cards.
    """
    style, script = _packaged("report.css"), _packaged("report.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    cards = [item for item in sections if item.body or item.note]
    links = "".join(f'<a href="#s{place}">{escape(item.heading)}</a>' for place, item in enumerate(cards, 1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">\n<style>\n{style}</style></head>\n<body><main>'
        f'<header><p class="brand">{_MARK}Mask What Matters</p><h1>{escape(title)}</h1>'
        f'<p class="sub">{escape(subtitle)}</p><p class="notice">{NOT_FOR_DIAGNOSIS}</p>'
        + (f"<nav>{links}</nav>" if len(cards) >= _NAVIGATION_FROM else "")
        + f"</header>\n{_facts(facts or {})}"
        + "".join(_card(place, item) for place, item in enumerate(cards, 1))
        + f"<footer><span>Mask What Matters</span><span>{NOT_FOR_DIAGNOSIS}</span></footer></main>\n"
        f"<script>{script}</script></body></html>\n"
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers (and columns of them) are set right, everything is escaped."""
    kept = [tuple(row) for row in rows]
    right = [bool(kept) and all(_numeric(row[place]) for row in kept) for place in range(len(columns))]
    head = "".join(
        f'<th scope="col"{_ALIGN if there else ""}>{escape(name)}</th>'
        for name, there in zip(columns, right, strict=True)
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{_ALIGN if there or isinstance(cell, Real) else ''}>{_shown(cell)}</td>"
            for cell, there in zip(row, right, strict=True)
        )
        + "</tr>"
        for row in kept
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def listing(columns: Sequence[str], rows: Sequence[Sequence[object]], *, by: int) -> str:
    """A `table` of which a script, where it runs, shows only the rows that have a chosen value in a column.

    Args:
        columns: Headings.
        rows: Cells; all are escaped.
        by: The column to choose by.
    """
    values = dict.fromkeys(str(row[by]) for row in rows)
    bar = (
        f'<div class="controls" hidden>{select(columns[by], values)}<output class="count"></output></div>'
        if len(values) > 1
        else ""
    )
    return f'<div class="listing" data-by="{by}">{bar}{table(columns, rows)}</div>'


def select(name: str, values: Iterable[str]) -> str:
    """A choice of one value, or of all, for a script to read; everything is escaped."""
    options = "".join(f'<option value="{escape(value, quote=True)}">{escape(value)}</option>' for value in values)
    # Without autocomplete: a page that is loaded again shows all, and so must its controls.
    return f'<label>{escape(name)} <select autocomplete="off"><option value="">all</option>{options}</select></label>'


def chips(texts: Iterable[str]) -> str:
    """Short texts side by side, e.g. the wordings of a prompt."""
    return "".join(f'<span class="chip">{escape(text)}</span>' for text in texts)


def commands(lines: Iterable[str]) -> str:
    """Lines to type, as a block."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"


def digest(value: str) -> str:
    """A digest whole, its first 12 digits to be seen at a glance."""
    return f'<code class="id"><b>{escape(value[:12])}</b>{escape(value[12:])}</code>'


def lineage(made: Sequence[Made]) -> str:
    """What was made from what: a line to see, a table with whole digests to compare."""
    names = {item.artifact_id: item.name for item in made}
    flow = ""
    for before, item in zip([None, *made], made, strict=False):
        # An arrow only where one was made from the other; two arms stand side by side.
        mark = "" if before is None else "→" if {before.name, before.artifact_id} & {*item.inputs} else "+"
        flow += f'<i aria-hidden="true">{mark}</i>' if mark else ""
        flow += f"<span>{escape(item.name)}<small>{escape(item.kind)}</small></span>"
    rows = "".join(
        f"<tr><td>{escape(item.name)}</td><td>{escape(item.kind)}</td>"
        f"<td>{escape(', '.join(names.get(source, source[:12]) for source in item.inputs)) or '–'}</td>"
        f'<td class="text">{digest(item.artifact_id)}</td></tr>'
        for item in made
    )
    head = "<th>folder</th><th>kind</th><th>made from</th><th>artifact id (sha256)</th>"
    return (
        f'<div class="flow">{flow}</div><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def lines(texts: Iterable[str]) -> str:
    """A paragraph each."""
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


_ALIGN = ' class="n"'
_NUMBER = re.compile(r"-?\d+(\.\d+)?( ?(%|s))?")


def _facts(facts: Mapping[str, object]) -> str:
    if not facts:
        return ""
    items = []
    for key, value in facts.items():
        text = _plain(value)
        long = ' class="long"' if len(text) > _LONG_TEXT else ""
        items.append(f"<div><dt>{escape(key)}</dt><dd{long}>{escape(text)}</dd></div>")
    return f"<dl>{''.join(items)}</dl>\n"


def _card(place: int, item: Section) -> str:
    note = f'<p class="note{" loud" if item.loud else ""}">{escape(item.note)}</p>' if item.note else ""
    return f'<section id="s{place}"><h2>{escape(item.heading)}</h2>{item.body}{note}</section>\n'


def _plain(value: object) -> str:
    """Whole numbers with thin spaces between thousands, other numbers to three digits, all else as text."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, Integral):
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{float(value):.3f}" if isinstance(value, Real) else str(value)


def _shown(cell: object) -> str:
    return escape(_plain(cell))


def _numeric(cell: object) -> bool:
    return isinstance(cell, Real) or (isinstance(cell, str) and _NUMBER.fullmatch(cell) is not None)


@cache
def _packaged(name: str) -> str:
    return files("shared").joinpath(name).read_text("utf-8")
