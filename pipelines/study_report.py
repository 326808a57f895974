"""The page of a study: plain sentences first, then forest plots, tables, and what is not complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from shared.charts import arms_chart, forest_chart, line_chart
from shared.report import Section, page, table

if TYPE_CHECKING:
    from pipelines.study_config import StudyConfig
    from pipelines.study_summary import Summary, Table

_HOW = (
    "Folds never cut through a group; each image is tested once a round, by a model that saw neither its group's "
    "labels nor, in pretraining, its pixels. Differences are paired by image; intervals resample whole groups. "
    "Models are those after the last epoch: nothing is chosen by the test part. Each fold has a seed of its own: the "
    "second interval of a difference is over these seeds (corrected resampled t-test), the first over groups, of the "
    "models as they were trained. A difference is called real where both say so. A score is the mean over folds."
)


def study_page(config: StudyConfig, summary: Summary) -> str:
    """The report, one HTML page."""
    sections = [Section("What it says", _sentences(summary), _HOW)]
    for found in summary.tables:
        here = (found.corpus, found.endpoint)
        claimed = [claim.score for claim in config.claims if (claim.corpus, claim.endpoint) == here]
        shown = [score for score in found.scores if score in claimed] or list(found.scores)[:1]
        sections += [_forest(config, found, score) for score in shown]
        named = {
            arm: [(score, *compared.scores[arm]) for score, compared in found.scores.items()] for arm in found.arms
        }
        sections.append(Section(f"{found.corpus}, {found.endpoint}: every arm", arms_chart(named)))
        sections.append(Section(f"{found.corpus}, {found.endpoint}: every difference", _differences(found)))
    sections += _efficiency(config, summary)
    sections.append(
        Section("What was hidden", _hidden(summary), "Arms are compared fairly only at equal shares overall.")
    )
    if summary.open:
        listed = "".join(f"<li>{escape(name)}</li>" for name in summary.open[:50])
        more = f"<p>and {len(summary.open) - 50} more</p>" if len(summary.open) > 50 else ""
        sections.append(Section("Not complete", f"<ul>{listed}</ul>{more}", "The same command continues."))
    facts = {"runs": f"{summary.done} of {summary.total}", "folds": config.folds, "rounds": config.rounds}
    return page("Study", "Does masking what matters help? A comparison at equal budgets.", sections, facts)


def _forest(config: StudyConfig, found: Table, score: str) -> Section:
    """The differences of one score, each with its two intervals."""
    compared = found.scores[score]
    rows = []
    for d in compared.differences:
        rows.append((f"{d.arm} against {d.than}, over groups", d.value, d.low, d.high))
        if math.isfinite(d.seed_error):
            rows.append((f"over {len(d.by_seed)} seeds", d.value, d.seed_low, d.seed_high))
    smallest = max((d.smallest for d in compared.differences), default=0.0)
    note = f"{compared.images} images in {compared.groups} groups, {_folds(found, config)}. " + (
        f"A true difference below {100 * smallest:.1f} points would not be told from none (80 % power, 5 % level)."
        if math.isfinite(smallest)
        else "With one seed no difference can be told from none."
    )
    stores = {name: config.arms[name].store for name in found.arms if config.arms[name].pretrain is not None}
    if config.corpora[found.corpus].supervised and "localized" in stores.values():
        note += " The grounder has been taught by labels of this set: its regions are supervised here."
    if unseen := [name for name, store in stores.items() if store == "cross-fitted"]:
        note += (
            f" Regions of {', '.join(unseen)}: by heads fitted on outlines of this set, each image by one that never "
            "saw its group; groups that a fold tests are among the others."
        )
    return Section(f"{found.corpus}, {found.endpoint}: {score}", forest_chart(rows), note)


def _differences(found: Table) -> str:
    """Every score's differences, in points."""
    rows = [
        (
            score,
            f"{d.arm} against {d.than}",
            f"{100 * d.value:+.1f}",
            f"{100 * d.low:+.1f} to {100 * d.high:+.1f}",
            f"{100 * d.seed_low:+.1f} to {100 * d.seed_high:+.1f}" if math.isfinite(d.seed_error) else "",
            ", ".join(f"{100 * gap:+.1f}" for gap in d.by_seed),
        )
        for score, compared in found.scores.items()
        for d in compared.differences
    ]
    return table(("score", "arms", "points", "over groups", "over seeds", "each seed"), rows)


def _efficiency(config: StudyConfig, summary: Summary) -> list[Section]:
    """Scores by the share of labels, where endpoints of a corpus differ in nothing but their ``fraction_milli``."""
    alike: dict[str, list[tuple[int, Table]]] = {}
    for found in summary.tables:
        settings = dict(config.corpora[found.corpus].endpoints[found.endpoint].finetune)
        share = int(settings.pop("fraction_milli", config.finetune.fraction_milli))
        alike.setdefault(f"{found.corpus}: {settings}", []).append((share, found))
    sections = []
    for tables in alike.values():
        shares = sorted(tables, key=lambda item: item[0])
        if len({share for share, _ in shares}) < 2:
            continue
        first = shares[0][1]
        score = next(iter(first.scores))
        series = {
            arm: ([share / 10 for share, _ in shares], [found.scores[score].scores[arm][0] for _, found in shares])
            for arm in first.arms
        }
        title = f"{first.corpus}, {', '.join(found.endpoint for _, found in shares)}: labels needed"
        drawn = line_chart(series, x_label="training groups that keep their labels, %", y_label=score)
        sections.append(Section(title, drawn, "Smaller shares lie in larger ones, alike in all arms."))
    return sections


def _folds(found: Table, config: StudyConfig) -> str:
    if found.rounds:
        return f"{found.rounds} whole round{'s' * (found.rounds > 1)} of {config.folds} folds"
    return f"{found.folds} of {config.folds} folds of the first round"


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
