"""Scores on val after each epoch, and the weights that were best there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from shared.runlog import RunLog
from stage3_finetune.contracts import Predictions
from stage3_finetune.data import Part
from stage3_finetune.features import FeaturePart


class BestOnVal:
    """Looks at val after each epoch; part of a run's saved state.

    Best is what the predictions' ``glance`` says, among equals the earliest.

    Args:
        model: Being trained.
        part: The val part.
        predict: Predictions of the model as it is.
        log: Gets a metrics line of ``val_...`` an epoch.
        per_epoch: Steps of an epoch.

    Attributes:
        epoch: The best epoch, counted from 1; 0 before the first.
        weights: Its state dict, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        part: Part | FeaturePart,
        predict: Callable[[Part | FeaturePart], Predictions],
        log: RunLog,
        per_epoch: int,
    ) -> None:
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}
        self._best: tuple[float, ...] = ()
        self._model, self._part, self._predict, self._log, self._per_epoch = model, part, predict, log, per_epoch

    def after_step(self, done: int, scalars: dict[str, float]) -> None:
        """Score val where an epoch ends."""
        if done % self._per_epoch:
            return
        good, scalars = self._predict(self._part).glance()
        epoch = done // self._per_epoch
        self._log.metric(done, epoch=epoch, **{f"val_{name}": value for name, value in scalars.items()})
        if not self.epoch or good > self._best:
            self._best, self.epoch = good, epoch
            self.weights = {name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The best weights and where they come from."""
        return self.weights, {"epoch": self.epoch, "best": list(self._best)}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Become what `state` described."""
        self.weights, self.epoch = dict(tensors), int(meta["epoch"])
        self._best = tuple(map(float, meta["best"]))
