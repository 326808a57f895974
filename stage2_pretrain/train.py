"""`pretrain`: images and a region store in, a published encoder out; the same call again continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from shared import ranks
from shared.artifact import Artifact, Input, publish, write_atomic
from shared.backbones import export_encoder
from shared.config import dump_yaml
from shared.lease import Lease
from shared.loop import Fitted, fit
from shared.merkle import tensor_digest
from shared.regions import open_region_store
from shared.report import pretrain_report
from shared.runlog import RunLog, read_metrics, scrub
from shared.workspace import begin, set_aside
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.pace import Pace, pace_curves
from stage2_pretrain.pictures import draw_examples, draw_strip, write_examples
from stage2_pretrain.run import FEW_PATCHES, Run, prepare, resolve
from stage2_pretrain.steps import Step, Tally
from stage2_pretrain.witness import WitnessRecorder


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


_SHARES = {
    "hidden_inside_share": "inside regions",
    "hidden_outside_share": "outside regions",
    "hidden_share": "overall",
}


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
    if average is not None and config.ema is not None:
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
        recorder.hidden_in(config.epochs - 1, _spread(recorder.witnesses, config.pictures)),
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
