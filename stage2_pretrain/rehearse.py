"""What `pretrain` would do and cost: some real steps are made in this process and thrown away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared.artifact import Input
from shared.figures import png
from shared.forecast import Forecast, kept_aside, peak_bytes, refuse_unusable, size
from shared.loop import rehearse_briefly
from shared.order import steps_per_epoch
from shared.pseudonyms import unsalted
from shared.runlog import duration
from shared.workspace import look
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.pictures import draw_strip
from stage2_pretrain.run import FEW_PATCHES, Run, prepare, resolve
from stage2_pretrain.steps import Step
from stage2_pretrain.witness import WITNESSES_MAX

if TYPE_CHECKING:
    from shared.regions import RegionStore

_NEW, _AGAIN = 2, 1
_METRICS_BYTES = 125
_PAGE_BYTES = 130_000
_EXAMPLE_BYTES = 70_000
"""Of the metrics a step; of the report without its examples, and with each at 128 px; measured."""


@unsalted()
def rehearse(
    config: PretrainConfig,
    *,
    images: Path,
    store: RegionStore,
    out: Path,
    fresh: bool = False,
    count: int | None = None,
) -> tuple[Forecast, PretrainConfig]:
    """Check the inputs as `pretrain` does, make a few steps and estimate the run; nothing is written.

    Args:
        config: Of the run.
        images: Of the run.
        store: Region store, or a stand-in of some of its samples.
        out: Of the run; need not exist.
        fresh: Of the run.
        count: Samples of the whole run where the store is a stand-in; then ``out`` is taken as new.

    Returns:
        The forecast, and the settings with every ``auto`` replaced.

    Raises:
        MwmError: What `pretrain` would refuse before, or in, its first steps.
    """
    config = resolve(config)
    refuse_unusable(out)
    before = torch.get_num_threads()
    torch.set_num_threads(int(config.threads))
    try:
        run = prepare(config.model_copy(update={"image_cache": "off"}), store, images, out)
        config = run.config.model_copy(update={"image_cache": config.image_cache})
        samples = len(run.dataset) if count is None else count
        per_epoch = steps_per_epoch(samples, config.batch_size)
        standing, begun = "new", 0
        if count is None and not kept_aside(out, fresh):
            inputs = [Input(role="regions", kind="region-store", artifact_id=store.card.artifact_id)]
            standing, _ = look(out, kind="encoder", inputs=inputs, spec=run.spec)
            begun = steps_saved(out) if standing == "continue" else 0
        grid = run.masks.grid
        found = {
            "samples": f"{samples} of {config.size_px} px with maps of {', '.join(store.regions)}",
            "patches": f"{grid[0]}x{grid[1]}",
        }
        if standing == "done":
            return Forecast(out, standing, found), config
        batch = -(-samples // per_epoch)
        latest: list[Step] = []

        def step(made: Step, index: int) -> Iterator[dict[str, Tensor]]:
            parts, _, masked = run.step(made)
            yield from parts
            latest[:] = [masked]

        seconds, tried = rehearse_briefly(
            run.ready(),
            lambda size: run.steps.follow(_plan(len(run.dataset), size)),
            step,
            run.plan(),
            _NEW + _AGAIN,
            batch,
            few=4 * config.accumulate,
        )
        strips = _strips_bytes(run, latest[0])
    finally:
        torch.set_num_threads(before)
    forecast = _forecast(run, out, standing, found, seconds, samples, per_epoch, begun, strips)
    return forecast.tried_with(tried, batch), config


def _strips_bytes(run: Run, step: Step) -> int:
    """Of the pictures for TensorBoard, where it is installed: one after epochs 1, 2, 4, 8 ... and the last."""
    if find_spec("tensorboard") is None:
        return 0
    strip = draw_strip(run.method, step, run.masks.grid, normalise=run.normalise, restore=run.restore)
    epochs = run.config.epochs
    return len(png(strip)) * len({*(1 << power for power in range(epochs.bit_length())), epochs})


def steps_saved(out: Path) -> int:
    """Step of the newest state of an unfinished run, by its folder's name; 0 without one."""
    names = [path.name for path in out.glob("run/state/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def _plan(samples: int, batch: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Batches of new images, then the same again; where there are fewer images than that, they come round."""
    for number in range(_NEW):
        yield 0, [(number * batch + place) % samples for place in range(batch)]
    while True:
        yield 1, [place % samples for place in range(batch)]


def _forecast(
    run: Run,
    out: Path,
    standing: str,
    found: dict[str, str],
    seconds: list[float],
    samples: int,
    per_epoch: int,
    begun: int,
    strips: int,
) -> Forecast:
    config = run.config
    # The first step also warms up; the steps after it read new images, the last ones images that were kept.
    reading = sum(seconds[1:_NEW]) / (_NEW - 1)
    image_bytes = sum(int(height) * int(width) for height, width in run.dataset.sizes_px) / len(run.dataset)
    maps_bytes = len(run.dataset.store.regions) * run.dataset.store.grid[0] * run.dataset.store.grid[1]
    cached = min(int(samples * (image_bytes + maps_bytes)), config.cache_mib << 20)
    kept = samples * (image_bytes + maps_bytes) <= config.cache_mib << 20
    again = min(reading, sum(seconds[_NEW:]) / _AGAIN) if kept else reading
    steps = config.epochs * per_epoch
    wall = seconds[0] + max(0, min(steps, per_epoch) - begun) * reading
    wall += max(0, steps - max(begun, per_epoch)) * again
    weights = sum(value.nbytes for value in run.method.backbone.model.state_dict().values())
    state = sum(value.nbytes for value in run.method.state_dict().values()) + 2 * sum(
        parameter.nbytes for parameter in run.method.parameters()
    )
    if run.guide is not None or config.ema is not None:
        state += sum(value.nbytes for value in run.method.state_dict().values())
    states = 1 if wall < config.save_every_s and config.save_every_steps is None else 2
    kept_of_patches = run.masks.patches // 8 + 1 + (run.masks.patches if run.guide is not None else 0)
    witnesses = config.epochs * (min(samples, WITNESSES_MAX) * kept_of_patches + 16)
    pictures = min(config.pictures, samples) * _EXAMPLE_BYTES * (config.size_px / 128) ** 2 * 2
    disk = (
        weights
        + states * (state + witnesses)
        + witnesses
        + steps * _METRICS_BYTES
        + _PAGE_BYTES
        + int(pictures)
        + strips
    )
    warnings = []
    if run.dataset.absent:
        warnings.append(f"{run.dataset.absent} samples of the region store have no maps and are left out")
    if run.masks.patches < FEW_PATCHES:
        warnings.append(f"{run.masks.patches} patches: a grid that coarse can't tell a region")
    return Forecast(
        out,
        standing,
        found,
        seconds=wall,
        disk_bytes=disk,
        memory_bytes=peak_bytes() + cached + state // 3,
        how={
            "time": f"steps tried on {config.device}: {duration(seconds[0])} for the first, "
            f"{reading:.2f} s while images are read, {again:.2f} s after, x {steps - begun} steps to do",
            "disk": f"weights {size(weights)}, {states} resumable state{'s' * (states > 1)} of {size(state)}, "
            "witnesses and report",
            "memory": f"{size(peak_bytes())} at the peak of this trial, {size(cached)} of kept images and maps, "
            "a copy of the weights while saving",
        },
        warnings=warnings,
    )
