"""`pretrain`: images and a region store in, a published encoder out; the same call again continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from shared import ranks
from shared.artifact import Artifact, Input, publish, write_atomic
from shared.backbones import build, export_encoder, resolve_options
from shared.config import dump_yaml, validate
from shared.config import spec as config_spec
from shared.cores import resolve_threads
from shared.errors import ConfigError
from shared.lease import Lease
from shared.loop import VERSION as LOOP_VERSION
from shared.loop import Fitted, Plan, fit
from shared.merkle import tensor_digest
from shared.order import steps_per_epoch
from shared.regions import RegionStore, open_region_store
from shared.report import pretrain_report
from shared.runlog import RunLog, read_metrics, scrub
from shared.workspace import begin, set_aside
from stage2_pretrain.checks import check_grid, check_ranks, check_strided
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.data import RegionDataset
from stage2_pretrain.guide import Guide
from stage2_pretrain.kernels.choice import resolve_impl
from stage2_pretrain.masking.plan import build_policy, guide_of, maps_of
from stage2_pretrain.masking.spec import MaskSpec, mask_section, mask_spec
from stage2_pretrain.methods import METHODS
from stage2_pretrain.pace import Pace, pace_curves
from stage2_pretrain.pictures import draw_examples, draw_strip, write_examples
from stage2_pretrain.pixel_cache import open_pixel_cache
from stage2_pretrain.samples import usable_samples
from stage2_pretrain.steps import Step, Steps, Tally
from stage2_pretrain.witness import WitnessRecorder

TEACHER_DECAY = 0.999
"""Of the weights a policy's teacher averages, a step; AnatoMask begins with it."""
FEW_PATCHES = 16
"""A grid of fewer can't tell a region."""


def pretrain(
    config: PretrainConfig, *, images: Path, regions: str, out: Path, fresh: bool = False, command: str = ""
) -> Artifact:
    """Train an encoder to draw what a mask policy hides, and publish it.

    Under ``torchrun`` every process calls this, and each trains on its share of every batch.

    Args:
        config: Settings.
        images: Folder of images, or a list (`shared.images.find_sources`): those the store was made from.
        regions: Region store, ``PATH[@sha256:...]``.
        out: The run's folder; the same call on it continues, or is done at once.
        fresh: Keep what is in ``out`` aside and start anew.
        command: Command line with paths replaced by placeholders, for the card.

    Returns:
        The published encoder.

    Raises:
        ConfigError: Settings that do not fit each other or the store; nothing has been computed.
        InputMissingError: Images or store that do not exist.
        IncompatibleError: The store is another kind of artifact, unpublished, or not the pinned one.
        CorruptError: The store, an image or the saved state is not what it was.
        NonFiniteError: The loss became NaN or infinite; names the samples.
        InterruptedRun: SIGTERM or SIGINT; the state is saved.
    """
    with ranks.joined(config.device):
        store = open_region_store(regions)
        config = resolve(config)
        torch.set_num_threads(ranks.threads(int(config.threads)))
        if fresh:
            ranks.from_first(lambda: set_aside(out))
        with Lease(out) if ranks.rank() == 0 else nullcontext():
            run = prepare(config, store, images, out)
            inputs = (Input(role="regions", kind="region-store", artifact_id=store.card.artifact_id),)
            told: dict[str, Any] = {"spec": run.spec, "resolved": scrub(dump_yaml(run.config)), "fresh": fresh}
            card = ranks.from_first(lambda: begin(out, kind="encoder", inputs=inputs, **told)[1])
            if card is None:
                with RunLog(out) if ranks.rank() == 0 else ranks.Unheard(out) as log:
                    trained = _train(run, log)
                    outputs, metrics = ranks.from_first(lambda: _finish(run, *trained, log))
                card = ranks.from_first(
                    lambda: publish(
                        out,
                        kind="encoder",
                        inputs=inputs,
                        spec=run.spec,
                        outputs=outputs,
                        command=command,
                        metrics=metrics,
                    )
                )
    return Artifact(out, card)


def resolve(config: PretrainConfig) -> PretrainConfig:
    """Replace every ``auto`` but that of ``impl``, which the grid decides, and fill in the method's own defaults.

    Raises:
        ConfigError: An unknown method, or settings that it does not take.
    """
    options = validate(METHODS.load(config.method["name"]).Options, config.method_options)
    update: dict[str, Any] = {"method": {"name": config.method["name"], **options.model_dump(mode="json")}}
    update["backbone_options"] = resolve_options(config.backbone, config.backbone_options)
    if config.ema is None and guide_of(build_policy(config.policy["name"], config.policy_options)):
        update["ema"] = TEACHER_DECAY
    if config.device == "auto":
        update["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    elif config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, but this machine has no usable GPU", hint="device=auto takes what there is")
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
            ema=config.ema or 0.0,
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
    dataset = RegionDataset(
        store,
        images,
        size_px=config.size_px,
        channels=config.channels,
        window=config.window,
        seed=config.seed,
        maps_of=lambda samples: maps_of(policy, samples, config.seed),
        memory_bytes=(config.cache_mib << 20) // max(1, config.loader_workers),
        pixel_cache=open_pixel_cache(config.image_cache, usable_samples(store), out),
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
    check_ranks(
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
            if name not in ("device", "threads", "precision", "impl", *_IN_MASKS)
        },
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


_SHARES = {
    "hidden_inside_share": "inside regions",
    "hidden_outside_share": "outside regions",
    "hidden_share": "overall",
}
_IN_MASKS = ("policy", "schedule", "coverage", "window")
"""Settings that the card holds in its section ``mask``."""


def _train(run: Run, log: RunLog) -> tuple[Tally, Fitted]:
    config, dataset, method = run.config, run.dataset, run.ready()
    grid = run.masks.grid
    log.info(
        f"{len(dataset)} samples of {config.size_px} px, {grid[0]}x{grid[1]} patches, "
        f"{config.epochs} epochs of {run.steps_per_epoch} steps; masks drawn by {config.impl} on {config.device}"
    )
    if run.masks.patches < FEW_PATCHES:
        log.warn(
            f"{run.masks.patches} patches: a grid that coarse can't tell a region; "
            "set a lower backbone_options.output_stride or a larger size_px"
        )
    if dataset.absent:
        log.warn(f"{dataset.absent} samples of the region store have no maps and are left out")
    if dataset.extra:
        log.warn(f"{dataset.extra} images are not in the region store and are left out")
    tally = Tally(
        WitnessRecorder(
            dataset.sample_ids,
            patches=run.masks.patches,
            epochs=run.masks.epochs,
            seed=config.seed,
            guided=run.guide is not None,
        )
    )
    average = run.guide.teacher if run.guide else deepcopy(method) if config.ema else None

    latest: list[Step] = []
    pace = Pace()

    def step(batch: Step, index: int) -> Iterator[dict[str, Tensor]]:
        parts, visible, masked = run.step(batch)
        yield from parts
        tally.add(masked, visible)
        latest[:] = [masked]

    def after_step(done: int, scalars: dict[str, float]) -> None:
        if done % run.steps_per_epoch == 0:
            epoch = done // run.steps_per_epoch
            log.metric(done, epoch=epoch, **tally.close_epoch())
            log.timing(done, epoch=epoch, **pace.close_epoch())
            if epoch & (epoch - 1) == 0 or epoch == config.epochs:  # 1, 2, 4, 8, ...: most changes early
                log.picture(done, "image, coverage, mask, reconstruction", strip)

    def strip() -> Any:
        with ranks.alone():  # only the first of several processes draws it
            return draw_strip(method, latest[0], grid, normalise=run.normalise, restore=run.restore)

    fitted = fit(
        method,
        lambda begun: pace.follow(run.steps.begin(begun)),
        step,
        run.plan(),
        state=run.out / "run" / "state",
        log=log,
        ema=None if average is None else average.state_dict(),
        extra=tally,
        after_step=after_step,
    )
    if average is not None:
        method.load_state_dict(average.state_dict())
    return tally, fitted


def _finish(run: Run, tally: Tally, fitted: Fitted, log: RunLog) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write everything but the card."""
    config, recorder = run.config, tally.recorder
    export_encoder(
        run.method.backbone,
        run.out / "encoder",
        size_px=config.size_px,
        mean=[config.mean] * config.channels,
        std=[config.std] * config.channels,
    )
    state = run.method.backbone.model.state_dict()
    outputs = {
        "weights": tensor_digest({name: value.detach().cpu().numpy() for name, value in state.items()}),
        "samples": len(run.dataset),
        "absent": run.dataset.absent,
        "epochs": config.epochs,
        "steps": run.masks.steps,
        **tally.total,
        **recorder.write(run.out),
    }
    rows = read_metrics(run.out)
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    epochs = [row for row in rows if "epoch" in row]
    metrics: dict[str, Any] = {
        "loss_first_epoch": _epoch_loss(losses, 1, run.steps_per_epoch),
        "loss_last_epoch": _epoch_loss(losses, config.epochs, run.steps_per_epoch),
        **{name: epochs[-1][name] if epochs else None for name in _SHARES},
        "processes": fitted.processes,
    }
    if fitted.samples:
        metrics["images_per_s"] = fitted.samples / (fitted.busy_s + fitted.wait_s)
        metrics["data_wait_share"] = fitted.wait_s / (fitted.busy_s + fitted.wait_s)
    begin_loss, end_loss = (
        "unknown" if metrics[name] is None else f"{metrics[name]:.4g}"
        for name in ("loss_first_epoch", "loss_last_epoch")
    )
    log.info(f"loss {begin_loss} in the first epoch, {end_loss} in the last")
    examples = draw_examples(
        run.steps,
        run.method,
        run.guide,
        _spread(recorder.witnesses, config.pictures),
        epoch=config.epochs - 1,
        normalise=run.normalise,
        restore=run.restore,
    )
    write_examples(run.out, examples)
    facts: dict[str, object] = {
        "backbone": config.backbone,
        "method": config.method["name"],
        "policy": config.policy["name"],
        "patches": f"{run.masks.grid[0]}x{run.masks.grid[1]}",
        "samples": len(run.dataset),
        "epochs": config.epochs,
        "draws recorded": outputs["draws"],
        "of them clamped": outputs["clamped_draws"],
        "of them without region": outputs["empty_draws"],
        "loss": f"{begin_loss} to {end_loss}",
    }
    if fitted.samples:
        facts["images a second"] = f"{metrics['images_per_s']:.1f}"
        facts["time waiting for data"] = f"{metrics['data_wait_share']:.1%}"
    report = pretrain_report(
        curves={"loss": (list(losses), list(losses.values()))},
        hidden={
            label: (
                [row["epoch"] for row in epochs if row[name] is not None],
                [row[name] for row in epochs if row[name] is not None],
            )
            for name, label in _SHARES.items()
        },
        examples=examples,
        facts=facts,
        warnings=log.warnings,
        pace=pace_curves(run.out),
    )
    write_atomic(run.out / "report.html", report.encode())
    return outputs, metrics


def _epoch_loss(losses: Mapping[int, float], epoch: int, steps_per_epoch: int) -> float | None:
    """Mean loss of an epoch, from 1, by its steps' numbers; None where a damaged file has lost them all."""
    steps = range((epoch - 1) * steps_per_epoch + 1, epoch * steps_per_epoch + 1)
    kept = [losses[step] for step in steps if step in losses]
    return fmean(kept) if kept else None


def _spread(names: Sequence[str], count: int) -> list[str]:
    """Up to so many names, evenly over the whole list: the first images of a corpus look alike."""
    count = min(count, len(names))
    return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]
