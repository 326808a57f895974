"""One of K classes an image: a linear layer on the encoder's pooled features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from shared.backbones import Backbone, build
from shared.config import Strict
from shared.errors import ConfigError
from shared.images import Source
from shared.rng import seed_key
from stage3_finetune.contracts import Batch, Example, View
from stage3_finetune.export import Preprocessing, export_model, read_model, take_weights, told_as_corrupt
from stage3_finetune.labels import listed, read_table
from stage3_finetune.predictions import ClassPredictions


class ClassifyOptions(Strict):
    """Settings of the task."""

    label_smoothing_milli: int = Field(
        0, ge=0, le=500, description="Share of a label spread evenly over all classes, in thousandths."
    )


class ClassTargets:
    """One class an image: the column ``label`` of a table.

    Args:
        path: The CSV.
        options: Not needed.
        sources: Not needed.
    """

    def __init__(
        self, path: Path, *, options: ClassifyOptions | None = None, sources: Mapping[str, Source] | None = None
    ) -> None:
        self._path = path

    def read(
        self, known: Mapping[str, str | None], names: Mapping[str, str] | None = None
    ) -> tuple[list[Example], bool]:
        """The table's rows."""
        return read_table(self._path, known, names)

    def classes(self, examples: Sequence[Example], asked: Sequence[str] | None) -> tuple[str, ...]:
        """Every label, sorted, or what is asked for if the labels are the same."""
        present = {example.label for example in examples}
        classes = sorted(present) if asked is None else asked
        if unknown := sorted(present - set(classes)):
            raise ConfigError(
                f"labels {self._path}: labels that 'classes' does not name: {listed(unknown)}",
                hint=f"classes: {', '.join(classes)}; drop those rows or name the labels",
            )
        if absent := [name for name in classes if name not in present]:
            raise ConfigError(f"labels {self._path}: no row has the classes {listed(absent)}")
        if len(classes) < 2:
            raise ConfigError(f"labels {self._path}: one class only, {classes[0]!a}; a classifier needs two")
        return tuple(classes)

    def check(self, examples: Sequence[Example], classes: Sequence[str]) -> None:
        """Refuse a class that no training row has."""
        taught = {example.label for example in examples if example.split == "train"}
        if unseen := [name for name in classes if name not in taught]:
            raise ConfigError(f"labels {self._path}: classes without a training sample: {listed(unseen)}")

    def strata(self, example: Example) -> str:
        """The class."""
        return example.label

    def load(self, example: Example, classes: Sequence[str], size_px: tuple[int, int]) -> int:
        """The class's number."""
        return classes.index(example.label)

    def place(self, truth: int, view: View, side_px: int) -> int:
        """The same, whatever is seen."""
        return truth

    def collate(self, placed: Sequence[int]) -> Int64[Tensor, "B"]:
        """Numbers of the classes."""
        return torch.tensor(placed, dtype=torch.int64)


class Classify:
    """Classification with timm's own classifier head, softmax and cross-entropy.

    Args:
        options: Settings.
        backbone: Its model's classifier is replaced by a new one for these classes.
        classes: Class names in order.
        preprocessing: Of the input.
        seed: Seed of the new classifier's weights.

    Attributes:
        model: The whole model, still a plain timm module.
        head: Names of the new classifier's tensors in the model's state dict.

    Raises:
        ConfigError: The architecture has no classifier to put, or would drop features for it.
    """

    Options = ClassifyOptions
    Targets = ClassTargets
    Predictions = ClassPredictions
    kind: ClassVar[Literal["probability"]] = "probability"
    version = 1

    def __init__(
        self,
        options: ClassifyOptions,
        backbone: Backbone,
        *,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        seed: int,
    ) -> None:
        self.options, self.model, self.classes = options, backbone.model, tuple(classes)
        self.head = _put_classifier(self.model, len(classes), seed)
        self._backbone, self.preprocessing = backbone, preprocessing
        self._mean = torch.tensor(preprocessing.mean, dtype=torch.float32).reshape(1, -1, 1, 1)
        self._std = torch.tensor(preprocessing.std, dtype=torch.float32).reshape(1, -1, 1, 1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy (``loss``) and share of right answers (``accuracy``) of a batch."""
        logits = self._logits(batch)
        label = batch.target.to(logits.device)
        smoothing = self.options.label_smoothing_milli / 1000
        return {
            "loss": cross_entropy(logits, label, label_smoothing=smoothing),
            "accuracy": (logits.argmax(dim=1) == label).float().mean(),
        }

    def predict(self, batch: Batch) -> Float32[np.ndarray, "B K"]:
        """Probability of each class; the model's mode is the caller's."""
        probability: Float32[np.ndarray, "B K"] = self._logits(batch).float().softmax(dim=1).cpu().numpy()
        return probability

    def collect(self, examples: Sequence[Example], answers: Sequence[Float32[np.ndarray, "K"]]) -> ClassPredictions:
        """Probabilities of these rows."""
        return ClassPredictions(tuple(examples), self.classes, np.stack(answers))

    def export(self, folder: Path) -> None:
        """A folder that timm reads as it is."""
        export_model(
            self.model,
            folder,
            architecture=self._backbone.name,
            model_args=self._backbone.args,
            classes=self.classes,
            preprocessing=self.preprocessing,
        )

    @classmethod
    def restore(cls, folder: Path) -> Classify:
        """The model of such a folder, ready to predict."""
        config, state = read_model(folder)
        with told_as_corrupt(folder):
            stored = config["pretrained_cfg"]
            args = dict(config["model_args"])
            channels, side, _ = stored["input_size"]
            preprocessing = Preprocessing(side, channels, tuple(stored["mean"]), tuple(stored["std"]))
            args.pop("in_chans")
            backbone = build(
                config["architecture"],
                in_chans=channels,
                output_stride=args.pop("output_stride", None),
                model_args=args,
            )
            names = config["label_names"]
        found = cls(ClassifyOptions(), backbone, classes=names, preprocessing=preprocessing, seed=0)
        take_weights(found.model, state, folder)
        return found

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
