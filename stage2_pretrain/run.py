"""The parts of a pretraining run, built from its settings and fitted to each other before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from shared import ranks
from shared.backbones import build, resolve_options
from shared.config import spec as config_spec
from shared.config import validate
from shared.cores import resolve_device, resolve_threads
from shared.errors import ConfigError
from shared.loop import VERSION as LOOP_VERSION
from shared.optimizer import Plan
from shared.order import steps_per_epoch
from shared.regions import RegionStore
from stage2_pretrain.checks import check_grid, check_shares, check_strided
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.data import RegionDataset
from stage2_pretrain.guide import Guide
from stage2_pretrain.kernels.choice import resolve_impl
from stage2_pretrain.masking.plan import build_policy, guide_of, maps_of
from stage2_pretrain.masking.spec import MaskSpec, mask_section, mask_spec
from stage2_pretrain.methods import METHODS
from stage2_pretrain.pixel_cache import open_pixel_cache
from stage2_pretrain.samples import listed_rows, usable_samples
from stage2_pretrain.steps import Step, Steps

TEACHER_DECAY = 0.999
"""Of the average that is a policy's teacher, a step, where ``ema`` sets no other; AnatoMask begins with it."""
FEW_PATCHES = 16
"""A grid of fewer can't tell a region."""
_ELSEWHERE = ("policy", "schedule", "coverage", "window", "subset")
"""Settings that the card holds in its section ``mask``, and in its ``rows``."""


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Replace every ``auto`` but that of ``impl``, which the grid decides, and fill in the method's own defaults.

    Raises:
        ConfigError: An unknown method, or settings that it does not take.
    """
    options = validate(METHODS.load(config.method["name"]).Options, config.method_options)
    update: dict[str, Any] = {"method": {"name": config.method["name"], **options.model_dump(mode="json")}}
    update["backbone_options"] = resolve_options(config.backbone, config.backbone_options)
    update["device"] = resolve_device(config.device)
    update["threads"] = resolve_threads(config.threads)
    return config.model_copy(update=update)


@dataclass
class Run:
    """The parts of a run, fitted to each other."""

    config: PretrainConfig
    dataset: RegionDataset
    method: Any
    masks: MaskSpec
    steps: Steps
    spec: dict[str, Any]
    out: Path

    @property
    def steps_per_epoch(self) -> int:
        """Of the whole data set."""
        return steps_per_epoch(len(self.dataset), self.config.batch_size)

    def normalise(self, image: Tensor) -> Tensor:
        """Pixels as the encoder takes them."""
        moved = image.to(self.config.device, memory_format=torch.channels_last)
        return (moved - self.config.mean) / self.config.std

    def restore(self, image: Tensor) -> Tensor:
        """The reverse of `normalise`."""
        return image * self.config.std + self.config.mean

    def step(self, batch: Step) -> tuple[Iterator[dict[str, Tensor]], Tensor, Step]:
        """Do a step.

        Returns:
            Scalars with ``loss`` of each part of the batch, made as they are asked for; bool [B, gh, gw]: what of
            each image the encoder gets to see; the step with its masks.
        """
        image = self.normalise(batch.image)
        with self.autocast():
            batch, visible = self.steps.draw(batch, self.guide, image)
        return self._parts(image, visible), visible, batch

    def _parts(self, image: Tensor, visible: Bool[Tensor, "B gh gw"]) -> Iterator[dict[str, Tensor]]:
        """A part's loss is the mean over its hidden patches: each counts by its share of those of the whole batch."""
        images, shown = image.tensor_split(self.config.accumulate), visible.tensor_split(self.config.accumulate)
        hidden = [ranks.total(int((~part).sum())) for part in shown] if len(shown) > 1 else [1]
        for part, seen, count in zip(images, shown, hidden, strict=True):
            if count:
                with self.autocast():
                    outputs = self.method.loss(part, seen)
                yield {name: value * (count / sum(hidden)) for name, value in outputs.items()}

    def autocast(self) -> torch.autocast:
        """Computes in the run's precision."""
        device = torch.device(self.config.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.config.precision == "bf16")

    @cached_property
    def guide(self) -> Guide | None:
        """The average of the weights, where one is kept, and what a policy asks it for."""
        asked = guide_of(self.masks.policy_at(0))
        return Guide(self.method, asked, seed=self.config.seed) if asked else None

    def plan(self) -> Plan:
        """How to optimise."""
        config = self.config
        return Plan(
            steps=self.masks.steps,
            lr=config.lr,
            warmup_steps=config.warmup_epochs * self.steps_per_epoch,
            lr_end=config.min_lr,
            weight_decay=config.weight_decay,
            weight_decay_end=config.weight_decay_end,
            optimizer=config.optimizer,
            ema=config.ema or TEACHER_DECAY,
            max_jump=config.max_loss_jump,
            clip_norm=config.clip_norm,
            seed=config.seed,
            checkpoint_s=config.save_every_s,
            checkpoint_steps=config.save_every_steps,
        )

    def ready(self) -> Any:
        """The method, on its device and in training."""
        return self.method.to(self.config.device, memory_format=torch.channels_last).train()


def prepare(config: PretrainConfig, store: RegionStore, images: Path, out: Path) -> Run:
    """Build every part, and refuse what does not fit before anything is computed or written."""
    options = resolve_options(config.backbone, config.backbone_options)
    stride = options.pop("output_stride", None)
    backbone = build(
        config.backbone,
        in_chans=config.channels,
        output_stride=stride,
        model_args=options,
        size_px=config.size_px,
        seed=config.seed,
    )
    part = METHODS.load(config.method["name"])
    method = part(validate(part.Options, config.method_options), backbone, size_px=config.size_px, seed=config.seed)
    impl = resolve_impl(config.impl, device=config.device, patches=method.grid[0] * method.grid[1])
    config = config.model_copy(update={"impl": impl})
    policy = build_policy(config.policy["name"], config.policy_options)
    check_grounder = getattr(policy, "check_grounder", None)
    if check_grounder is not None:
        check_grounder(store.grounder)
    some = None if config.subset is None else listed_rows(store, config.subset)
    dataset = RegionDataset(
        store,
        images,
        size_px=config.size_px,
        channels=config.channels,
        window=config.window,
        seed=config.seed,
        maps_of=lambda samples: maps_of(policy, samples, config.seed),
        memory_bytes=(config.cache_mib << 20) // max(1, config.loader_workers),
        pixel_cache=open_pixel_cache(config.image_cache, usable_samples(store, some), out),
        some=some,
    )
    if len(dataset) < 2:
        raise ConfigError(f"region store: {len(dataset)} sample with maps; a batch needs 2 or more")
    masks = mask_spec(
        policy=config.policy["name"],
        options=config.policy_options,
        seed=config.seed,
        grid=method.grid,
        samples=len(dataset),
        batch=config.batch_size,
        steps=config.epochs * steps_per_epoch(len(dataset), config.batch_size),
        coverage=config.coverage,
        window=config.window,
        schedule=config.schedule,
    )
    check_grid(method.grid, store.grid, dataset.sizes_px, config.window)
    if config.device == "cpu":
        check_strided(backbone.model)
    check_shares(
        backbone.model,
        smallest_batch=len(dataset) // steps_per_epoch(len(dataset), config.batch_size),
        accumulate=config.accumulate,
    )
    plain = config_spec(config)
    numeric = {"device": config.device, "dtype": config.precision, "threads": config.threads}
    spec = {
        **{
            name: value
            for name, value in plain.items()
            if name not in ("device", "threads", "precision", "impl", *_ELSEWHERE)
        },
        **({} if some is None else {"rows": some}),
        "method": {**plain["method"], "version": part.version},
        "mask": mask_section(masks),
        "loop_version": LOOP_VERSION,
        "numeric": numeric,
    }
    steps = Steps(
        dataset,
        masks.sampler(store.regions, config.impl),
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.loader_workers,
    )
    return Run(config, dataset, method, masks, steps, spec, out)
