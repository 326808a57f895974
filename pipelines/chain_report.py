"""The page that opens after a chain: what the tool did to some images, the scores, the audit, the lineage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.artifact import Card
from shared.charts import interval_chart, line_chart
from shared.figures import REGION_COLOURS, overlay, strip
from shared.report import Example, Section, audit_table, chips, gallery, page, table
from shared.runlog import read_metrics

if TYPE_CHECKING:
    from pipelines.chain import Summary

_TEMPLATE_NOTE = "One template brain shows that the pipeline runs, not that pretraining helps."
_SHARES = {"hidden_inside_share": "inside", "hidden_outside_share": "outside", "hidden_share": "overall"}
_ARMS = {"finetuned": "from the encoder", "scratch": "from scratch"}


def chain_report(out: Path, summary: Summary, *, template: bool) -> str:
    """Write the page of a finished chain.

    Args:
        out: The chain's folder.
        summary: What was made.
        template: The corpus is the packaged template: the page says what that can show.

    Returns:
        HTML.
    """
    cards = summary.cards
    sections = [_asked(cards["regions"])]
    if "encoder" in cards:
        sections += [_seen(out), _trained(out)]
    arms = {name: cards[name] for name in _ARMS if name in cards}
    if arms:
        sections.append(_scores(arms, template))
    if summary.audit:
        sections.append(
            Section("Audit: drawn again, compared with what was recorded", audit_table(summary.audit["rows"]))
        )
    sections += [_lineage(cards), _again()]
    facts: dict[str, object] = {
        "images": cards["regions"].identity.outputs["samples"],
        "regions": len(_regions(cards["regions"])),
    }
    facts |= {f"{name}, seconds": f"{value:.0f}" for name, value in summary.seconds.items() if value >= 0.5}
    subtitle = "Words say what matters in an image; the encoder learns by reconstructing exactly that."
    return page("Mask What Matters: the whole chain", subtitle, sections, facts)


def opening_picture(out: Path, prompts: dict[str, list[str]], region: str, index: int = 0) -> bytes:
    """The strip that opens the README: prompt, image, region map, drawn mask, reconstruction, as PNG."""
    from stage2_pretrain.pictures import read_examples

    item = read_examples(out / "encoder")[index]
    colour = REGION_COLOURS[list(item.maps).index(region) % len(REGION_COLOURS)]
    assert item.reconstruction is not None
    panels = [
        ("image", overlay(item.image, side_px=232)),
        (f"region map of “{prompts[region][0]}”", overlay(item.image, item.maps[region], colour=colour, side_px=232)),
        ("drawn mask", overlay(item.image, hidden=item.hidden, side_px=232)),
        ("reconstruction", overlay(item.reconstruction, side_px=232)),
    ]
    return strip(panels, title=f"Words say what matters: “{prompts[region][0]}”")


def _regions(card: Card) -> list[dict[str, Any]]:
    return list(card.identity.spec["regions"])


def _asked(card: Card) -> Section:
    rows = "".join(f"<p><b>{chips([item['name']])}</b>{chips(item['texts'])}</p>" for item in _regions(card))
    return Section("What was asked", rows, "Region, then the wordings that mean it; a region's map is their maximum.")


def _seen(out: Path) -> Section:
    from stage2_pretrain.pictures import read_examples

    examples: list[Example] = read_examples(out / "encoder")
    note = (
        "Tint: probability; outline: probability 0.5. Dark cells were hidden from the encoder and had to be filled in."
    )
    return Section("Image, region maps, drawn mask, reconstruction", gallery(examples), note)


def _trained(out: Path) -> Section:
    rows = read_metrics(out / "encoder")
    loss = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    shares: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for key, label in _SHARES.items():
            if "epoch" in row and row.get(key) is not None:
                epochs, values = shares.setdefault(label, ([], []))
                epochs.append(row["epoch"])
                values.append(row[key])
    charts = (
        line_chart(
            {"loss": ([step for step, _ in loss], [value for _, value in loss])}, x_label="step", y_label="loss"
        ),
        line_chart(shares, x_label="epoch", y_label="share hidden", zero=True),
    )
    return Section(
        "Pretraining", '<div class="row wide">' + "".join(f"<div>{chart}</div>" for chart in charts) + "</div>"
    )


def _scores(arms: dict[str, Card], template: bool) -> Section:
    rows, plotted = [], []
    for name, card in arms.items():
        for score in ("accuracy", "balanced_accuracy", "auroc"):
            found, name_of = card.provenance.metrics["test"][score], score.replace("_", " ").replace("auroc", "AUROC")
            interval = f"{found['low']:.3f} to {found['high']:.3f}" if found["low"] is not None else "none"
            rows.append(
                (_ARMS[name], name_of, "undefined" if found["value"] is None else f"{found['value']:.3f}", interval)
            )
            if found["low"] is not None:
                plotted.append((f"{name_of}, {_ARMS[name]}", found["value"], found["low"], found["high"]))
    plotted.sort()
    body = table(("start", "score", "test", "95 % interval by group"), rows) + interval_chart(plotted)
    return Section("Finetuning, scored on the test part once", body, _TEMPLATE_NOTE if template else "")


def _lineage(cards: dict[str, Card]) -> Section:
    rows = [
        (name, card.identity.kind, card.artifact_id, ", ".join(item.artifact_id[:12] for item in card.identity.inputs))
        for name, card in cards.items()
    ]
    return Section("What was made from what", table(("folder", "kind", "artifact id (sha256)", "made from"), rows))


def _again() -> Section:
    lines = ("mwm run tour", "mwm audit OUT --level masks", "mwm inspect OUT/regions", "mwm localize --help")
    return Section("Next", "".join(f"<p><code>{line}</code></p>" for line in lines), "OUT is this page's folder.")
