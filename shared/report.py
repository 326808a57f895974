"""One-file HTML reports of the stages and of a whole chain, from plain arrays and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from typing import Any

import numpy as np

from shared.charts import Row, arms_chart, duration_bars, histogram, interval_chart, line_chart
from shared.gallery import Example, gallery, story, wordings
from shared.page import Made, Section, chips, commands, lineage, lines, listing, page, table

__all__ = [
    "ONE_BRAIN",
    "Example",
    "LeftOut",
    "Made",
    "Section",
    "audit_report",
    "audit_table",
    "chips",
    "finetune_report",
    "gallery",
    "lineage",
    "localize_report",
    "page",
    "pretrain_report",
    "table",
    "tour_report",
]

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]

ONE_BRAIN = "One template brain shows that the pipeline runs, not that pretraining helps."
_MARKS = {"identical": ("ok", "✓"), "tolerant": ("ok", "✓"), "unrecomputable": ("open", "–")}


@dataclass(frozen=True)
class LeftOut:
    """An image that was quarantined.

    Attributes:
        sample_id: As published.
        reason: Its code.
        message: What went wrong, in a line.
    """

    sample_id: str
    reason: str
    message: str


def localize_report(
    *,
    prompts: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    coverage: Mapping[str, Sequence[float]],
    quarantined: Mapping[str, int],
    facts: Mapping[str, object],
    warnings: Sequence[str] = (),
    scores: Mapping[str, Sequence[float]] | None = None,
    measured: int | None = None,
    left_out: Sequence[LeftOut] = (),
) -> str:
    """Report of stage 1.

    Args:
        prompts: Region -> its wordings.
        examples: Some images with their maps.
        coverage: Region -> share of each image at a probability of 0.5 or more.
        quarantined: Reason -> images left out.
        facts: Counts, settings and throughput worth a glance.
        warnings: What a reader should act upon.
        scores: Region -> best score of each image where it has a box, in [0, 1].
        measured: Images that the worst were chosen among.
        left_out: Some of the quarantined images.
    """
    chosen = f"Some evenly spread, and the worst of the {measured} images measured: each says why." if measured else ""
    sections = [
        Section("What was asked", wordings(prompts), "A region's map is the maximum over its wordings."),
        Section("What was found", (f'<p class="lead">{chosen}</p>' if chosen else "") + gallery(examples)),
        _coverage(coverage, scores),
        _left_out(quarantined, warnings, left_out),
    ]
    return page(
        "Region store", "Text prompts turned into a probability map for each image and region.", sections, facts
    )


def pretrain_report(
    *,
    curves: Series,
    hidden: Series,
    examples: Sequence[Example],
    facts: Mapping[str, object],
    warnings: Sequence[str] = (),
    settings: Mapping[str, object] | None = None,
    pace: Series | None = None,
) -> str:
    """Report of stage 2.

    Args:
        curves: Name -> steps and loss.
        hidden: Name (inside, outside, overall) -> epochs and share hidden, 0 to 1.
        examples: With drawn masks and reconstructions.
        facts: Counts and settings worth a glance.
        warnings: What a reader should act upon.
        settings: Dotted key -> value, as resolved.
        pace: Name (throughput, share of time lost) -> epochs and values; a chart each.
    """
    sections = [
        Section("What the encoder saw and what it filled in", gallery(examples)),
        _training(curves, hidden, pace),
        _left_out({}, warnings),
    ]
    if settings:
        sections.append(Section("Settings", table(("setting", "value"), [(k, str(v)) for k, v in settings.items()])))
    return page("Encoder", "Pretrained by reconstructing what the prompts say matters.", sections, facts)


def finetune_report(
    *,
    scores: Sequence[Row],
    more: Sequence[Section],
    curves: Series,
    facts: Mapping[str, object],
    note: str,
    warnings: Sequence[str] = (),
) -> str:
    """Report of stage 3.

    Args:
        scores: Name, value, lower and upper end of its 95 % interval, on the test part.
        more: What the task shows of its answers.
        curves: Name -> steps or epochs and values.
        facts: Counts and settings worth a glance.
        note: How to read the scores: number of groups, how intervals are made.
        warnings: What a reader should act upon.
    """
    losses = {name: line for name, line in curves.items() if "loss" in name}
    others = {name: line for name, line in curves.items() if "loss" not in name}
    charts = [line_chart(losses, x_label="epoch", y_label="loss")] if losses or not others else []
    if others:
        charts.append(line_chart(others, x_label="epoch", y_label="score"))
    sections = [
        Section("Scores on the test part, touched once", interval_chart(scores), note),
        *more,
        Section("How it went", _beside(charts)),
        _left_out({}, warnings),
    ]
    return page("Model", "An encoder with labels: scores on images of groups it never saw.", sections, facts)


def audit_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Verdicts as a table.

    Args:
        rows: ``artifact``, ``check``, ``checked`` (a count), ``verdict``, ``detail``.
    """
    body = "".join(
        f"<tr><td>{escape(str(row['artifact']))}</td><td>{escape(str(row['check']))}</td>"
        f'<td class="n">{int(row["checked"])}</td><td>{_verdict(str(row["verdict"]))}</td>'
        f'<td class="text">{escape(str(row["detail"]))}</td></tr>'
        for row in rows
    )
    head = '<th>artifact</th><th>check</th><th class="n">checked</th><th>verdict</th><th>detail</th>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def audit_report(rows: Sequence[Mapping[str, Any]], more: Sequence[Section] = ()) -> str:
    """Report of an audit: what failed and what could not be recomputed is said first; then ``more``."""
    kinds = [_MARKS.get(str(row["verdict"]), ("bad", ""))[0] for row in rows]
    told = f"{kinds.count('bad')} of {len(rows)} checks did not pass." if "bad" in kinds else "Every check passed."
    if "open" in kinds:
        told = told if "bad" in kinds else f"{kinds.count('ok')} of {len(rows)} checks passed."
        told += f" {kinds.count('open')} could not be recomputed here."
    return page("Audit", told, [Section("Verdicts", audit_table(rows)), *more])


def tour_report(
    *,
    prompts: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    curves: Series,
    hidden: Series,
    arms: Mapping[str, Sequence[Row]],
    audit: Sequence[Mapping[str, Any]],
    made: Sequence[Made],
    again: Sequence[str],
    facts: Mapping[str, object],
    coverage: Mapping[str, Sequence[float]] | None = None,
    learning: Series | None = None,
    chance: Mapping[str, float] | None = None,
    quarantined: Mapping[str, int] | None = None,
    warnings: Sequence[str] = (),
    note: str = "",
    title: str = "From words to a mask to an encoder",
) -> str:
    """Report of a whole chain; a part without content is left out.

    Args:
        prompts: Region -> its wordings.
        examples: With drawn masks and reconstructions; the first one tells the story.
        curves: Of pretraining: name -> steps and loss.
        hidden: Name (inside, outside, overall) -> epochs and share hidden, 0 to 1.
        arms: Start (from the encoder, from scratch) -> its scores on the test part, with 95 % intervals.
        audit: Rows of `audit_table`.
        made: Artifacts in the order of their making.
        again: Commands that make it again and lead on.
        facts: Counts worth a glance.
        coverage: Region -> share of each image at a probability of 0.5 or more.
        learning: Of finetuning: name -> epochs and values.
        chance: Score -> what guessing reaches, for a line to compare with.
        quarantined: Reason -> images left out.
        warnings: What a reader should act upon.
        note: How to read the scores; `ONE_BRAIN` for the template.
        title: Of the page.
    """
    told = [item for item in examples if item.hidden is not None] or list(examples)
    took = [(item.name, item.seconds) for item in made if item.seconds is not None]
    compared = arms_chart(arms, chance=chance) + _scores(arms)
    sections = [
        Section("What the tool did, in one picture", story(told[0], prompts) if told else ""),
        Section("Region maps, drawn masks, reconstructions", gallery(examples) if examples else ""),
        _coverage(coverage) if coverage else Section("", ""),
        _training(curves, hidden) if curves or hidden else Section("", ""),
        Section("From the encoder, and from scratch", compared if arms else "", note if arms else "", loud=True),
        Section("Finetuning", line_chart(learning, x_label="epoch", y_label="value") if learning else ""),
        Section("Audit: recorded, drawn again, compared", audit_table(audit) if audit else ""),
        Section("What was made from what", lineage(made) if made else ""),
        Section("How long it took", duration_bars(took) if took else ""),
        _left_out(quarantined or {}, warnings),
        Section("Make it again", commands(again) if again else ""),
    ]
    subtitle = "Words say what matters in an image; the encoder learns by reconstructing exactly that."
    return page(title, subtitle, sections, facts)


def _scores(arms: Mapping[str, Sequence[Row]]) -> str:
    """Scores down, arms across; a score that an arm lacks is a dash."""
    by_arm = {
        arm: {name: f"{v:.3f} ({low:.3f} to {high:.3f})" for name, v, low, high in rows} for arm, rows in arms.items()
    }
    names = dict.fromkeys(name for found in by_arm.values() for name in found)
    rows = [(name, *(found.get(name, "–") for found in by_arm.values())) for name in names]
    return table(("score (95 % interval)", *arms), rows)


def _coverage(coverage: Mapping[str, Sequence[float]], scores: Mapping[str, Sequence[float]] | None = None) -> Section:
    rows: list[tuple[object, ...]] = [
        (name, len(shares), sum(share == 0 for share in shares), f"{np.median(shares):.1%}" if len(shares) else "none")
        for name, shares in coverage.items()
    ]
    columns: tuple[str, ...] = ("region", "images", "empty maps", "median share")
    charts, styles = "", dict(zip(coverage, cycle(range(1, 6)), strict=False))
    for name, shares in coverage.items():
        told = histogram(shares, x_label="share of the image", style=styles[name])
        charts += f"<figure><h3>{escape(name)}</h3>{told}</figure>"
        if scores is not None:
            told = histogram(scores[name], x_label="best score", style=styles[name], percent=False)
            charts += f"<figure><h3>{escape(name)}, best score</h3>{told}</figure>"
    heading = "How much of the images each region covers"
    note = "Share: pixels at a probability of 0.5 or more. Empty: no such pixel. Columns count images."
    if scores is not None:
        columns += ("images with a box", "median best score")
        rows = [
            (*row, len(scores[name]), f"{np.median(scores[name]):.2f}" if len(scores[name]) else "none")
            for row, name in zip(rows, coverage, strict=True)
        ]
        heading += ", and how sure its boxes are"
        note += " Best score: of an image's boxes for the region, where it has one."
    return Section(
        heading,
        f'{table(columns, rows)}<br><div class="row {"pairs" if scores is not None else "wide"}">{charts}</div>',
        note,
    )


def _training(curves: Series, hidden: Series, pace: Series | None = None) -> Section:
    charts = [line_chart(curves, x_label="step", y_label="loss")]
    charts.append(line_chart(hidden, x_label="epoch", y_label="share hidden", zero=True))
    for name, line in (pace or {}).items():
        charts.append(line_chart({name: line}, x_label="epoch", y_label=name, zero=True))
    return Section("How pretraining went", _beside(charts))


def _beside(charts: Sequence[str]) -> str:
    return f'<div class="row wide">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>'


def _left_out(quarantined: Mapping[str, int], warnings: Sequence[str], left_out: Sequence[LeftOut] = ()) -> Section:
    body = table(("reason", "images"), sorted(quarantined.items())) if quarantined else ""
    body += lines(warnings)
    if left_out:
        total = max(sum(quarantined.values()), len(left_out))
        told = f"{len(left_out)} of {total} images left out" if len(left_out) < total else "Images left out"
        rows = [(item.sample_id, item.reason, item.message) for item in left_out]
        body += f"<br><h3>{told}</h3>{listing(('image', 'reason', 'message'), rows, by=1)}"
        body += '<p class="note">All are in quarantine.jsonl.</p>' if len(left_out) < total else ""
    return Section("Left out and noticed", body or '<p class="muted">Nothing was left out; no warnings.</p>')


def _verdict(verdict: str) -> str:
    kind, mark = _MARKS.get(verdict, ("bad", "✗"))
    return f'<span class="verdict {kind}">{mark} {escape(verdict)}</span>'
