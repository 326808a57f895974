"""A few samples for the report: image, regions, what was hidden, what the method drew."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int32, UInt8
from torch import Tensor

from shared.artifact import write_atomic
from shared.figures import REGION_COLOURS, paint
from shared.report import Example
from stage2_pretrain.masking.coverage import COVERAGE_MAX, cell_edges, orient
from stage2_pretrain.steps import Step, Steps

EXAMPLES = "examples.safetensors"
_STRIP, _STRIP_PX = 3, 224


def draw_examples(
    steps: Steps,
    method: Any,
    recorded: Mapping[str, Bool[np.ndarray, "L"]],
    *,
    epoch: int,
    normalise: Callable[[Tensor], Tensor],
    restore: Callable[[Tensor], Tensor],
) -> list[Example]:
    """Draw the hidden patches of some samples as they were masked in an epoch.

    Args:
        steps: Of the run.
        method: Trained.
        recorded: Sample id -> what was hidden of it in that epoch; none gives an empty list.
        epoch: Whose windows and masks.
        normalise: Pixels in [0, 1] to what the method takes.
        restore: The reverse.
    """
    if not recorded:
        return []
    place = {name: index for index, name in enumerate(steps.dataset.sample_ids)}
    batch = steps.dataset.batch([place[name] for name in recorded], epoch)
    image = normalise(batch["image"])
    hidden = np.stack([*recorded.values()]).reshape(-1, *steps.sampler.grid)
    drawn = restore(method.reconstruct(image, torch.from_numpy(~hidden).to(image.device))).clamp(0, 1).cpu()
    regions = steps.dataset.store.regions
    return [
        Example(
            sample_id=name,
            image=batch["image"][i].numpy(),
            maps=dict(zip(regions, window_maps(batch["maps"][i].numpy(), batch["window"][i].numpy()), strict=True)),
            hidden=hidden[i],
            reconstruction=drawn[i].numpy(),
        )
        for i, name in enumerate(recorded)
    ]


def draw_strip(
    method: Any,
    batch: Step,
    grid: tuple[int, int],
    *,
    normalise: Callable[[Tensor], Tensor],
    restore: Callable[[Tensor], Tensor],
) -> UInt8[np.ndarray, "H W 3"]:
    """The first samples of a training step, one below another: image, coverage by regions, drawn mask, reconstruction.

    Args:
        method: As it is now; left as it was.
        batch: Of the step.
        grid: Patches, rows and columns.
        normalise: Pixels in [0, 1] to what the method takes.
        restore: The reverse.
    """
    image, hidden = batch.image[:_STRIP], batch.masks.hidden[:_STRIP].reshape(-1, *grid)
    coverage = batch.masks.coverage[:_STRIP].reshape(-1, *grid).astype(np.float32) / np.float32(COVERAGE_MAX)
    taken = normalise(image)
    drawn = restore(method.reconstruct(taken, torch.from_numpy(~hidden).to(taken.device))).clamp(0, 1).cpu()
    rows = [
        np.concatenate(
            [
                paint(image[i].numpy(), side_px=_STRIP_PX),
                paint(image[i].numpy(), [(coverage[i], REGION_COLOURS[0])], side_px=_STRIP_PX),
                paint(image[i].numpy(), [], hidden[i], side_px=_STRIP_PX),
                paint(drawn[i].numpy(), side_px=_STRIP_PX),
            ],
            axis=1,
        )
        for i in range(len(image))
    ]
    return np.concatenate(rows)


def write_examples(out: Path, examples: Sequence[Example]) -> None:
    """Keep examples beside the encoder, 8 bits a value, for reports that span stages."""
    from safetensors.numpy import save

    tensors = {}
    for index, example in enumerate(examples):
        maps = np.stack([*example.maps.values()])
        parts = {"image": example.image, "maps": maps, "hidden": example.hidden, "drawn": example.reconstruction}
        for name, values in parts.items():
            tensors[f"{index}.{name}"] = (np.asarray(values, np.float32) * 255 + 0.5).astype(np.uint8)
    known = {"ids": [item.sample_id for item in examples], "regions": list(examples[0].maps) if examples else []}
    write_atomic(out / EXAMPLES, save(tensors, {"examples": json.dumps(known)}))


def read_examples(folder: Path) -> list[Example]:
    """What `write_examples` kept in an encoder's folder."""
    from safetensors import safe_open

    with safe_open(folder / EXAMPLES, "np") as file:
        known = json.loads(file.metadata()["examples"])
        found = []
        for index, sample_id in enumerate(known["ids"]):
            image, maps, hidden, drawn = (
                file.get_tensor(f"{index}.{name}").astype(np.float32) / 255
                for name in ("image", "maps", "hidden", "drawn")
            )
            by_region = dict(zip(known["regions"], maps, strict=True))
            found.append(Example(sample_id, image, by_region, hidden > 0.5, drawn))
    return found


def window_maps(maps: UInt8[np.ndarray, "K H W"], window: Int32[np.ndarray, "8"]) -> Float32[np.ndarray, "K h w"]:
    """The part of the region maps in a window, flipped and turned with it, in [0, 1].

    Args:
        maps: Of the whole image, 0 .. 254.
        window: From `stage2_pretrain.window.draw_windows`.
    """
    top, left, height, width, image_height, image_width, flip, turns = window.tolist()
    rows = cell_edges(top, height, image_height, maps.shape[1], 1)
    columns = cell_edges(left, width, image_width, maps.shape[2], 1)
    part = maps[:, rows[0] : rows[1], columns[0] : columns[1]].astype(np.float32) / np.float32(COVERAGE_MAX)
    return orient(part, flip, turns)
