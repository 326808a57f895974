"""The page of a study: plain sentences first, then forest plots, tables, and what is not complete."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from shared.charts import arms_chart, forest_chart
from shared.report import Section, page, table

if TYPE_CHECKING:
    from pipelines.study_config import StudyConfig
    from pipelines.study_summary import Summary, Table

_HOW = (
    "Folds never cut through a group; each image is tested once a round, by a model that saw neither its group's "
    "labels nor, in pretraining, its pixels. Differences are paired by image; intervals resample whole groups. "
    "Models are those after the last epoch: nothing is chosen by the test part. Intervals are of these trained models: "
    "they do not hold what another seed would change, so look at the rounds apart too. Rank scores are pooled over "
    "folds."
)


def study_page(config: StudyConfig, summary: Summary) -> str:
    """The report, one HTML page."""
    sections = [Section("What it says", _sentences(summary), _HOW)]
    for found in summary.tables:
        for score, compared in found.scores.items():
            rows = [(f"{d.arm} against {d.than}", d.value, d.low, d.high) for d in compared.differences]
            smallest = max((d.smallest for d in compared.differences), default=0.0)
            note = (
                f"{compared.images} images in {compared.groups} groups, {_folds(found, config)}. A true difference "
                f"below {100 * smallest:.1f} points would not be told from none (80 % power, 5 % level)."
            )
            if found.rounds > 1:
                told = "; ".join(
                    f"{d.arm} {', '.join(f'{100 * gap:+.1f}' for gap in d.by_round)}" for d in compared.differences
                )
                note += f" By round: {told}."
            if config.corpora[found.corpus].supervised:
                note += " The grounder has been taught by labels of this set: its regions are supervised here."
            sections.append(Section(f"{found.corpus}, {found.endpoint}: {score}", forest_chart(rows), note))
        named = {
            arm: [(score, *compared.scores[arm]) for score, compared in found.scores.items()] for arm in found.arms
        }
        sections.append(Section(f"{found.corpus}, {found.endpoint}: every arm", arms_chart(named)))
    sections.append(
        Section("What was hidden", _hidden(summary), "Arms are compared fairly only at equal shares overall.")
    )
    if summary.open:
        listed = "".join(f"<li>{escape(name)}</li>" for name in summary.open[:50])
        more = f"<p>and {len(summary.open) - 50} more</p>" if len(summary.open) > 50 else ""
        sections.append(Section("Not complete", f"<ul>{listed}</ul>{more}", "The same command continues."))
    facts = {"runs": f"{summary.done} of {summary.total}", "folds": config.folds, "rounds": config.rounds}
    return page("Study", "Does masking what matters help? A comparison at equal budgets.", sections, facts)


def _folds(found: Table, config: StudyConfig) -> str:
    return (
        f"{found.rounds} whole rounds" if found.rounds else f"{found.folds} of {config.folds} folds of the first round"
    )


def _sentences(summary: Summary) -> str:
    rows = "".join(f"<li><b>{escape(text)}</b>: {escape(said)}</li>" for text, said in summary.claims)
    return f"<ul>{rows}</ul>" if rows else "<p>No claim is held against it.</p>"


def _hidden(summary: Summary) -> str:
    rows: list[Sequence[object]] = [
        (corpus, arm, *("" if share is None else f"{100 * share:.1f} %" for share in shares))
        for corpus, arms in summary.hidden.items()
        for arm, shares in arms.items()
    ]
    return table(("corpus", "arm", "overall", "inside regions", "outside"), rows) if rows else ""
