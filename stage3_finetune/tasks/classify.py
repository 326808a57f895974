"""One of K classes an image: a linear layer on the encoder's pooled features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shared.config import Strict
from shared.errors import ConfigError
from shared.rng import seed_key
from stage3_finetune.data import Batch
from stage3_finetune.metrics import Scores, score


class ClassifyOptions(Strict):
    """Settings of the task."""

    label_smoothing_milli: int = Field(
        0, ge=0, le=500, description="Share of a label spread evenly over all classes, in thousandths."
    )


class Classify:
    """Classification with timm's own classifier head, softmax and cross-entropy.

    Args:
        options: Settings.
        model: A timm model; its classifier is replaced by a new one for these classes.
        classes: Class names in order.
        mean: Subtracted from each channel of an image in [0, 1].
        std: Then divided by.
        seed: Seed of the new classifier's weights.

    Attributes:
        model: The whole model, still a plain timm module.
        head: Names of the new classifier's tensors in the model's state dict.

    Raises:
        ConfigError: The architecture has no classifier to put, or would drop features for it.
    """

    Options = ClassifyOptions
    version = 1

    def __init__(
        self,
        options: ClassifyOptions,
        model: nn.Module,
        *,
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        self.options, self.model, self.classes = options, model, tuple(classes)
        self.head = _put_classifier(model, len(classes), seed)
        self._mean = torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy (``loss``) and share of right answers (``accuracy``) of a batch."""
        logits = self._logits(batch)
        label = batch.label.to(logits.device)
        smoothing = self.options.label_smoothing_milli / 1000
        return {
            "loss": cross_entropy(logits, label, label_smoothing=smoothing),
            "accuracy": (logits.argmax(dim=1) == label).float().mean(),
        }

    @torch.no_grad()
    def predict(self, batch: Batch) -> Float32[np.ndarray, "B K"]:
        """Probability of each class; the model's mode is the caller's."""
        probability: Float32[np.ndarray, "B K"] = self._logits(batch).float().softmax(dim=1).cpu().numpy()
        return probability

    def metrics(
        self,
        probability: Float32[np.ndarray, "N K"],
        label: Int64[np.ndarray, "N"],
        group: Sequence[str],
        *,
        seed: int,
        resamples: int,
    ) -> Scores:
        """Accuracy, balanced accuracy and AUROC with intervals by group."""
        return score(probability, label, group, classes=self.classes, seed=seed, resamples=resamples)

    def _logits(self, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        image = (batch.image.to(device) - self._mean.to(device)) / self._std.to(device)
        logits: Tensor = self.model(image)
        return logits


def _put_classifier(model: Any, classes: int, seed: int) -> tuple[str, ...]:
    """Put a new classifier whose weights are a function of its shape and the seed; returns its tensors' names."""
    before = set(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_key("finetune/head", seed) % 2**63)
        try:
            model.reset_classifier(classes)
        except (AttributeError, TypeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"the backbone takes no classifier: {type(error).__name__}: {error}") from None
        head = model.get_classifier()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
    after = set(model.state_dict())
    if dropped := sorted(before - after):
        raise ConfigError(f"a classifier for this backbone would drop {', '.join(dropped)}")
    if not after - before:
        raise ConfigError("the backbone takes no classifier")
    return tuple(sorted(after - before))
