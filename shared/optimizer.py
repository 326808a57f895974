"""How a run optimises: its plan, the schedules that follow from it, the optimiser over the trained parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shared.errors import UsageError


@dataclass(frozen=True)
class Plan:
    """How to optimise.

    Attributes:
        steps: Optimiser steps of the whole run, at least 1.
        lr: Peak learning rate.
        warmup_steps: Steps of linear growth from 0 to `lr`.
        lr_end: Learning rate at the end of the cosine.
        weight_decay: Decay of weights; biases, norms and tokens (fewer than 2 axes) have none.
        weight_decay_end: What ``weight_decay`` becomes by a cosine over the whole run, or None for no change.
        optimizer: AdamW, or LAMB (timm's).
        betas: Decay rates of the optimiser's moments.
        clip_norm: Largest norm of all gradients together, or None.
        ema: Decay a step of the moving average of the weights, for a `fit` that is given one; lower at first.
        max_jump: A loss above this many times the median of the last 64 ends the fit, or None for any.
        seed: Seeds torch's own draws (dropout, drop path) of every step.
        checkpoint_s: Seconds between states.
        checkpoint_steps: Steps between states, or None for by time alone.
        keep: States to keep.
    """

    steps: int
    lr: float
    warmup_steps: int = 0
    lr_end: float = 0.0
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    optimizer: Literal["adamw", "lamb"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = 5.0
    ema: float = 0.999
    max_jump: float | None = None
    seed: int = 0
    checkpoint_s: float = 60.0
    checkpoint_steps: int | None = None
    keep: int = 2


def learning_rate(plan: Plan, index: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine from `lr` to `lr_end`.

    >>> plan = Plan(steps=10, lr=1.0, warmup_steps=2)
    >>> [round(learning_rate(plan, index), 3) for index in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    if index < plan.warmup_steps:
        return plan.lr * (index + 1) / plan.warmup_steps
    share = (index - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return plan.lr_end + (plan.lr - plan.lr_end) * 0.5 * (1 + math.cos(math.pi * share))


def weight_decay(plan: Plan, index: int) -> float:
    """Weight decay of a step: a cosine from `weight_decay` to `weight_decay_end`, if there is one.

    >>> plan = Plan(steps=5, lr=1.0, weight_decay=0.04, weight_decay_end=0.2)
    >>> [round(weight_decay(plan, index), 3) for index in range(5)]
    [0.04, 0.063, 0.12, 0.177, 0.2]
    """
    if plan.weight_decay_end is None:
        return plan.weight_decay
    share = 0.5 * (1 - math.cos(math.pi * index / max(1, plan.steps - 1)))
    return plan.weight_decay + (plan.weight_decay_end - plan.weight_decay) * share


def ema_decay(plan: Plan, index: int) -> float:
    """Decay of the moving average in a step: `Plan.ema`, but not before it has forgotten the initial weights.

    Source: exponential moving average of TensorFlow and timm, min(decay, (1 + n) / (10 + n)).

    >>> plan = Plan(steps=9, lr=1.0, ema=0.9)
    >>> [round(ema_decay(plan, index), 2) for index in (0, 1, 10, 100)]
    [0.1, 0.18, 0.55, 0.9]
    """
    return min(plan.ema, (1 + index) / (10 + index))


def build_optimizer(module: nn.Module, plan: Plan, lr_scale: Callable[[str], float] | None) -> torch.optim.Optimizer:
    """The optimiser over the trained parameters."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    spared = _spared(module)
    for name, parameter in module.named_parameters():
        scale = 1.0 if lr_scale is None else lr_scale(name)
        if parameter.requires_grad and scale > 0:
            groups.setdefault((scale, not (name in spared or _undecayed(parameter))), []).append(parameter)
    if not groups:
        raise UsageError("nothing to train: every parameter is frozen")
    listed = [{"params": params, "scale": scale, "decays": decays} for (scale, decays), params in groups.items()]
    if plan.optimizer == "lamb":
        from timm.optim.lamb import Lamb

        return Lamb(listed, lr=plan.lr, betas=plan.betas, max_grad_norm=None)  # clipping is this loop's
    return torch.optim.AdamW(listed, lr=plan.lr, betas=plan.betas)


def _spared(module: nn.Module) -> set[str]:
    """Parameters that a model itself asks to spare from decay, as timm's do: positions and tokens of a ViT."""
    found = set()
    for name, child in module.named_modules():
        asked = getattr(child, "no_weight_decay", None)
        if callable(asked):
            found |= {f"{name}.{own}" if name else own for own in asked()}
    return found


def _undecayed(parameter: Tensor) -> bool:
    """Biases, norm scales and tokens ([1, C, 1, 1]): at most one axis is longer than 1."""
    return sum(length > 1 for length in parameter.shape) < 2
