"""`finetune`: encoder + labels -> a model, and its scores on a test part that is touched once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared import ranks
from shared.artifact import Artifact, publish
from shared.config import dump_yaml, validate
from shared.config import spec as config_spec
from shared.cores import resolve_device, resolve_threads
from shared.errors import CorruptError
from shared.images import Source, find_sources
from shared.lease import Lease
from shared.loop import VERSION as LOOP_VERSION
from shared.loop import fit
from shared.merkle import tensor_digest
from shared.order import schedule, steps_per_epoch
from shared.runlog import RunLog, scrub
from shared.workspace import begin, set_aside
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.contracts import Batch, Predictions, Remembering, Scores, Settling, Targets
from stage3_finetune.data import Part, also_in_train, digest_images, plain_order
from stage3_finetune.features import FeaturePart
from stage3_finetune.labels import Labels, load_labels
from stage3_finetune.run import Run
from stage3_finetune.start import Start, start_from
from stage3_finetune.summary import write_report
from stage3_finetune.tasks import TASKS
from stage3_finetune.validation import BestOnVal

VERSION = 2
"""Raised when equal inputs and settings give other results."""


def finetune(
    config: FinetuneConfig,
    *,
    images: Path,
    labels: Path,
    encoder: str | None,
    out: Path,
    fresh: bool = False,
    command: str = "",
) -> Artifact:
    """Fine-tune an encoder, or train its architecture from scratch, and score it once on the test part.

    The published model is the one after the last epoch; nothing is chosen by the test part. Where there is a
    val part, the weights that were best on it are scored beside.

    Args:
        config: Settings.
        images: Folder of images, or a list (`shared.images.find_sources`).
        labels: CSV with the columns sample_id (or image) and label, optionally group, patient and split.
        encoder: ``PATH[@sha256:...]`` of an encoder, or None for random weights.
        out: Folder of the run; an unfinished run of the same specification continues.
        fresh: Keep an existing folder aside and start anew.
        command: Command line for provenance, paths replaced.

    Returns:
        The published model.

    Raises:
        ConfigError: Settings or labels that do not resolve, groups on two sides of the split.
        InputMissingError: Images, labels or encoder that do not exist.
        IncompatibleError: The encoder is another kind of artifact, or unpublished.
        CorruptError: The encoder, an image or the saved state is not what it was.
        InterruptedRun: SIGTERM or SIGINT; the state is saved.
    """
    ranks.refuse("finetune")
    ready = prepare(config, images=images, labels=labels, encoder=encoder)
    config, table, start = ready.config, ready.labels, ready.start
    if fresh:
        set_aside(out)
    with Lease(out):
        _, card = begin(out, kind="model", inputs=start.inputs, spec=ready.spec, resolved=scrub(dump_yaml(config)))
        if card is not None:
            return Artifact(out, card)
        torch.set_num_threads(int(config.threads))
        with RunLog(out) as log:
            for line in (table.line(), start.line):
                log.info(line)
            if table.caution:
                log.warn(table.caution)
            for line in also_in_train(table.examples, ready.sha256):
                log.warn(line)
            if unlabelled := len(ready.sources) - len(table.examples):
                log.info(f"{unlabelled} images have no row in the labels and are left out")
            run = ready.run(out, log)
            learnt: dict[str, int] = {}
            if isinstance(run.task, Remembering) and run.task.remembers:
                best, learnt = None, _remember(run, run.task)
            else:
                best = _train(run)
            outputs, metrics = _finish(run, best, learnt)
        card = publish(
            out, kind="model", inputs=start.inputs, spec=ready.spec, outputs=outputs, command=command, metrics=metrics
        )
    return Artifact(out, card)


@dataclass(frozen=True)
class Ready:
    """Inputs that fit each other, before anything is computed or written."""

    config: FinetuneConfig
    options: Any
    labels: Labels
    targets: Targets
    sources: Mapping[str, Source]
    sha256: Mapping[str, str]
    start: Start
    spec: Mapping[str, Any]

    def run(self, out: Path, log: RunLog) -> Run:
        """The run, with the task's head on the model."""
        config, start = self.config, self.start
        start.backbone.model.to(config.device)
        task = TASKS.load(config.task)(
            self.options,
            start.backbone,
            classes=self.labels.classes,
            preprocessing=start.preprocessing(config.size_px),
            seed=config.seed,
        )
        task.model.to(config.device)
        return Run(config, self.labels, self.targets, self.sources, self.sha256, start, task, out, log)


def prepare(config: FinetuneConfig, *, images: Path, labels: Path, encoder: str | None, planned: bool = False) -> Ready:
    """Open the inputs and refuse what does not fit; arguments and errors as `finetune`.

    ``planned``: the encoder is yet to be made, random weights stand in for it.
    """
    task_class = TASKS.load(config.task)
    options = validate(task_class.Options, config.options)
    sources = {source.sample_id: source for source in find_sources(images)}
    targets = task_class.Targets(labels, options=options, sources=sources)
    table = load_labels(
        labels,
        targets,
        known={name: source.group for name, source in sources.items()},
        names={source.known_as: name for name, source in sources.items() if source.known_as is not None},
        classes=config.classes,
        val_milli=config.val_milli,
        test_milli=config.test_milli,
        fraction_milli=config.fraction_milli,
        seed=config.seed,
    )
    if isinstance(task_class, Settling):
        options, config = task_class.settle(options, config, targets)
    start = start_from(config.model_copy(update={"freeze": False}) if planned else config, encoder)
    config = _resolve(config, start, options.model_dump())
    sha256, images_sha256 = digest_images(sources, table.examples)
    spec = {
        "version": {"finetune": VERSION, "loop": LOOP_VERSION, "task": task_class.version},
        "config": config_spec(config),
        "labels": {"rows": len(table.examples), "sha256": table.sha256},
        "images": {"rows": len(table.examples), "sha256": images_sha256},
        "numeric": {"device": config.device, "dtype": config.precision, "threads": config.threads},
        **({"weights": dict(start.weights)} if start.weights else {}),
    }
    return Ready(config, options, table, targets, sources, sha256, start, spec)


def _resolve(config: FinetuneConfig, start: Start, options: dict[str, Any]) -> FinetuneConfig:
    """Replace every ``auto``."""
    return config.model_copy(
        update={
            "options": options,
            "backbone": start.backbone.name,
            "backbone_options": start.backbone.args,
            "channels": start.backbone.in_chans,
            "device": resolve_device(config.device),
            "threads": resolve_threads(config.threads),
            "augment": config.augment.model_copy(
                update={"use": not config.freeze if config.augment.use == "auto" else config.augment.use}
            ),
        }
    )


def _train(run: Run) -> BestOnVal | None:
    """Train to the last epoch, or continue; the test part is not even opened here."""
    config, module = run.config, run.trained
    run.ready()
    part, held = run.part("train"), run.part("val") if run.labels.part("val") else None
    _embed(run, part, held)
    ids = [example.sample_id for example in part.examples]
    per_epoch = steps_per_epoch(len(ids), config.batch_size)
    best = BestOnVal(module, held, run.predict, run.log, per_epoch) if held is not None else None
    scales = run.lr_scales()
    if config.layer_decay_milli != 1000:
        told = (
            f"from {min(scales.values()):.3g} at the stem to 1 at the head"
            if scales
            else "no effect: no encoder is trained"
        )
        run.log.info(f"layer_decay_milli {config.layer_decay_milli}: {told}")

    def batches(begun: int) -> Iterator[tuple[Batch, tuple[str, ...]]]:
        order = schedule(ids, config.batch_size, config.seed, begun)
        with closing(part.batches(order, workers=config.loader_workers)) as made:
            for batch in made:
                yield batch, batch.sample_ids

    fit(
        module,
        batches,
        run.loss,
        run.plan(per_epoch),
        state=run.out / "run" / "state",
        log=run.log,
        extra=best,
        after_step=best.after_step if best else None,
        lr_scale=scales.__getitem__ if scales else None,
    )
    return best


def _embed(run: Run, *parts: Part | FeaturePart | None) -> None:
    """Have the frozen encoder see these parts' images."""
    for part in parts:
        if isinstance(part, FeaturePart):
            part.fill(lambda done, total: run.log.progress(done, total, "image"))
            run.log.info(f"features of {len(part)} images, {part.bytes_an_image:.0f} bytes each, computed once")


def _remember(run: Run, task: Remembering) -> dict[str, int]:
    """Learn without a step; from the start again after an interruption."""
    run.ready()
    parts = [run.part(split) for split in ("train", "val") if run.labels.part(split)]
    _embed(run, *parts)
    orders = [part.batches(plain_order(len(part), run.config.batch_size)) for part in parts]
    with torch.no_grad(), run.autocast():
        learnt = task.remember(orders[0], orders[1] if len(orders) > 1 else ())
    run.log.info(f"nothing to train; {', '.join(f'{name} {value}' for name, value in learnt.items())}")
    return learnt


def _finish(run: Run, best: BestOnVal | None, learnt: dict[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predict, score and write everything but the card; the one place that opens the test part."""
    model = run.task.model
    weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    splits = ("val", "test") if run.labels.part("val") else ("test",)
    predictions = _predict_once(run, "predictions", splits)
    resampling = {"seed": run.config.seed, "resamples": run.config.resamples}
    scores: dict[str, Scores] = {split: predictions.part(split).scores(**resampling) for split in splits}
    for split, found in scores.items():
        for line in found.lines():
            run.log.info(f"{split}: {line}")
    metrics: dict[str, Any] = {
        "start": run.start.kind,
        **{split: found.as_dict() for split, found in scores.items()},
    }
    outputs: dict[str, Any] = {
        "weights": tensor_digest({name: value.numpy() for name, value in weights.items()}),
        "predictions": predictions.sha256,
        "predictions_truth": predictions.truth_sha256,
        "classes": len(run.labels.classes),
        "tensors_kept": 0 if run.start.kind == "scratch" else len(weights) - len(run.task.head),
        "tensors_new": len(weights) if run.start.kind == "scratch" else len(run.task.head),
        **learnt,
        **{split: len(run.labels.part(split)) for split in ("train", *splits)},
    }
    beside = None
    if best:
        run.trained.load_state_dict(best.weights)
        others = _predict_once(run, "predictions_best_on_val", ("test",))
        model.load_state_dict(weights)
        outputs["predictions_best_on_val"] = others.sha256
        beside = best.epoch, others.scores(**resampling)
        metrics["best_on_val"] = {"epoch": best.epoch, "test": beside[1].as_dict()}
    run.task.export(run.out / "model")
    write_report(
        run.out,
        scores["test"],
        beside=beside,
        per_epoch=steps_per_epoch(outputs["train"], run.config.batch_size),
        resamples=run.config.resamples,
        facts=_facts(run),
        warnings=run.log.warnings,
        pictures=predictions.part("test").pictures(run.pixels),
    )
    return outputs, metrics


def _facts(run: Run) -> dict[str, Any]:
    parts = {split: run.labels.part(split) for split in ("train", "val", "test")}
    return {
        "start": run.start.line.split(":")[0],
        "architecture": f"{run.config.backbone}, {run.config.size_px} px",
        "epochs": run.config.epochs,
        **{name: f"{len(rows)} in {len({row.group for row in rows})} groups" for name, rows in parts.items() if rows},
    }


def _predict_once(run: Run, name: str, splits: tuple[str, ...]) -> Predictions:
    """Predict parts with the model as it is, unless that was done before this run was interrupted."""
    path = run.out / f"{name}{run.task.Predictions.suffix}"
    if path.exists():
        run.log.info(f"{path.name}: made before, read back")
        found: Predictions = run.task.Predictions.load(path)
        if found.examples != tuple(row for split in splits for row in run.labels.part(split)):
            hint = "--fresh keeps the folder aside and starts anew"
            raise CorruptError(f"{path.name}: not the predictions of this run", hint=hint)
        return found
    predictions = run.task.Predictions.join([run.predict(run.part(split)) for split in splits])
    predictions.write(path)
    return predictions
