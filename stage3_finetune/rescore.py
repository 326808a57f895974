"""Scores of a published model, computed again from its predictions: metrics stand on a card outside of its id."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.artifact import Card
from shared.errors import ConfigError, CorruptError, IncompatibleError
from stage3_finetune.contracts import Predictions
from stage3_finetune.tasks import TASKS

_SINCE_2 = ("f1", "auprc", "brier", "ece", "calibration", "positives")
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
        seed, resamples = int(config["seed"]), int(config["resamples"])
    except (KeyError, TypeError, ValueError):
        raise IncompatibleError("its card does not say how it was scored") from None
    metrics = card.provenance.metrics
    found: list[str] = []
    predictions, best = _read(folder, card)
    for split in sorted({str(row.split) for row in predictions.examples}):
        again = _of_its_time(card, predictions.part(split).scores(seed=seed, resamples=resamples).as_dict())
        found += differences(split, metrics.get(split), again)
    if best is not None:
        recorded = metrics.get("best_on_val")
        test = recorded.get("test") if isinstance(recorded, Mapping) else None
        again = _of_its_time(card, best.scores(seed=seed, resamples=resamples).as_dict())
        found += differences("best_on_val.test", test, again)
    start = "encoder" if card.identity.inputs else "weights" if "weights" in card.identity.spec else "scratch"
    found += differences("start", metrics.get("start"), start)
    return found


def _of_its_time(card: Card, scores: dict[str, Any]) -> dict[str, Any]:
    """Without what classifiers of version 1 were not scored by."""
    spec = card.identity.spec
    if spec["config"].get("task") != "classify" or spec.get("version", {}).get("task", 1) != 1:
        return scores
    return {name: value for name, value in scores.items() if name not in _SINCE_2}


def prediction_faults(folder: Path, card: Card) -> Iterator[tuple[str, str]]:
    """File and fault where predictions are others than those that a model's id covers.

    Raises:
        CorruptError: The predictions are no table.
        IncompatibleError: The card does not say what task it is of, or names one that this release does not know.
        KeyError: The id covers no predictions.
    """
    outputs = card.identity.outputs
    found, best = _read(folder, card)
    name = f"predictions{found.suffix}"
    if found.sha256 != outputs["predictions"]:
        yield name, "other predictions than the artifact's id"
    if found.truth_sha256 != outputs.get("predictions_truth", found.truth_sha256):
        yield name, "other labels, groups or parts than the artifact's id"
    if "predictions_best_on_val" in outputs:
        best_name = f"predictions_best_on_val{found.suffix}"
        if best is None:
            raise CorruptError(f"{best_name}: missing")
        if best.sha256 != outputs["predictions_best_on_val"]:
            yield best_name, "other predictions than the artifact's id"
        if best.truth_sha256 != found.part("test").truth_sha256:
            yield best_name, f"other labels, groups or parts than {name}"


def _read(folder: Path, card: Card) -> tuple[Predictions, Predictions | None]:
    """Predictions of the last weights, and of those that were best on val where there are any."""
    try:
        task = str(card.identity.spec["config"]["task"])
        kind: type[Predictions] = TASKS.load(task).Predictions
    except (KeyError, TypeError):
        raise IncompatibleError("its card does not say what task it is of") from None
    except ConfigError:
        raise IncompatibleError(f"this release does not know the task {task!r}") from None
    path, best = (folder / f"{name}{kind.suffix}" for name in ("predictions", "predictions_best_on_val"))
    if not path.is_file():
        raise CorruptError(f"{path.name}: missing")
    return kind.load(path), kind.load(best) if best.is_file() else None


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
