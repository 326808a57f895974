"""A recipe's whole chain: corpus, localize, pretrain, finetune, audit, one report. Only this knows all stages.

Every step publishes its own artifact, so the same command continues where it was stopped, and is done in
seconds once all are published.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any, Literal, TypeVar

from pydantic import Field

from shared.artifact import Artifact, Card, read_card, write_atomic
from shared.config import Strict
from shared.errors import DriftError, InputMissingError, MwmError, SpecMismatchError, UsageError
from shared.lease import Lease
from shared.runlog import duration
from shared.workspace import set_aside
from stage1_localize.config import LocalizeConfig
from stage2_pretrain.config import PretrainConfig
from stage3_finetune.config import FinetuneConfig

T = TypeVar("T")


class ChainConfig(Strict):
    """A recipe: what each stage does; a stage that is left out is not run."""

    corpus: Literal["given", "template"] = Field(
        "given", description="Where images and labels come from: --images and --labels, or the packaged template."
    )
    localize: LocalizeConfig = Field(description="Stage 1.")
    pretrain: PretrainConfig | None = Field(None, description="Stage 2.")
    finetune: FinetuneConfig | None = Field(None, description="Stage 3; needs labels.")
    from_scratch: bool = Field(True, description="Also finetune without the encoder, for comparison.")


@dataclass
class Summary:
    """What a chain made: artifacts by step, seconds by step and by arm (about 0 where it was already done)."""

    out: Path
    cards: dict[str, Card] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    arm_seconds: dict[str, float] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "out": self.out.as_posix(),
            "artifacts": {name: card.artifact_id for name, card in self.cards.items()},
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "metrics": {name: card.provenance.metrics for name, card in self.cards.items()},
            "audit": self.audit,
        }

    def lines(self) -> list[str]:
        """Five closing lines: what, where, digests, skipped, what next."""
        skipped = sum(int(card.identity.outputs.get("quarantined", 0)) for card in self.cards.values())
        took = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        digests = ", ".join(f"{name} {card.artifact_id[:12]}" for name, card in self.cards.items())
        return [
            f"made: {' -> '.join(self.cards)} ({took})",
            f"where: {self.out}/report.html",
            f"digests: {digests}",
            f"skipped: {skipped} inputs quarantined",
            f"next: open the report; then your own images: mwm localize --images FOLDER "
            f"--out {quote(f'{self.out}-mine/regions')}",
        ]


def run_chain(
    config: ChainConfig,
    *,
    out: Path,
    images: Path | None = None,
    labels: Path | None = None,
    fresh: bool = False,
    command: str = "",
) -> Summary:
    """Run, or continue, a recipe.

    Args:
        config: The recipe.
        out: Folder of the whole chain.
        images: Images, unless the recipe brings its own.
        labels: Labels, likewise; needed by ``finetune`` only.
        fresh: Keep an existing folder aside and start anew.
        command: Command line for provenance.

    Returns:
        What was made. The chain's report is ``OUT/report.html``.

    Raises:
        MwmError: Whatever a stage raises; DriftError or CorruptError if the closing audit fails.
    """
    check_given(config, images, labels)
    if fresh and (aside := set_aside(out)):
        _say(f"the old run is kept at {aside.name}")
    with Lease(out):
        (out / "run").mkdir(exist_ok=True)
        return _run(config, out, images, labels, command)


def check_given(config: ChainConfig, images: Path | None, labels: Path | None) -> None:
    """Raise where a recipe lacks images or labels, or brings its own beside those that are given."""
    if config.corpus == "template" and (images or labels):
        given = "--images" if images else "--labels"
        raise UsageError(f"{given}: this recipe brings its own images and labels", hint="'mwm init' writes a recipe")
    if config.corpus == "given" and images is None:
        raise InputMissingError(
            "--images: not given, and the recipe brings none of its own",
            hint="--images FOLDER; 'mwm run tour' has its own",
        )
    if config.corpus == "given" and config.finetune is not None and (labels is None or not labels.is_file()):
        raise InputMissingError(
            f"--labels{': not given, and the recipe finetunes' if labels is None else f' {labels}: no such file'}",
            hint="a CSV with the columns sample_id and label; or leave the section 'finetune' out of the recipe",
        )


def _run(config: ChainConfig, out: Path, images: Path | None, labels: Path | None, command: str) -> Summary:
    summary = Summary(out)
    images, labels = _corpus(config, out, images, labels, summary)

    from stage1_localize.job import localize

    store = _step(
        summary, "localize", lambda: localize(config.localize, images=images, out=out / "regions", command=command)
    )
    summary.cards["regions"] = store.card
    if config.pretrain is not None:
        _pretrain(config.pretrain, images, out, summary, command)
    if config.finetune is None and labels is not None:
        _say("--labels is not used: the recipe has no section 'finetune'")
    if config.finetune is not None:
        assert labels is not None
        _finetune(config, config.finetune, images, labels, out, summary, command)
    _audit(out, summary, command)
    _step(summary, "report", lambda: _report(out, summary, config.corpus == "template"))
    return summary


def _step(summary: Summary, name: str, work: Callable[[], T]) -> T:
    started = time.monotonic()
    _say(f"{name} ...")
    result = work()
    summary.seconds[name] = time.monotonic() - started
    _say(f"{name} done in {duration(summary.seconds[name])}")
    return result


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _corpus(
    config: ChainConfig, out: Path, images: Path | None, labels: Path | None, summary: Summary
) -> tuple[Path, Path | None]:
    if config.corpus == "template":
        from pipelines.tour_corpus import write_tour_corpus

        return _step(summary, "corpus", lambda: write_tour_corpus(out))
    assert images is not None
    return images, labels


def _pretrain(config: PretrainConfig, images: Path, out: Path, summary: Summary, command: str) -> None:
    from stage2_pretrain.train import pretrain

    made: Artifact = _step(
        summary,
        "pretrain",
        lambda: pretrain(config, images=images, regions=str(out / "regions"), out=out / "encoder", command=command),
    )
    summary.cards["encoder"] = made.card


def _finetune(
    chain: ChainConfig, config: FinetuneConfig, images: Path, labels: Path, out: Path, summary: Summary, command: str
) -> None:
    from stage3_finetune.train import finetune

    arms: list[tuple[str, str | None]] = [("finetuned", str(out / "encoder"))] if chain.pretrain else []
    if chain.from_scratch or not arms:
        arms.append(("scratch", None))

    def both() -> None:
        for name, encoder in arms:
            started = time.monotonic()
            made = finetune(config, images=images, labels=labels, encoder=encoder, out=out / name, command=command)
            summary.cards[name] = made.card
            summary.arm_seconds[name] = time.monotonic() - started

    _step(summary, "finetune", both)


def _audit(out: Path, summary: Summary, command: str) -> None:
    from pipelines.audit import AuditResult, audit

    level = "masks" if "encoder" in summary.cards else "integrity"

    def published() -> AuditResult:
        try:
            return audit(out, level=level, out=out / "audit", command=command)
        except SpecMismatchError:  # the chain has grown, or its verdicts have changed
            set_aside(out / "audit")
            return audit(out, level=level, out=out / "audit", command=command)

    result = _step(summary, "audit", published)
    if result.exit_code:
        bad = next(row for row in result.rows if row.verdict in ("corrupt", "missing", "drift"))
        raise _failed(result.exit_code, f"audit: {bad.artifact}: {bad.check}: {bad.verdict}; {bad.detail}")
    summary.audit = result.as_dict()
    summary.cards["audit"] = read_card(out / "audit", "audit-report")


def _failed(code: int, message: str) -> MwmError:
    from shared.errors import CorruptError

    hint = "keep the folder for inspection; --fresh makes a new one beside it"
    return CorruptError(message, hint=hint) if code == 4 else DriftError(message, hint=hint)


def _report(out: Path, summary: Summary, template: bool) -> None:
    from pipelines.chain_report import chain_report

    write_atomic(out / "report.html", chain_report(out, summary, template=template).encode())
    line = json.dumps({"pid": os.getpid(), **summary.as_dict()["seconds"]})
    with (out / "run" / "seconds.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
