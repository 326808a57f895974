"""A step of MAE on packed visible tokens, beside the published way and beside the dense network.

``python -m tests.benchmarks.vit --json [--quick]``. The peers are written from the paper's description (arXiv
2111.06377) on the same timm ViT and decoder: ``published`` embeds every patch, gathers as many of each image and draws
all of them; ``dense`` encodes every patch of the image times its mask. Where images have unequal counts, as under a
region's budget, the published way needs ``padded``: all as long as the longest, and a mask. One thread, batches of 16
images of 224 px, 14x14 patches, 750 thousandths hidden, forward and backward, interleaved.
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
from stage2_pretrain.methods.mae import MAE, MAEOptions
from stage2_pretrain.methods.pixels import normalise, patches
from stage2_pretrain.methods.tokens import Tokens

BATCH, SIZE_PX, GRID, HIDE = 16, 224, 14, 750
SHOWN = GRID * GRID - (GRID * GRID * HIDE + 500) // 1000


def method(name: str, **args: Any) -> MAE:
    """An MAE of fixed weights with the default decoder."""
    backbone = build(name, in_chans=3, model_args=args, size_px=SIZE_PX, seed=0)
    return MAE(MAEOptions(), backbone, size_px=SIZE_PX, seed=0).train()


def masks(counts: Sequence[int]) -> Tensor:
    """bool [B, 14, 14] with so many visible in each image."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.zeros(len(counts), GRID * GRID, dtype=torch.bool)
    for row, count in zip(visible, counts, strict=True):
        row[torch.randperm(GRID * GRID, generator=generator)[:count]] = True
    return visible.view(-1, GRID, GRID)


def published(made: MAE, image: Tensor, visible: Tensor) -> Tensor:
    """Gather each image's visible patches, padded to the longest where counts differ; restore, draw all."""
    model, seen = made.encoder, visible.flatten(1)
    counts = seen.sum(1)
    longest = int(counts.max())
    order = (~seen).to(torch.uint8).argsort(stable=True, dim=1)
    restore = order.argsort(1)
    x = model.patch_embed(image) + model.pos_embed[:, 1:]
    x = x.gather(1, order[:, :longest, None].expand(-1, -1, x.shape[2]))
    first = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([first, x], 1)
    if int(counts.min()) == longest:
        x = model.blocks(x)
    else:
        real = torch.arange(longest + 1) <= counts[:, None]
        for block in model.blocks:
            x = block(x, attn_mask=real[:, None, None])
    x = made.embed(model.norm(x))
    # A padded place is a token again before it is restored.
    real = torch.arange(longest) < counts[:, None]
    known = torch.where(real[:, :, None], x[:, 1:], made.token)
    tokens = torch.cat([known, made.token.expand(len(x), GRID * GRID - longest, -1)], 1)
    tokens = tokens.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2])) + made.places
    return drawn_loss(made, torch.cat([x[:, :1], tokens], 1), image, seen)


def dense(made: MAE, image: Tensor, visible: Tensor) -> Tensor:
    """The whole network on the image times its mask; another function, for its time only."""
    seen = visible.flatten(1)
    spread = visible.repeat_interleave(made.patch_px, 1).repeat_interleave(made.patch_px, 2)[:, None]
    x = made.embed(made.encoder.forward_features(image * spread))
    tokens = torch.where(seen[:, :, None], x[:, 1:], made.token) + made.places
    return drawn_loss(made, torch.cat([x[:, :1], tokens], 1), image, seen)


def encoded(made: MAE, image: Tensor, visible: Tensor) -> Tensor:
    """The packed encoder alone."""
    seen = visible.flatten(1)
    return made.encode(image, Tokens(seen, made.prefix), seen).sum()


def drawn_loss(made: MAE, tokens: Tensor, image: Tensor, seen: Tensor) -> Tensor:
    """Every patch drawn, the error of the hidden ones averaged."""
    drawn = made.to_pixels(made.norm(made.decoder(tokens)))[:, 1:]
    errors = (drawn - normalise(patches(image, made.patch_px))[0]).square().mean(2)
    return (errors * ~seen).sum() / (~seen).sum()


def is_right() -> bool:
    """In float64 ours and the published way give the same loss and gradients, at equal and unequal counts."""
    image = torch.rand(3, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for counts in ((SHOWN,) * 3, (1, 30, SHOWN)):
        visible, seen = masks(counts), []
        made = method("vit_tiny_patch16_224", depth=3, init_values=0.3).double()
        trained = [value for value in made.parameters() if value.requires_grad]
        for loss in (made.loss(image, visible)["loss"], published(made, image, visible)):
            seen.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        largest = max(float(value.abs().max()) for value in seen[1])
        if any(float((a - b).abs().max()) > 1e-11 * largest for a, b in zip(*seen, strict=True)):
            return False
    return True


def timed(ways: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median CPU milliseconds an image of forward and backward, interleaved, after one round of warming up.

    Of this one-threaded process: what else runs on the machine counts less than on a clock.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way().backward()
            times[name].append((time.process_time() - started) / BATCH * 1e3)
    return {name: round(median(values[1:]), 1) for name, values in times.items()}


def steps(name: str, repeats: int) -> dict[str, Any]:
    """Times of whole steps."""
    made, image = method(name), torch.rand(BATCH, 3, SIZE_PX, SIZE_PX)
    equal = masks([SHOWN] * BATCH)
    spread = [SHOWN + round(SHOWN * 0.8 * (2 * place / (BATCH - 1) - 1)) for place in range(BATCH)]
    unequal = masks(spread)
    ways = {
        "packed": lambda: made.loss(image, equal)["loss"],
        "published": lambda: published(made, image, equal),
        "dense": lambda: dense(made, image, equal),
        "packed, unequal": lambda: made.loss(image, unequal)["loss"],
        "padded, unequal": lambda: published(made, image, unequal),
        "encoder, packed": lambda: encoded(made, image, equal),
        "encoder, dense": lambda: made.encoder.forward_features(image).sum(),
    }
    found = timed(ways, repeats)
    return {
        "net": name, "ms_per_image": found,
        "ratio_to_published": round(found["published"] / found["packed"], 2),
        "ratio_to_dense": round(found["dense"] / found["packed"], 2),
        "ratio_to_padded": round(found["padded, unequal"] / found["packed, unequal"], 2),
        "encoder_ratio_to_dense": round(found["encoder, dense"] / found["encoder, packed"], 2),
        "unequal_counts": spread,
    }  # fmt: skip


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure, print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.vit", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="the smaller net, one repeat")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    right = is_right()
    result: dict[str, Any] = {"benchmark": "vit", "gate": "green" if right else "red"}
    if right:
        repeats = 1 if options.quick else 3
        names = ("vit_tiny_patch16_224",) if options.quick else ("vit_tiny_patch16_224", "vit_small_patch16_224")
        result["steps"] = [steps(name, repeats) for name in names]
        result["repeats"] = repeats
        result["shape"] = {"batch": BATCH, "size_px": SIZE_PX, "patches": GRID**2, "hide": HIDE, "threads": 1}
        result["versions"] = {name: version(name) for name in ("torch", "timm")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if result["gate"] == "green" else 1)


if __name__ == "__main__":
    main()
