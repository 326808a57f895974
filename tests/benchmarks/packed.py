"""G5 and G6: SparK's encoder on visible patches only, beside the published way: compute all, multiply by the mask.

``python -m tests.benchmarks.packed --json [--quick]``. The peer is `method.execution=masked`, written from the paper's
description (arXiv 2301.03580), at the faster of NCHW and channels-last in each row; plain timm without a mask stands
beside it. One thread, batches of 8 images of 224 px, 7x7 patches, forward and backward, interleaved. ``step`` is the
whole of SparK with its published decoder (768 wide), a narrower or the lean one; its decoder is not packed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from shared.backbones import build
from shared.heap import keep_freed_memory
from stage2_pretrain.methods.spark import SparK, SparKOptions

BATCH, SIZE_PX, GRID = 8, 224, 7
GOALS = {("convnext_tiny", 600): 2.5, ("convnext_tiny", 750): 3.9, ("resnet50", 600): 2.8, ("resnet50", 750): 4.2}
STEPS = {768: 1.4, 384: 3.4}
"""Width of the decoder -> goal of the whole step against the published way with the published decoder."""


def method(name: str, execution: str, width: int, layout: torch.memory_format, decoder: str = "published") -> SparK:
    """A SparK of fixed weights, whose layer scale is large enough to see an error through it."""
    args = {"ls_init_value": 0.3} if name.startswith("convnext") else {}
    backbone = build(name, in_chans=3, model_args=args, seed=0)
    options = SparKOptions(decoder_width=width, decoder=decoder, execution=execution)
    made = SparK(options, backbone, size_px=SIZE_PX, seed=0)
    return made.to(memory_format=layout).train()


def masks(milli: int) -> Tensor:
    """bool [8, 7, 7], each image with the same number visible."""
    generator = torch.Generator().manual_seed(milli)
    count = GRID * GRID - (GRID * GRID * milli + 500) // 1000
    visible = torch.zeros(BATCH, GRID * GRID, dtype=torch.bool)
    for row in visible:
        row[torch.randperm(GRID * GRID, generator=generator)[:count]] = True
    return visible.view(BATCH, GRID, GRID)


def encode(made: SparK, image: Tensor, visible: Tensor) -> list[Tensor]:
    """Dense features of the four scales: what a decoder takes, scattering included."""
    where = made.where(visible)
    features = made.encode(image, where)
    return [where.dense(feature) for feature in features] if made.execution == "packed" else features


def is_right(name: str) -> bool:
    """In float64 both give the same features, and gradients to the pixels."""
    seen = []
    visible = masks(600)[:2]
    for execution in ("packed", "masked"):
        made = method(name, execution, 64, torch.contiguous_format).double()
        image = torch.rand(2, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        image.requires_grad_()
        features = encode(made, image, visible)
        (gradient,) = torch.autograd.grad(sum((feature * feature.cos()).sum() for feature in features), image)
        seen.append([*(feature.detach() for feature in features), gradient])
    return all(float((a - b).abs().max() / b.abs().max()) < 1e-11 for a, b in zip(*seen, strict=True))


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that are kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def timed(ways: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median milliseconds an image of forward and backward, interleaved, after one round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way().backward()
            times[name].append((time.perf_counter() - started) / BATCH * 1e3)
    return {name: round(median(values[1:]), 1) for name, values in times.items()}


def encoders(name: str, milli: int, repeats: int) -> dict[str, Any]:
    """Times and memory of an encoder alone."""
    visible = masks(milli)
    layouts = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}
    image = torch.rand(BATCH, 3, SIZE_PX, SIZE_PX)

    def way(made: SparK, layout: torch.memory_format) -> Callable[[], Tensor]:
        pixels = image.to(memory_format=layout)
        return lambda: sum((feature.sum() for feature in encode(made, pixels, visible)), torch.zeros(()))

    ours = method(name, "packed", 64, torch.channels_last)
    plain = method(name, "packed", 64, torch.channels_last).backbone
    pixels = image.to(memory_format=torch.channels_last)
    ways = {"packed": way(ours, torch.channels_last)}
    ways |= {f"masked, {text}": way(method(name, "masked", 64, kind), kind) for text, kind in layouts.items()}
    ways["plain timm, no mask"] = lambda: sum((value.sum() for value in plain.features(pixels)), torch.zeros(()))
    found = timed(ways, repeats)
    best = min(found[f"masked, {text}"] for text in layouts)
    saved = {text: saved_bytes(ways[text]) for text in ("packed", "masked, channels last")}
    return {
        "hide": milli, "ms_per_image": found, "ratio": round(best / found["packed"], 2),
        "goal": GOALS[name, milli], "ratio_to_plain": round(found["plain timm, no mask"] / found["packed"], 2),
        "saved_for_backward": round(saved["packed"] / saved["masked, channels last"], 2),
    }  # fmt: skip


def steps(name: str, repeats: int) -> dict[str, Any]:
    """Times of the whole step at 600 thousandths hidden."""
    visible, image = masks(600), torch.rand(BATCH, 3, SIZE_PX, SIZE_PX).to(memory_format=torch.channels_last)

    def way(execution: str, width: int, decoder: str = "published") -> Callable[[], Tensor]:
        made = method(name, execution, width, torch.channels_last, decoder)
        return lambda: made.loss(image, visible)["loss"]

    names = [(execution, width) for width in STEPS for execution in ("packed", "masked")]
    ways = {f"{execution}, {width}": way(execution, width) for execution, width in names}
    ways |= {f"packed, lean {width}": way("packed", width, "lean") for width in STEPS}
    found = timed(ways, repeats)
    return {
        "hide": 600, "ms_per_image": found,
        "to_published": {
            width: {"ratio": round(found["masked, 768"] / found[f"packed, {width}"], 2), "goal": goal}
            for width, goal in STEPS.items()
        },
        "lean_to_published": {
            width: round(found["masked, 768"] / found[f"packed, lean {width}"], 2) for width in STEPS
        },
        "same_decoder": {width: round(found[f"masked, {width}"] / found[f"packed, {width}"], 2) for width in STEPS},
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure, print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.packed", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="one row a net, one repeat")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    names = ("convnext_tiny", "resnet50")
    right = all([is_right(name) for name in names])
    result: dict[str, Any] = {"benchmark": "packed", "gate": "green" if right else "red"}
    if right:
        repeats = 1 if options.quick else 5
        for goal, name in zip(("G5", "G6"), names, strict=True):
            rows = [encoders(name, milli, repeats) for milli in ((600,) if options.quick else (600, 750))]
            result[goal] = {"net": name, "encoder": rows, **({} if options.quick else {"step": steps(name, repeats)})}
        result["repeats"] = repeats
        result["shape"] = {"batch": BATCH, "size_px": SIZE_PX, "patches": GRID * GRID, "threads": 1}
        result["versions"] = {name: version(name) for name in ("torch", "timm")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


if __name__ == "__main__":
    main()
