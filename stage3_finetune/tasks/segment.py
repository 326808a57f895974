"""A class for every pixel: a U-Net decoder on the encoder's pyramid, Dice and cross-entropy.

The sum of both losses, Dice over the foreground classes, is nnU-Net's (arXiv 1904.08128); the Dice loss is V-Net's
(arXiv 1606.04797) without its squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from shared.backbones import Backbone
from shared.config import validate
from shared.errors import CorruptError
from stage3_finetune.contracts import Batch, Example
from stage3_finetune.export import (
    Preprocessing,
    describe,
    described,
    read_model,
    take_weights,
    told_as_corrupt,
    write_model,
)
from stage3_finetune.segmentation.decoder import SegmentationModel
from stage3_finetune.segmentation.drawn import IGNORE, Drawn, draw
from stage3_finetune.segmentation.options import SegmentOptions
from stage3_finetune.segmentation.predictions import Row, SegmentPredictions
from stage3_finetune.segmentation.targets import MaskTargets

_TASK = "segment"
_SMOOTH_PX = 1.0
"""Added to both sides of the Dice loss: a class that is nowhere and is not found costs nothing."""


@dataclass(frozen=True)
class Segmented:
    """What is said of one image, and the truth where it is known, both in the frame of the image as it was read."""

    answer: Drawn
    truth: Drawn | None
    spacing_mm: tuple[float, float] | None
    classes: tuple[str, ...]

    @property
    def label(self) -> UInt8[np.ndarray, "H W"]:
        """The answer: 0 for background, k + 1 for class k."""
        return self.answer.label(self.classes)


class Segment:
    """Semantic segmentation.

    Args:
        options: Settings.
        backbone: The encoder.
        classes: Foreground class names in order.
        preprocessing: Of the input.
        seed: Seed of the decoder's weights.

    Attributes:
        model: Encoder and decoder.
        head: Names of the decoder's tensors in the model's state dict.
    """

    Options = SegmentOptions
    Targets = MaskTargets
    Predictions = SegmentPredictions
    kind: ClassVar[Literal["labels"]] = "labels"
    version = 1

    def __init__(
        self,
        options: SegmentOptions,
        backbone: Backbone,
        *,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        seed: int,
    ) -> None:
        self.options, self.classes, self.preprocessing = options, tuple(classes), preprocessing
        self.model = SegmentationModel(backbone, len(classes) + 1, width=options.width, seed=seed)
        self.head = tuple(sorted(name for name in self.model.state_dict() if name.startswith("decoder.")))
        self._backbone = backbone
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32).reshape(1, -1, 1, 1)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32).reshape(1, -1, 1, 1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted sum (``loss``) of ``dice_loss`` and ``cross_entropy``."""
        logits = self._logits(batch).float()
        target = batch.target.to(logits.device)
        per_image = self.options.dice_over == "image"
        parts = {"dice_loss": dice_loss(logits, target, per_image=per_image), "cross_entropy": mean_ce(logits, target)}
        weights = self.options.dice_weight_milli, self.options.cross_entropy_weight_milli
        total = (parts["dice_loss"] * weights[0] + parts["cross_entropy"] * weights[1]) / 1000
        return {"loss": total, **{name: value.detach() for name, value in parts.items()}}

    def predict(self, batch: Batch) -> list[Segmented]:
        """The most probable class of each pixel of the image as it was read; of equals the first.

        Probabilities are resampled to the image (bilinear, half-pixel centres), not classes.
        """
        probability = self._logits(batch).float().softmax(dim=1)
        answers = []
        for place, size_px in enumerate(batch.sizes_px):
            sized = interpolate(
                probability[place : place + 1], size=size_px, mode="bilinear", align_corners=False, antialias=True
            )
            label = sized[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
            truth = batch.truth[place]
            answers.append(
                Segmented(
                    draw(label, self.classes),
                    None if truth is None else draw(truth, self.classes),
                    batch.spacing_mm[place] if batch.spacing_mm else None,
                    self.classes,
                )
            )
        return answers

    def collect(self, examples: Sequence[Example], answers: Sequence[Segmented]) -> SegmentPredictions:
        """Answers with the truth that came with their images."""
        rows = []
        for answer in answers:
            if answer.truth is None:
                raise ValueError("an answer without its truth cannot be scored")
            rows.append(Row(answer.truth, answer.answer, answer.spacing_mm))
        return SegmentPredictions(tuple(examples), self.classes, tuple(rows))

    def export(self, folder: Path) -> None:
        """A folder that `restore` reads; tensors of the encoder have timm's names behind ``encoder.``."""
        config = {
            **describe(self._backbone, self.preprocessing),
            "task": _TASK,
            "label_names": list(self.classes),
            "options": self.options.model_dump(mode="json"),
        }
        write_model(self.model, folder, config)

    @classmethod
    def restore(cls, folder: Path) -> Segment:
        """The model of such a folder, ready to predict."""
        config, state = read_model(folder)
        with told_as_corrupt(folder):
            if config["task"] != _TASK:
                raise CorruptError(f"{folder.name}: task {config['task']!a}, expected '{_TASK}'")
            backbone, preprocessing = described(config)
            options = validate(SegmentOptions, config["options"])
            found = cls(options, backbone, classes=config["label_names"], preprocessing=preprocessing, seed=0)
        take_weights(found.model, state, folder)
        return found

    def _logits(self, batch: Batch) -> Float[Tensor, "B O S S"]:
        device = next(self.model.parameters()).device
        image = (batch.image.to(device) - self._mean.to(device)) / self._std.to(device)
        logits: Tensor = self.model(image)
        return logits


def dice_loss(
    logits: Float[Tensor, "B O S S"], target: Int64[Tensor, "B S S"], *, per_image: bool
) -> Float[Tensor, ""]:
    """1 minus the soft Dice, the mean over the foreground classes; ignored pixels are in no sum.

    Args:
        logits: Of background and every class.
        target: 0 for background, k + 1 for class k, `IGNORE`.
        per_image: Sum the pixels of each image before dividing, then take the mean; else those of the batch.
    """
    known = (target != IGNORE)[:, None]
    probability = logits.softmax(dim=1)[:, 1:] * known
    numbers = torch.arange(1, logits.shape[1], device=target.device).reshape(1, -1, 1, 1)
    truth = (target[:, None] == numbers).to(probability.dtype)
    over = (2, 3) if per_image else (0, 2, 3)
    overlap = (probability * truth).sum(dim=over)
    area = probability.sum(dim=over) + truth.sum(dim=over)
    return 1 - ((2 * overlap + _SMOOTH_PX) / (area + _SMOOTH_PX)).mean()


def mean_ce(logits: Float[Tensor, "B O S S"], target: Int64[Tensor, "B S S"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the pixels that count; 0 where none does."""
    known = (target != IGNORE).sum().clamp(min=1)
    return cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / known
