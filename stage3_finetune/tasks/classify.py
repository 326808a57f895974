"""Classes of an image: timm's classifier, an attention head or nearest neighbours on an encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize, one_hot

from shared.backbones import Backbone
from shared.config import Strict
from shared.errors import ConfigError
from stage3_finetune.class_targets import BETWEEN, ClassTargets
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.contracts import Batch, Example
from stage3_finetune.export import Preprocessing, described, export_model, read_model, take_weights, told_as_corrupt
from stage3_finetune.heads import Headed, Neighbours, put_attention, put_classifier
from stage3_finetune.metrics import THRESHOLD
from stage3_finetune.mixup import draw_mixup, mix
from stage3_finetune.predictions import ClassPredictions

_KS = (1, 5, 10, 20, 50, 100, 200)
_USUAL_K = 20


class ClassifyOptions(Strict):
    """Settings of the task."""

    head: Literal["linear", "attention", "knn"] = Field(
        "linear",
        description="linear: timm's own classifier. attention: a learned query pools the encoder's tokens. knn: votes "
        "of the nearest training images by cosine; nothing is trained.",
    )
    multi_label: Literal["auto"] | bool = Field(
        "auto", description="Whether an image may have any number of classes; auto: the table's column is 'labels'."
    )
    label_smoothing_milli: int = Field(
        0, ge=0, le=500, description="Share of a label spread evenly over all classes, in thousandths."
    )
    mixup_milli: int = Field(
        0,
        ge=0,
        le=10_000,
        description="Blend training images in pairs: alpha of the beta distribution, in thousandths.",
    )
    k: Literal["auto"] | int = Field(
        "auto",
        description="Neighbours of knn; auto: what is best on val, of 1, 5, 10, 20, 50, 100, 200; without val 20.",
    )
    temperature_milli: int = Field(
        70, ge=1, le=100_000, description="A neighbour of knn counts exp(cosine / temperature), in thousandths."
    )


class Classify:
    """Classification: softmax and cross-entropy, or a sigmoid a class where an image may have several.

    Args:
        options: Settings, as `settle` leaves them.
        backbone: An encoder without a classifier.
        classes: Class names in order.
        preprocessing: Of the input.
        seed: Seed of the new head's weights and of mixup.

    Attributes:
        model: The whole model; with the head ``linear`` a plain timm module.
        head: Names of the new head's tensors in the model's state dict.

    Raises:
        ConfigError: The architecture has no classifier to put, or would drop features for it.
    """

    Options = ClassifyOptions
    Targets = ClassTargets
    Predictions = ClassPredictions
    kind: ClassVar[Literal["probability"]] = "probability"
    version = 2

    def __init__(
        self,
        options: ClassifyOptions,
        backbone: Backbone,
        *,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        seed: int,
    ) -> None:
        self.options, self.classes, self._several = options, tuple(classes), options.multi_label is True
        self.model, self.head = _put_head(options, backbone, len(classes), seed)
        self._backbone, self.preprocessing, self._seed = backbone, preprocessing, seed
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32).reshape(1, -1, 1, 1)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32).reshape(1, -1, 1, 1)

    @staticmethod
    def settle(
        options: ClassifyOptions, config: FinetuneConfig, targets: ClassTargets
    ) -> tuple[ClassifyOptions, FinetuneConfig]:
        """Take multi-label from the table; with knn the encoder is frozen, and nothing else may be trained."""
        several = targets.multi_label
        if options.multi_label not in ("auto", several):
            column = "'labels'" if several else "'label'"
            raise ConfigError(f"options.multi_label: {options.multi_label}, but the labels' column is {column}")
        options = options.model_copy(update={"multi_label": several})
        if options.head != "knn":
            if options.k != "auto":
                raise ConfigError(f"options.k: {options.k}, but the head is '{options.head}'", hint="options.head=knn")
            return options, config
        if options.k != "auto" and options.k < 1:
            raise ConfigError(f"options.k: {options.k}, expected 1 or more, or auto")
        asked = {
            "options.mixup_milli": options.mixup_milli > 0,
            "options.label_smoothing_milli": options.label_smoothing_milli > 0,
            "augment.use": config.augment.use is True,
        }
        if wrong := [name for name, value in asked.items() if value]:
            raise ConfigError(f"{', '.join(wrong)}: for training, and the head knn trains nothing")
        return options, config.model_copy(update={"freeze": True})

    @property
    def keeps_features(self) -> bool:
        """Not while images are blended, nor where timm's classifier is more than a layer on the features."""
        if self.options.head == "linear":
            model: Any = self.model
            return self.options.mixup_milli == 0 and isinstance(model.get_classifier(), nn.Linear)
        return self.options.mixup_milli == 0

    @property
    def probe(self) -> nn.Module:
        """The head."""
        model: Any = self.model
        found: nn.Module = model.head if isinstance(model, Headed) else model.get_classifier()
        return found

    def embed(self, image: Float32[Tensor, "B C S S"]) -> Tensor:
        """Features that the head takes: pooled; for attention the tokens of the last map."""
        pixels = self._normalise(image)
        if isinstance(self.model, Headed):
            encoder: Any = self.model.encoder
            if self.options.head == "knn":
                return normalize(encoder(pixels).float(), dim=1)
            last = [self._backbone.indices[-1]]
            found = encoder.forward_intermediates(pixels, indices=last, norm=True, intermediates_only=True)[0]
            return found.flatten(2).transpose(1, 2).float()
        model: Any = self.model
        pooled: Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
        return pooled

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy, of several classes the mean of theirs (``loss``); share of right answers (``accuracy``)."""
        target = self._one_hot(batch)
        if self.options.mixup_milli:
            assert batch.features is None
            drawn = draw_mixup(batch.sample_ids, batch.epoch, seed=self._seed, alpha=self.options.mixup_milli / 1000)
            image, target = mix(batch.image, *drawn), mix(target, *drawn)
            logits = self._from_image(image)
        else:
            logits = self._logits(batch)
        target, smoothing = target.to(logits.device), self.options.label_smoothing_milli / 1000
        if self._several:
            loss = binary_cross_entropy_with_logits(logits, target * (1 - smoothing) + smoothing / 2)
            right = ((logits > 0) == (target >= THRESHOLD)).float().mean()
        else:
            loss = cross_entropy(logits, target, label_smoothing=smoothing)
            right = (logits.argmax(dim=1) == target.argmax(dim=1)).float().mean()
        return {"loss": loss, "accuracy": right}

    def predict(self, batch: Batch) -> Float32[np.ndarray, "B K"]:
        """Probability of each class; the model's mode is the caller's."""
        found = self._logits(batch)
        if self.options.head != "knn":
            found = found.sigmoid() if self._several else found.softmax(dim=1)
        probability: Float32[np.ndarray, "B K"] = found.cpu().numpy()
        return probability

    def collect(self, examples: Sequence[Example], answers: Sequence[Float32[np.ndarray, "K"]]) -> ClassPredictions:
        """Probabilities of these rows."""
        return ClassPredictions(tuple(examples), self.classes, np.stack(answers), self._several)

    @property
    def remembers(self) -> bool:
        """With the head knn."""
        return self.options.head == "knn"

    def remember(self, train: Iterable[Batch], val: Iterable[Batch]) -> dict[str, int]:
        """Keep the training images' features; choose the k that `ClassPredictions.glance` likes best on val."""
        neighbours: Any = self.model.get_submodule("head")
        batches = [(self._features(batch), self._one_hot(batch)) for batch in train]
        neighbours.remember(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        count = len(neighbours.features)
        held = [(self._features(batch), self._one_hot(batch)) for batch in val]
        if self.options.k != "auto":
            if self.options.k > count:
                raise ConfigError(f"options.k: {self.options.k}, but there are {count} training images")
            neighbours.k = self.options.k
        elif not held:
            neighbours.k = min(_USUAL_K, count)
        else:
            features, truth = (torch.cat(parts) for parts in zip(*held, strict=True))
            rows = self._rows(truth)
            found = neighbours.votes(features, tuple(k for k in _KS if k <= count))
            good = {k: self.collect(rows, list(votes.cpu().numpy())).glance()[0] for k, votes in found.items()}
            neighbours.k = max(good, key=lambda k: (good[k], -k))
        return {"k": neighbours.k}

    def export(self, folder: Path) -> None:
        """With the head ``linear`` a folder that timm reads as it is; with another one that `restore` reads."""
        about: dict[str, Any] = {"task": "classify", "head": self.options.head, "multi_label": self._several}
        if self.options.head == "knn":
            neighbours: Any = self.model.get_submodule("head")
            about |= {"k": neighbours.k, "temperature_milli": self.options.temperature_milli}
        export_model(
            self.model,
            folder,
            backbone=self._backbone,
            classes=self.classes,
            preprocessing=self.preprocessing,
            about=about,
        )

    @classmethod
    def restore(cls, folder: Path) -> Classify:
        """The model that `export` wrote, ready to `predict`, whatever its head; every tensor, or an error.

        Raises:
            CorruptError: No such folder, a file is not what was written, or a tensor is missing, unknown or misshapen.
        """
        stored, state = read_model(folder)
        with told_as_corrupt(folder):
            about = stored.get("mwm", {})  # version 1 had one head only, and did not say so
            known = {name: about[name] for name in ("head", "multi_label", "k", "temperature_milli") if name in about}
            options = ClassifyOptions(**known)
            name = stored["architecture"].removeprefix(f"mwm-{options.head}:")
            backbone, preprocessing = described({**stored, "architecture": name})
            task = cls(options, backbone, classes=stored["label_names"], preprocessing=preprocessing, seed=0)
            if options.head == "knn":
                neighbours: Any = task.model.get_submodule("head")
                neighbours.remember(state["head.features"], state["head.targets"])
        take_weights(task.model, state, folder)
        return task

    def _normalise(self, image: Float32[Tensor, "B C S S"]) -> Float32[Tensor, "B C S S"]:
        device = next(self.model.parameters()).device
        moved = image.to(device, memory_format=torch.channels_last)
        return (moved - self._mean.to(device)) / self._std.to(device)

    def _one_hot(self, batch: Batch) -> Float32[Tensor, "B K"]:
        found: Tensor = batch.target if self._several else one_hot(batch.target, len(self.classes))
        return found.float()

    def _rows(self, truth: Float32[Tensor, "N K"]) -> list[Example]:
        """Nameless rows with these labels."""
        names = [[name for name, has in zip(self.classes, row, strict=True) if has] for row in truth.tolist()]
        return [Example("", BETWEEN.join(row), "") for row in names]

    def _features(self, batch: Batch) -> Tensor:
        if batch.features is None:
            return self.embed(batch.image)
        return batch.features.to(next(self.model.parameters()).device)

    def _logits(self, batch: Batch) -> Float32[Tensor, "B K"]:
        """Logits; of knn, shares of votes."""
        return self._from_image(batch.image) if batch.features is None else self._from_features(self._features(batch))

    def _from_image(self, image: Float32[Tensor, "B C S S"]) -> Float32[Tensor, "B K"]:
        if isinstance(self.model, Headed):
            return self._from_features(self.embed(image))
        logits: Tensor = self.model(self._normalise(image))
        return logits.float()

    def _from_features(self, features: Tensor) -> Float32[Tensor, "B K"]:
        logits: Tensor = self.probe(features)
        return logits.float()


def _put_head(
    options: ClassifyOptions, backbone: Backbone, classes: int, seed: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, and the names of its new tensors."""
    if options.head == "linear":
        names = put_classifier(backbone.model, classes, seed)
        return backbone.model, names
    if options.head == "attention":
        headed = put_attention(backbone, classes, seed)
    else:
        k = _USUAL_K if options.k == "auto" else options.k
        headed = Headed(backbone.model, Neighbours(k, options.temperature_milli / 1000))
    return headed, headed.head_names
