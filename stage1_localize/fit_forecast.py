"""What `fit_grounder` would do and cost: its inputs are checked, a little is tried and thrown away."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from shared.cores import cores
from shared.errors import QuarantineError
from shared.forecast import Forecast, kept_aside, peak_bytes, refuse_unusable
from shared.images import read_image
from shared.pseudonyms import unsalted
from shared.workspace import look
from stage1_localize.fit_config import FitGrounderConfig
from stage1_localize.fit_job import EMBEDDING_BYTES
from stage1_localize.fit_plan import open_images, plan
from stage1_localize.grounders.lite_card import KIND
from stage1_localize.segmenters.lite_medsam import encode_image
from stage1_localize.segmenters.lite_medsam_engines import load_model

STEP_S = 0.28
"""CPU seconds of a step with four images and three prompts, measured on one core of the machine this was written on."""
START_S = 20.0
"""CPU seconds for models and report, likewise."""


@unsalted()
def forecast(
    config: FitGrounderConfig, *, images: Path, labels: Path, out: Path, fresh: bool = False
) -> tuple[FitGrounderConfig, Forecast]:
    """Check the inputs as `fit_grounder` does and estimate the run; nothing is written.

    Raises:
        UsageError: What `fit_grounder` would refuse.
        QuarantineError: None of the images can be used.
    """
    ready = plan(config, images=images, labels=labels)
    refuse_unusable(out)
    standing = "new"
    if out.is_dir() and not kept_aside(out, fresh):
        standing, _ = look(out, kind=KIND, inputs=ready.inputs, spec=ready.spec())
    things = sum(thing.region in ready.config.regions for item in ready.labels.images for thing in item.things)
    found = {
        "labels": f"{len(ready.labels.images)} images, {things} annotations of {len(ready.config.regions)} regions"
    }
    if standing == "done":
        return ready.config, Forecast(out, standing, found)
    usable, failed = open_images(labels, ready.labels)
    if not usable:
        raise QuarantineError(f"images {images}: none of the {len(failed)} labelled images can be used")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, image = load_model(), read_image(usable[0].source).pixels
        encode_image(model, image)
        started = time.process_time()
        encode_image(model, image)
        embed_s = time.process_time() - started
    finally:
        torch.set_num_threads(threads)
    workers = cores() if config.workers == "auto" else max(1, config.workers)
    fits, settings = len(ready.tasks(out, usable)), ready.settings
    fit_s = settings.steps * STEP_S * settings.prompts / 3
    seconds = START_S + embed_s * -(-len(usable) // workers) + fit_s * -(-fits // workers)
    return ready.config, Forecast(
        out,
        standing,
        found,
        seconds=seconds,
        disk_bytes=1_000_000 + fits * 1_000_000 + len(usable) * EMBEDDING_BYTES,
        memory_bytes=(1 + min(workers, fits)) * peak_bytes() + workers * len(usable) * 500_000,
        how={
            "time": f"{embed_s:.1f} s an embedding as tried x {len(usable)}, {fits} fits of {settings.steps} steps at "
            f"about {STEP_S * settings.prompts / 3:.2f} s, {workers} processes on idle cores",
            "disk": "embeddings while it runs, 2 MB a labelled image; then 1 MB for each fit, and a report",
            "memory": f"this trial's peak for each of {workers} processes and its labelled images",
        },
        warnings=[*ready.warnings, *(f"image would be quarantined: {error.reason}" for error in failed.values())],
    )
