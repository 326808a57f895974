"""Scores on val after each epoch, and the weights that were best there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from shared.runlog import RunLog
from stage3_finetune.data import Part
from stage3_finetune.metrics import balanced_accuracy, macro_auroc
from stage3_finetune.predictions import Predictions


class BestOnVal:
    """Looks at val after each epoch; part of a run's saved state.

    Best is the highest balanced accuracy, among equals the lowest cross-entropy, then the earliest.

    Args:
        model: Being trained.
        part: The val part.
        predict: Predictions of the model as it is.
        log: Gets ``val_loss``, ``val_balanced_accuracy`` and ``val_auroc`` a metrics line.
        per_epoch: Steps of an epoch.

    Attributes:
        epoch: The best epoch, counted from 1; 0 before the first.
        weights: Its state dict, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        part: Part,
        predict: Callable[[Part], Predictions],
        log: RunLog,
        per_epoch: int,
    ) -> None:
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}
        self._best = (-1.0, 0.0)
        self._model, self._part, self._predict, self._log, self._per_epoch = model, part, predict, log, per_epoch

    def after_step(self, done: int, scalars: dict[str, float]) -> None:
        """Score val where an epoch ends."""
        if done % self._per_epoch:
            return
        predictions = self._predict(self._part)
        probability, label = predictions.probability, predictions.label
        once = np.ones((1, len(label)), np.int64)
        one_hot = label[:, None] == np.arange(probability.shape[1])
        balanced = float(balanced_accuracy(probability.argmax(axis=1) == label, one_hot, once)[0])
        picked = probability[np.arange(len(label)), label].astype(np.float64)
        loss = float(-np.log(np.maximum(picked, 1e-12)).mean())
        auroc = float(macro_auroc(probability, one_hot, once)[0])
        epoch = done // self._per_epoch
        self._log.metric(done, epoch=epoch, val_loss=loss, val_balanced_accuracy=balanced, val_auroc=auroc)
        if (balanced, -loss) > self._best or not self.epoch:
            self._best, self.epoch = (balanced, -loss), epoch
            self.weights = {name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The best weights and where they come from."""
        return self.weights, {"epoch": self.epoch, "best": list(self._best)}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Become what `state` described."""
        self.weights, self.epoch = dict(tensors), int(meta["epoch"])
        self._best = (float(meta["best"][0]), float(meta["best"][1]))
