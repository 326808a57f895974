"""The report of a fine-tuning run, from its scores and its metrics lines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.artifact import write_atomic
from shared.report import Case, finetune_report
from shared.runlog import read_metrics
from stage3_finetune.contracts import Scores

_HOW = (
    "Scores of the weights after the last epoch; nothing was chosen by the test part. Intervals: {resamples}"
    " bootstrap resamples of whole groups, 2.5th to 97.5th percentile; few groups make rough intervals."
)


def write_report(
    out: Path,
    scores: Scores,
    *,
    beside: tuple[int, Scores] | None,
    per_epoch: int,
    resamples: int,
    facts: dict[str, Any],
    warnings: Sequence[str],
    worst: Sequence[Case] = (),
) -> None:
    """Write ``report.html``.

    Args:
        out: The run's folder.
        scores: Of the test part.
        beside: The epoch that was best on val, and the test scores of its weights; None without a val part.
        per_epoch: Steps of an epoch.
        resamples: Behind each interval.
        facts: Counts and settings worth a glance.
        warnings: What a reader should act upon.
        worst: Cases where the model was most sure and wrong.
    """
    rows, plain = [], {}
    for name, found in scores.named().items():
        if found.value is None or found.low is None or found.high is None:
            plain[name] = str(found)
        else:
            rows.append((name, found.value, found.low, found.high))
    notes = [f"{scores.lines()[1]}.", _HOW.format(resamples=resamples), scores.note]
    if beside is not None:
        notes.append(f"Beside it, the weights that were best on val, epoch {beside[0]}: {beside[1].lines()[0]}.")
    html = finetune_report(
        scores=rows,
        more=scores.sections(),
        curves=curves(read_metrics(out), per_epoch),
        facts={**facts, **plain},
        note=" ".join(notes),
        warnings=warnings,
        worst=worst,
    )
    write_atomic(out / "report.html", html.encode())


def curves(rows: Sequence[dict[str, Any]], per_epoch: int) -> dict[str, tuple[list[float], list[float]]]:
    """Mean training loss of each epoch, and what val said after it.

    Args:
        rows: Lines of ``metrics.jsonl``.
        per_epoch: Steps of an epoch.

    Returns:
        Name -> epochs and values; a value that was undefined is left out.
    """
    losses = defaultdict(list)
    val: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if "loss" in row:
            losses[-(-row["step"] // per_epoch)].append(row["loss"])
        for key in row:
            if key.startswith("val_") and row[key] is not None:
                epochs, values = val.setdefault(key.replace("_", " ").replace("auroc", "AUROC"), ([], []))
                epochs.append(float(row["epoch"]))
                values.append(float(row[key]))
    training = ([float(epoch) for epoch in losses], [float(np.mean(values)) for values in losses.values()])
    return {"training loss": training, **val}
