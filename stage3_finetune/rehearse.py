"""What `finetune` would do and cost: some real steps are made in this process and thrown away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from shared.forecast import Forecast, kept_aside, peak_bytes, refuse_unusable, size
from shared.loop import rehearse_briefly
from shared.order import steps_per_epoch
from shared.pseudonyms import unsalted
from shared.runlog import RunLog, duration
from shared.workspace import look
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.contracts import Batch, Remembering
from stage3_finetune.data import Part, also_in_train
from stage3_finetune.features import FeaturePart
from stage3_finetune.run import Run
from stage3_finetune.train import Ready, prepare

_NEW, _AGAIN = 2, 1
_METRICS_BYTES = 130
_PAGE_BYTES = 30_000
_ROW_BYTES = 150
"""Of the metrics a step, of the report, of a prediction; measured."""
_RESAMPLES = 100


@unsalted()
def rehearse(
    config: FinetuneConfig,
    *,
    images: Path,
    labels: Path,
    encoder: str | None,
    out: Path,
    fresh: bool = False,
    planned: bool = False,
) -> tuple[Forecast, FinetuneConfig]:
    """Check the inputs as `finetune` does, make a few steps and estimate the run; nothing is written.

    Args:
        config: Of the run.
        images: Of the run.
        labels: Of the run.
        encoder: Of the run.
        out: Of the run; need not exist.
        fresh: Of the run.
        planned: The encoder is yet to be made and ``config`` names its architecture: ``out`` is taken as new.

    Returns:
        The forecast, and the settings with every ``auto`` replaced.

    Raises:
        MwmError: What `finetune` would refuse before, or in, its first steps.
    """
    refuse_unusable(out)
    ready = prepare(config, images=images, labels=labels, encoder=encoder, planned=planned)
    config, table = ready.config, ready.labels
    unlabelled = len(ready.sources) - len(table.examples)
    found = {"labels": table.line(), "start": ready.start.line}
    warnings = [table.caution] if table.caution else []
    warnings += also_in_train(table.examples, ready.sha256)
    if unlabelled:
        warnings.append(f"{unlabelled} images have no row in the labels and are left out")
    standing, begun = "new", 0
    if not planned and not kept_aside(out, fresh):
        standing, _ = look(out, kind="model", inputs=ready.start.inputs, spec=ready.spec)
        names = [path.name for path in out.glob("run/state/step-*")] if standing == "continue" else []
        begun = max((int(name.removeprefix("step-")) for name in names), default=0)
    if standing == "done":
        return Forecast(out, standing, found, warnings=warnings), config
    before = torch.get_num_threads()
    torch.set_num_threads(int(config.threads))
    try:
        return _try(ready, out, standing, found, warnings, begun), config
    finally:
        torch.set_num_threads(before)


def _try(ready: Ready, out: Path, standing: str, found: dict[str, str], warnings: list[str], begun: int) -> Forecast:
    config = ready.config
    run = ready.run(out, RunLog(out))  # the log is never entered: it writes nothing
    part = run.part("train")
    per_epoch = steps_per_epoch(len(part), config.batch_size)
    batch = -(-len(part) // per_epoch)
    model = run.trained
    run.ready()
    epochs, tried = config.epochs, batch
    if isinstance(run.task, Remembering) and run.task.remembers:
        epochs, seconds = 0, _remember(run.task, part, batch)
    else:
        seconds, tried = rehearse_briefly(
            model, lambda size: _batches(part, size), run.loss, run.plan(per_epoch), _NEW + _AGAIN, batch
        )
    scoring_s, resampling_s = _scoring_s(run, part, tried)
    reading, again = sum(seconds[1:_NEW]) / (_NEW - 1), sum(seconds[_NEW:]) / _AGAIN
    cached = min(int(part.bytes_an_image * len(part)), config.cache_mib << 20)
    again = min(reading, again) if part.bytes_an_image * len(part) <= config.cache_mib << 20 else reading
    steps = max(1, epochs) * per_epoch
    held = {split: len(ready.labels.part(split)) for split in ("val", "test")}
    wall = seconds[0] + max(0, min(steps, per_epoch) - begun) * reading + max(0, steps - max(begun, per_epoch)) * again
    wall += (epochs * held["val"] + 2 * held["val"] + held["test"]) * scoring_s
    wall += sum(held.values()) / batch * reading if run.keeps_features else 0.0
    wall += resampling_s * (3 if held["val"] else 1)
    weights = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    state = weights * (2 if held["val"] else 1) + 2 * trained
    states = 1 if wall < config.save_every_s and config.save_every_steps is None else 2
    disk = weights + states * state + steps * _METRICS_BYTES + _PAGE_BYTES + sum(held.values()) * _ROW_BYTES * 2
    forecast = Forecast(
        out,
        standing,
        found,
        seconds=wall,
        disk_bytes=disk,
        memory_bytes=peak_bytes() + cached + state // 3,
        how={
            "time": f"steps tried on {config.device}: {duration(seconds[0])} for the first, "
            f"{reading:.2f} s while images are read, {again:.2f} s after, x {steps - begun} steps to do; "
            f"then {sum(held.values())} images to score and {config.resamples} resamples",
            "disk": f"weights {size(weights)}, {states} resumable state{'s' * (states > 1)} of {size(state)}, report",
            "memory": f"{size(peak_bytes())} at the peak of this trial, {size(cached)} of kept images, "
            "a copy of the weights while saving",
        },
        warnings=warnings,
    )
    return forecast.tried_with(tried, batch)


def _batches(part: Part | FeaturePart, batch: int) -> Iterator[tuple[Batch, tuple[str, ...]]]:
    """Batches of new images, then the same again; where there are fewer images than that, they come round."""
    plan = [(0, [(number * batch + place) % len(part) for place in range(batch)]) for number in range(_NEW)]
    plan += [(1, [place % len(part) for place in range(batch)])] * _AGAIN
    for made in part.batches(plan, workers=0):
        yield made, made.sample_ids


def _remember(task: Remembering, part: Part | FeaturePart, batch: int) -> list[float]:
    """As many seconds as steps are tried: of a task that makes none, for the images of each."""
    seconds, seen, source = [], [], _batches(part, batch)
    for _ in range(_NEW + _AGAIN):
        started = time.perf_counter()
        seen.append(next(source)[0])
        seconds.append(time.perf_counter() - started)
    tried = sum(len(made.sample_ids) for made in seen)
    with torch.no_grad():
        task.remember(seen * -(-len(part) // tried), seen)  # as many as there will be, for what asks for so many
    return seconds


def _scoring_s(run: Run, part: Part | FeaturePart, batch: int) -> tuple[float, float]:
    """Seconds to score an image, decoding left out (the batch has been read before), and to resample the test part."""
    model = run.task.model
    mode = model.training
    model.eval()
    (made,) = part.batches([(0, [place % len(part) for place in range(batch)])], workers=0)
    started = time.perf_counter()
    with torch.no_grad():
        answers = list(run.task.predict(made))
    taken = time.perf_counter() - started
    model.train(mode)
    rows = run.labels.part("test")
    predictions = run.task.collect(rows, [answers[place % len(answers)] for place in range(len(rows))])
    started = time.perf_counter()
    predictions.scores(seed=0, resamples=_RESAMPLES)
    return taken / batch, (time.perf_counter() - started) * run.config.resamples / _RESAMPLES
