"""Scores of a published model, computed again from its predictions: metrics stand on a card outside of its id."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.artifact import Card
from shared.errors import IncompatibleError
from stage3_finetune.metrics import score
from stage3_finetune.predictions import Predictions, load_predictions

_TOLERANCE = 1e-9
"""Scores are ratios of counts and percentiles of them: only the last digits may differ between NumPy releases."""


def rescore(folder: Path, card: Card) -> list[str]:
    """Compare every score on a model's card with the one that its predictions give.

    Args:
        folder: The artifact.
        card: Its card.

    Returns:
        One line for each number that differs: its name, what the card says, what the predictions give.

    Raises:
        CorruptError: The predictions are no table.
        IncompatibleError: The card does not say how it was scored, or names another task than this release scores.
    """
    try:
        config = card.identity.spec["config"]
        task, seed, resamples = str(config["task"]), int(config["seed"]), int(config["resamples"])
    except (KeyError, TypeError, ValueError):
        raise IncompatibleError("its card does not say how it was scored") from None
    if task != "classify":
        raise IncompatibleError(f"this release cannot score task {task!r} again")
    metrics = card.provenance.metrics
    found: list[str] = []
    predictions = load_predictions(folder / "predictions.csv")
    for split in sorted({str(row.split) for row in predictions.examples}):
        again = _scores(predictions.part(split), seed, resamples)
        found += differences(split, metrics.get(split), again)
    if (folder / "predictions_best_on_val.csv").exists():
        best = load_predictions(folder / "predictions_best_on_val.csv")
        recorded = metrics.get("best_on_val")
        test = recorded.get("test") if isinstance(recorded, Mapping) else None
        found += differences("best_on_val.test", test, _scores(best, seed, resamples))
    start = "encoder" if card.identity.inputs else "scratch"
    found += differences("start", metrics.get("start"), start)
    return found


def differences(name: str, recorded: Any, again: Any) -> Iterator[str]:
    """One line for each leaf of plain JSON that differs.

    >>> list(differences("test", {"accuracy": 0.9, "samples": 4}, {"accuracy": 0.5, "samples": 4}))
    ['test.accuracy: 0.9 on the card, 0.5 from the predictions']
    """
    if isinstance(again, Mapping) and isinstance(recorded, Mapping):
        for key in sorted(again.keys() | recorded.keys()):
            yield from differences(f"{name}.{key}", recorded.get(key), again.get(key))
    elif isinstance(again, list) and isinstance(recorded, list) and len(again) == len(recorded):
        for place, (one, other) in enumerate(zip(recorded, again, strict=True)):
            yield from differences(f"{name}[{place}]", one, other)
    elif not _same(recorded, again):
        yield f"{name}: {str(recorded)[:40]} on the card, {str(again)[:40]} from the predictions"


def _same(recorded: Any, again: Any) -> bool:
    numbers = [value for value in (recorded, again) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == 2:
        return math.isclose(*numbers, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return type(recorded) is type(again) and bool(recorded == again)


def _scores(predictions: Predictions, seed: int, resamples: int) -> dict[str, Any]:
    return score(
        predictions.probability,
        predictions.label,
        predictions.group,
        classes=predictions.classes,
        seed=seed,
        resamples=resamples,
    ).as_dict()
