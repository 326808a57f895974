"""Fit the head of `lite` on cached embeddings: the same examples, words and seed give the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float32, UInt8
from torch import Tensor
from torch.nn import functional as F

from stage1_localize.grounders.lite_head import CELLS, MASK_CELLS, Answer, LiteHead

VERSION = 1
"""Raised when equal examples, words, settings and seed give other weights."""
IGNORE_MIN = 128
"""An ``ignore`` value from here on takes a mask cell out of the mask loss."""
SHIFT_MAX_CELLS = 6


@dataclass(frozen=True)
class Example:
    """One image with what is known of it, in the frame of the padded square input.

    A concept that is in neither ``masks`` nor ``absent`` is unknown: it is never asked, since "not labelled" is
    not "not there".

    Attributes:
        source: Names a part of the batch mix.
        group: What must stay on one side of a split.
        embedding: Of the frozen encoder; may be a memory map.
        pixels: Padded input, [0, 1], one or three channels.
        masks: Concept that is present -> share of each mask cell that it fills, 0 to 255.
        absent: Concepts known not to be there.
        boxes: Concept -> boxes x0, y0, x1, y1 in embedding cells (0 to 64), where instances are known.
        ignore: Mask cells whose truth is unknown, 255, else 0.
        lateral: Concepts that a mirrored image would falsify.
        turns: Whether the image has no up: quarter turns and vertical flips are as likely.
    """

    source: str
    group: str
    embedding: Float16[np.ndarray, "256 64 64"]
    pixels: Float16[np.ndarray, "C 256 256"]
    masks: Mapping[str, UInt8[np.ndarray, "128 128"]]
    absent: frozenset[str]
    boxes: Mapping[str, Float32[np.ndarray, "n 4"]] = field(default_factory=dict)
    ignore: UInt8[np.ndarray, "128 128"] | None = None
    lateral: frozenset[str] = frozenset()
    turns: bool = False


@dataclass(frozen=True)
class FitSettings:
    """How the head is fitted.

    Attributes:
        mix: Source -> images of it in every batch.
        prompts: Asked of each image.
        steps: Optimiser steps.
        warmup: Steps of linear warm-up; then a cosine to 0.
        learning_rate: Peak, AdamW.
        weight_decay: AdamW.
        foreign_share: Share of the absent prompts that are foreign strings, 0 to 1.
        threads: CPU threads; results are equal for equal threads.
    """

    mix: Mapping[str, int]
    prompts: int = 4
    steps: int = 2500
    warmup: int = 50
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    foreign_share: float = 0.15
    threads: int = 1


@dataclass
class Prompts:
    """K prompts for each of B images, with what the head should answer.

    Attributes:
        tokens: Unit vectors, sentence first, zeros after the last.
        filled: True where a token is real.
        present: 1 where the concept is there, else 0.
        mask: Share of each mask cell, [0, 1].
        weight: 0 where the truth of a mask cell is unknown, else 1.
        centres: (image, prompt, heat [64, 64], cell index [n], log size [n, 2]) where instances are known.
    """

    tokens: Float[Tensor, "B K T 384"]
    filled: Bool[Tensor, "B K T"]
    present: Float[Tensor, "B K"]
    mask: Float[Tensor, "B K 128 128"]
    weight: Float[Tensor, "B K 128 128"]
    centres: list[tuple[int, int, Tensor, Tensor, Tensor]]


def fit_head(
    examples: Sequence[Example],
    concepts: Mapping[str, Sequence[str]],
    foreign: Sequence[str],
    encode_text: Callable[[str], Float32[np.ndarray, "T 384"]],
    settings: FitSettings,
    *,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Tensor]:
    """Fit a head.

    Args:
        examples: Training images; every source of the mix has at least one.
        concepts: Concept -> wordings that mean it.
        foreign: Strings that mean no concept, asked as absent prompts.
        encode_text: Unit vectors of a wording, sentence first.
        settings: Batch mix, steps, optimiser.
        seed: Of the initial weights and of every draw.
        start: State of a `LiteHead` to begin with; None: from scratch.
        report: Called with the step and its loss; what it raises ends the fit.

    Returns:
        The state of a `LiteHead`, float32.

    Raises:
        ValueError: A source of the mix has no example.
    """
    pools = {source: [e for e in examples if e.source == source] for source in settings.mix}
    empty = sorted(source for source, pool in pools.items() if not pool)
    if empty:
        raise ValueError(f"no example of source {', '.join(empty)}")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    texts = [*foreign, *(text for wordings in concepts.values() for text in wordings)]
    vectors = {text: torch.from_numpy(encode_text(text).copy()) for text in dict.fromkeys(texts)}
    head = LiteHead().train()
    if start is not None:
        head.load_state_dict(dict(start))
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, settings))
    for step in range(settings.steps):
        drawn = [pools[s][rng.integers(len(pools[s]))] for s, count in settings.mix.items() for _ in range(count)]
        drawn = [augment(example, rng) for example in drawn]
        asked = draw_prompts(drawn, concepts, foreign, vectors, settings, rng)
        embedding = torch.stack([torch.from_numpy(e.embedding).float() for e in drawn])
        pixels = torch.stack([torch.from_numpy(e.pixels).float().expand(3, -1, -1) for e in drawn])
        loss = _loss(head.ask(head.look(_disturb(embedding), pixels), asked.tokens, asked.filled), asked)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        if torch.isfinite(norm):
            optimiser.step()
        schedule.step()
        report(step + 1, float(loss.detach()))
    return {name: tensor.detach().clone() for name, tensor in head.eval().state_dict().items()}


def augment(example: Example, rng: np.random.Generator) -> Example:
    """Shift by whole cells, mirror, and turn where the image has no up; embedding, pixels and truth alike.

    The encoder is only roughly equivariant, so a moved embedding is a noisy one: that too is wanted. A mirrored
    example loses its lateral concepts; one that would lose all it has is not mirrored.
    """
    down, right = (int(d) for d in rng.integers(-SHIFT_MAX_CELLS, SHIFT_MAX_CELLS + 1, 2))
    mirror = bool(rng.random() < 0.5) and not (example.masks and example.masks.keys() <= example.lateral)
    turns = int(rng.integers(4)) if example.turns else 0

    def move(array: np.ndarray) -> np.ndarray:
        scale = array.shape[-1] // CELLS
        moved = array[..., ::-1] if mirror else array
        moved = np.rot90(moved, turns, axes=(-2, -1))
        return _shift(moved, down * scale, right * scale)

    boxes = {name: _move_boxes(b, mirror, turns, down, right) for name, b in example.boxes.items()}
    gone = example.lateral if mirror else frozenset()
    # A mirrored left kidney passes for a right one: where there is one side, the other is no longer absent.
    unsure = gone if gone & example.masks.keys() else frozenset()
    return Example(
        source=example.source,
        group=example.group,
        embedding=move(example.embedding),
        pixels=move(example.pixels),
        masks={name: move(mask) for name, mask in example.masks.items() if name not in gone},
        absent=example.absent - unsure,
        boxes={name: b for name, b in boxes.items() if name not in gone},
        ignore=None if example.ignore is None else move(example.ignore),
        lateral=example.lateral,
        turns=example.turns,
    )


def _shift(array: np.ndarray, down: int, right: int) -> np.ndarray:
    height, width = array.shape[-2:]
    out = np.zeros(array.shape, array.dtype)
    rows = slice(max(0, down), min(height, height + down))
    columns = slice(max(0, right), min(width, width + right))
    out[..., rows, columns] = array[
        ..., rows.start - down : rows.stop - down, columns.start - right : columns.stop - right
    ]
    return out


def _move_boxes(boxes: np.ndarray, mirror: bool, turns: int, down: int, right: int) -> np.ndarray:
    x0, y0, x1, y1 = boxes.T
    if mirror:
        x0, x1 = CELLS - x1, CELLS - x0
    for _ in range(turns):  # as np.rot90 turns: anticlockwise
        x0, y0, x1, y1 = y0, CELLS - x1, y1, CELLS - x0
    return np.stack([x0 + right, y0 + down, x1 + right, y1 + down], axis=1).astype(np.float32)


def draw_prompts(
    drawn: Sequence[Example],
    concepts: Mapping[str, Sequence[str]],
    foreign: Sequence[str],
    vectors: Mapping[str, Tensor],
    settings: FitSettings,
    rng: np.random.Generator,
) -> Prompts:
    """Draw prompts for every image: up to three of what is there, the rest of what is not, never the unknown.

    Args:
        drawn: B examples.
        concepts: Concept -> wordings.
        foreign: Strings that mean no concept.
        vectors: Wording or foreign string -> its unit vectors [T, 384].
        settings: K, and the share of foreign strings.
        rng: Of the draws.
    """
    count = settings.prompts
    shape = (len(drawn), count)
    mask, weight, present = torch.zeros(*shape, MASK_CELLS, MASK_CELLS), torch.ones(*shape), torch.zeros(shape)
    weight = weight[..., None, None].repeat(1, 1, MASK_CELLS, MASK_CELLS)
    centres = []
    rows: list[Tensor] = []
    for i, example in enumerate(drawn):
        there = [str(name) for name in rng.permutation(sorted(example.masks))][: min(3, count)]
        elsewhere = sorted(example.absent)
        for j in range(count):
            if j < len(there):
                name = there[j]
                wording = _one_of(concepts[name], rng)
                present[i, j] = 1
                mask[i, j] = torch.from_numpy(example.masks[name]).float() / 255
                if name in example.boxes:
                    centres.append((i, j, *centre_targets(example.boxes[name])))
            elif foreign and (not elsewhere or rng.random() < settings.foreign_share):
                wording = _one_of(foreign, rng)
            else:
                name = _one_of(elsewhere, rng)
                wording = _one_of(concepts[name], rng)
            if example.ignore is not None and j < len(there):
                weight[i, j] = torch.from_numpy(example.ignore < IGNORE_MIN).float()
            rows.append(vectors[wording])
    length = max(len(row) for row in rows)
    tokens = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    filled = torch.tensor([[t < len(row) for t in range(length)] for row in rows])
    return Prompts(tokens.unflatten(0, shape), filled.unflatten(0, shape), present, mask, weight, centres)


def _one_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]


def centre_targets(boxes: Float32[np.ndarray, "n 4"]) -> tuple[Tensor, Tensor, Tensor]:
    """Heat map of centres with a Gaussian a box, cell index of each centre, log of width and height in cells.

    Boxes whose centre lies outside the grid are left out.
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = ((centre >= 0) & (centre < CELLS)).all(axis=1)
    centre, size = centre[kept], np.maximum((boxes[:, 2:] - boxes[:, :2])[kept], 0.5)
    cell = np.floor(centre)
    grid = np.arange(CELLS)
    spread = np.maximum(0.7, 0.12 * np.sqrt(size.prod(axis=1)))[:, None]
    along = [np.exp(-((grid - cell[:, [axis]]) ** 2) / (2 * spread**2)) for axis in (0, 1)]
    heat = (along[1][:, :, None] * along[0][:, None, :]).max(axis=0, initial=0.0)
    index = (cell[:, 1] * CELLS + cell[:, 0]).astype(np.int64)
    return torch.from_numpy(heat).float(), torch.from_numpy(index), torch.from_numpy(np.log(size)).float()


def _loss(answer: Answer, asked: Prompts) -> Tensor:
    """Cross-entropy and Dice of masks, focal loss of centres, L1 of log sizes, cross-entropy of presence."""
    pixel = F.binary_cross_entropy_with_logits(answer.mask, asked.mask, reduction="none")
    mask_loss = (pixel * asked.weight).sum() / asked.weight.sum()
    probability = answer.mask.sigmoid() * asked.weight
    target = asked.mask * asked.weight
    overlap = (2 * (probability * target).sum((-2, -1)) + 1) / ((probability + target).sum((-2, -1)) + 1)
    dice_loss = ((1 - overlap) * asked.present).sum() / asked.present.sum().clamp(min=1)
    presence_loss = F.binary_cross_entropy_with_logits(answer.presence, asked.present)
    centre_loss = answer.centre.new_zeros(())
    for image, prompt, heat, index, log_size in asked.centres:
        size = answer.log_size[image].flatten(1)[:, index].T
        wrong_size = (size - log_size).abs().mean() if len(index) else centre_loss.new_zeros(())
        centre_loss = centre_loss + focal_loss(answer.centre[image, prompt], heat) + 0.5 * wrong_size
    centre_loss = centre_loss / max(1, len(asked.centres))
    return mask_loss + 0.5 * dice_loss + 0.1 * centre_loss + 0.2 * presence_loss


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """Penalty-reduced focal loss of centre maps (Law and Deng, CornerNet, 2018), a centre."""
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    hit = heat == heat.new_ones(())
    loss = torch.where(hit, -((1 - p) ** 2) * p.log(), -((1 - heat) ** 4) * p**2 * (1 - p).log())
    return loss.sum() / hit.sum().clamp(min=1)


def _disturb(embedding: Tensor) -> Tensor:
    """Noise on every value and a twentieth of the channels lost: cached embeddings vary too little."""
    noisy = embedding + 0.1 * embedding.std() * torch.randn_like(embedding)
    return F.dropout2d(noisy, 0.05)


def _rate(step: int, settings: FitSettings) -> float:
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(1, settings.steps - settings.warmup)))
