"""The parts of a fine-tuning run, fitted to each other: its images, its model, its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from shared.images import Source, read_image
from shared.optimizer import Plan
from shared.runlog import RunLog
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.contracts import Batch, Predictions, Probing, Targets, Task
from stage3_finetune.data import Part, plain_order
from stage3_finetune.features import FeaturePart
from stage3_finetune.labels import Labels
from stage3_finetune.layer_decay import layer_scales
from stage3_finetune.start import Start


@dataclass(frozen=True)
class Run:
    """What the steps of one run share."""

    config: FinetuneConfig
    labels: Labels
    targets: Targets
    sources: Mapping[str, Source]
    sha256: Mapping[str, str]
    start: Start
    task: Task
    out: Path
    log: RunLog
    parts: dict[str, Part | FeaturePart] = field(default_factory=dict)

    @property
    def keeps_features(self) -> bool:
        """Whether the encoder, frozen, sees each image once."""
        config, task = self.config, self.task
        return config.freeze and not config.augment.changes and isinstance(task, Probing) and task.keeps_features

    def part(self, split: str) -> Part | FeaturePart:
        """One part of the table with its images, those of train augmented, or with their features."""
        if split not in self.parts:
            self.parts[split] = self._part(split)
        return self.parts[split]

    def _part(self, split: str) -> Part | FeaturePart:
        config, task = self.config, self.task
        augment = config.augment if split == "train" and config.augment.changes else None
        images = Part(
            self.labels.part(split),
            self.labels.classes,
            self.targets,
            sources=self.sources,
            sha256=self.sha256,
            size_px=config.size_px,
            channels=self.start.backbone.in_chans,
            augment=augment,
            seed=config.seed,
            cache_bytes=0 if self.keeps_features else config.cache_mib << 20,
        )
        if not self.keeps_features or not isinstance(task, Probing):
            return images

        def embed(image: Tensor) -> Tensor:
            with torch.no_grad(), self.autocast():
                return task.embed(image).float().cpu()

        return FeaturePart(
            images,
            embed,
            block=config.batch_size,
            memory_bytes=config.cache_mib << 20,
            folder=self.out / "run",
            workers=config.loader_workers,
        )

    def autocast(self) -> torch.autocast:
        """Computes in the run's precision."""
        device = torch.device(self.config.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    def predict(self, part: Part | FeaturePart) -> Predictions:
        """Predictions of the model as it is."""
        model = self.task.model
        mode = model.training
        model.eval()
        order = plain_order(len(part), self.config.batch_size)
        with torch.no_grad(), self.autocast():
            answers = [answer for batch in part.batches(order) for answer in self.task.predict(batch)]
        model.train(mode)
        return self.task.collect(part.examples, answers)

    @property
    def trained(self) -> nn.Module:
        """What steps change: the model, or its head where that takes features."""
        task = self.task
        return task.probe if self.keeps_features and isinstance(task, Probing) else task.model

    def ready(self) -> Any:
        """The model in training, its frozen parameters marked."""
        config, model = self.config, self.task.model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not config.freeze or name in self.task.head)
        return model.train(not config.freeze)  # a frozen encoder keeps its batch statistics too

    def pixels(self, sample_id: str) -> Float32[np.ndarray, "C H W"]:
        """An image as it is read."""
        return read_image(self.sources[sample_id]).pixels

    def plan(self, per_epoch: int) -> Plan:
        """How to optimise, with so many steps an epoch."""
        config = self.config
        return Plan(
            steps=config.epochs * per_epoch,
            lr=config.lr,
            warmup_steps=config.warmup_epochs * per_epoch,
            lr_end=config.min_lr,
            weight_decay=config.weight_decay,
            betas=(0.9, 0.999),
            clip_norm=config.clip_norm,
            seed=config.seed,
            checkpoint_s=config.save_every_s,
            checkpoint_steps=config.save_every_steps,
        )

    def loss(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """Scalars of a step with ``loss``."""
        with self.autocast():
            return self.task.loss(batch)

    def lr_scales(self) -> dict[str, float]:
        """Factor of the learning rate by parameter of the model; empty: 1 for all."""
        config, task = self.config, self.task
        if config.layer_decay_milli == 1000 or config.freeze or self.start.kind == "scratch":
            return {}
        return layer_scales(self.start.backbone.model, task.model, task.head, decay=config.layer_decay_milli / 1000)
