"""One training loop for every stage: schedule, clipping, EMA, states, signals; the stage gives one step function.

A run that is interrupted at any step and continued ends with the bits of one that was not (CPU, equal
threads): sample order and torch's own draws are functions of names, and all else is in the state.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from shared import ranks
from shared.artifact import refuse_without_room
from shared.checkpoint import latest_state, save_state
from shared.errors import CorruptError, InterruptedRun, MwmError, UsageError
from shared.heap import keep_freed_memory
from shared.loader import loader_deaths
from shared.rng import seed_key
from shared.runlog import RunLog, read_metrics
from shared.signals import Signals

VERSION = 1
"""Raised when equal inputs and plans give other weights; part of a run's specification."""


class NonFiniteError(UsageError, ArithmeticError):
    """The loss or a gradient became NaN or infinite (exit 2)."""

    kind = "non-finite"


class ExplodedError(UsageError, ArithmeticError):
    """The loss jumped to many times what it was (exit 2)."""

    kind = "exploded"


class MemoryFullError(MwmError, MemoryError):
    """A step does not fit into memory (exit 2)."""

    kind = "out-of-memory"
    exit_code = 2


_RECENT, _ENOUGH = 64, 16
"""Losses whose median a jump is measured by, and how many there must be."""


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
        ema: Decay a step of the moving average of the weights, for a `fit` that is given one.
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


class Stateful(Protocol):
    """Something beside the weights that a resumed run needs: witnesses, the best score so far."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that describe it whole."""
        ...

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Become what `state` described."""
        ...


@dataclass
class Fitted:
    """What `fit` leaves beside the trained module.

    Attributes:
        steps: Steps of the whole run.
        resumed_from: Step that this process began at.
        wait_s: Seconds this process waited for data.
        busy_s: Seconds it computed.
        samples: Samples it saw, in all processes.
        processes: ``(step, count)``: from that step on there were so many processes.
    """

    steps: int
    resumed_from: int
    wait_s: float
    busy_s: float
    samples: int
    processes: list[tuple[int, int]]


Scalars = dict[str, Tensor] | Iterator[dict[str, Tensor]]


def fit(
    module: nn.Module,
    batches: Callable[[int], Iterable[tuple[Any, Sequence[str]]]],
    step: Callable[[Any, int], Scalars],
    plan: Plan,
    *,
    state: Path,
    log: RunLog,
    unit: str = "step",
    ema: dict[str, Tensor] | None = None,
    extra: Stateful | None = None,
    after_step: Callable[[int, dict[str, float]], None] | None = None,
    lr_scale: Callable[[str], float] | None = None,
    where: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train a module in place, from the newest state in ``state`` if there is one.

    Args:
        module: Holds every trained parameter and buffer. Its mode and device are the caller's.
        batches: Called once with the number of steps done; yields a batch and its sample ids for each
            step to come. Of several processes (`shared.ranks`): this one's share, and the ids of the whole.
        step: ``step(batch, index)`` returns scalars with ``"loss"``, the one that is minimised; index from 0.
            Of several processes: its part of each, so that their sum is the scalar of the whole batch.
            A batch that is too large for memory may be done in parts: an iterator of such scalars, whose sums
            are those of the batch; each part is differentiated before the next is asked for.
        plan: How to optimise.
        state: Folder of the states; `shared.checkpoint`.
        log: Gets progress, and a metrics line a step: scalars, ``lr``, ``grad_norm``.
        unit: What a step is called in the progress line.
        ema: State dict of an equal module, which becomes the moving average of this one's: after every step its
            values are moved in place, so that a module that holds them is the average. Saved and restored.
        extra: Saved and restored with the weights.
        after_step: Called with the number of steps done and the step's scalars, before a state is saved:
            what it changes in ``extra`` is in that state.
        lr_scale: Factor of the learning rate by parameter name; 0 freezes.
        where: Marks the metrics lines of this fit where a run has several, e.g. ``{"fold": 2}``.

    Returns:
        Timings. Done steps are not repeated: a finished fit returns at once.

    Raises:
        InterruptedRun: SIGTERM or SIGINT came; the state is saved. Or a loader process was killed; the last one stays.
        NonFiniteError: Loss or gradient not finite; names the samples. The states before it stay.
        ExplodedError: The loss jumped, see `Plan.max_jump`; the same.
        MemoryFullError: A step does not fit into memory; the same.
        CorruptError: The states are broken, or of another module.
    """
    keep_freed_memory()
    optimizer = _optimizer(module, plan, lr_scale)
    writer = ranks.rank() == 0
    tags = dict(where or {})
    found = latest_state(state, log.warn)
    begun, processes = 0, [(0, ranks.size())]
    if found is not None:
        begun, tensors, meta = found
        _restore(begun, tensors, meta, module, optimizer, ema, extra)
        log.info(f"continuing from {unit} {begun} of {plan.steps}")
        processes = [(int(step), int(count)) for step, count in meta.get("processes", [(0, 1)])]
        if processes[-1][1] != ranks.size() and begun < plan.steps:
            processes.append((begun, ranks.size()))
            log.info(f"{ranks.size()} processes from here, {processes[-2][1]} before")
    if len(begins := set(ranks.gather(begun))) > 1:
        raise UsageError(f"the processes found states of {unit}s {sorted(begins)}: --out must be one shared folder")
    log.rewind(begun, **tags)
    fitted = Fitted(plan.steps, begun, 0.0, 0.0, 0, processes)
    if begun >= plan.steps:
        return fitted
    if writer:
        _refuse_without_room(module, ema, state, plan.keep)
    recent = deque(_losses(log, tags, begun), _RECENT)
    saved_at = time.monotonic()
    source = iter(batches(begun))
    with Signals() as signals, torch.random.fork_rng(devices=[]), _closing(source), loader_deaths():
        for index in range(begun, plan.steps):
            waited = time.perf_counter()
            batch, sample_ids = next(source)
            started = time.perf_counter()
            torch.manual_seed((seed_key("torch", plan.seed) + index) % 2**63)
            scalars = _advance(module, optimizer, step, batch, sample_ids, plan, index, recent)
            if ema is not None:
                _average(ema, module, plan.ema)
            ended = time.perf_counter()
            fitted.wait_s += started - waited
            fitted.busy_s += ended - started
            fitted.samples += len(sample_ids)
            done = index + 1
            log.metric(done, **tags, **scalars)
            if after_step is not None:
                after_step(done, scalars)
            rate = fitted.samples / (fitted.wait_s + fitted.busy_s)
            log.progress(done, plan.steps, unit, loss=scalars["loss"], img_per_s=rate)
            due = time.monotonic() - saved_at >= plan.checkpoint_s or (
                plan.checkpoint_steps is not None and done % plan.checkpoint_steps == 0
            )
            stopping = ranks.total(signals.caught is not None) > 0
            if writer and (due or stopping or done == plan.steps):
                log.sync()
                tensors, meta = _collect(module, optimizer, ema, extra)
                save_state(state, done, tensors, {**meta, "processes": processes}, keep=plan.keep)
                saved_at = time.monotonic()
            if stopping:
                ranks.wait()  # until the state is saved: a launcher ends all processes when one has ended
                raise InterruptedRun(
                    f"{signals.caught or 'a signal'} after {unit} {done} of {plan.steps}; state saved",
                    hint="run the same command again: it continues",
                )
    return fitted


def _refuse_without_room(module: nn.Module, ema: Mapping[str, Tensor] | None, state: Path, keep: int) -> None:
    """Weights, the optimiser's two moments, their average; as often as states stand beside each other in saving."""
    values = [*module.state_dict().values(), *(ema or {}).values()]
    values += [parameter for parameter in module.parameters() if parameter.requires_grad] * 2
    size = sum(value.numel() * value.element_size() for value in values)
    held = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    refuse_without_room(state.parent, (keep + 1) * size - held, f"{keep + 1} states of the run")


def rehearse(
    module: nn.Module,
    batches: Iterable[tuple[Any, Sequence[str]]],
    step: Callable[[Any, int], Scalars],
    plan: Plan,
    count: int,
) -> list[float]:
    """Make some steps of `fit` to see what one takes; no state, no log, and the module is left changed.

    Returns:
        Seconds of each step, waiting for its data included.

    Raises:
        NonFiniteError: Loss or gradient not finite.
    """
    keep_freed_memory()
    optimizer = _optimizer(module, plan, None)
    seconds: list[float] = []
    source = iter(batches)
    with torch.random.fork_rng(devices=[]):
        for index in range(count):
            started = time.perf_counter()
            batch, sample_ids = next(source)
            torch.manual_seed((seed_key("torch", plan.seed) + index) % 2**63)
            _advance(module, optimizer, step, batch, sample_ids, plan, index, deque())
            seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def _closing(source: Iterator[Any]) -> Iterator[None]:
    """End a generator, and with it its threads and processes, also when an error's traceback still holds it."""
    try:
        yield
    finally:
        if isinstance(source, Generator):
            source.close()


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


def _optimizer(module: nn.Module, plan: Plan, lr_scale: Callable[[str], float] | None) -> torch.optim.Optimizer:
    """The optimiser over the trained parameters."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        scale = 1.0 if lr_scale is None else lr_scale(name)
        if parameter.requires_grad and scale > 0:
            groups.setdefault((scale, not _undecayed(parameter)), []).append(parameter)
    if not groups:
        raise UsageError("nothing to train: every parameter is frozen")
    listed = [{"params": params, "scale": scale, "decays": decays} for (scale, decays), params in groups.items()]
    if plan.optimizer == "lamb":
        from timm.optim.lamb import Lamb

        return Lamb(listed, lr=plan.lr, betas=plan.betas, max_grad_norm=None)  # clipping is this loop's
    return torch.optim.AdamW(listed, lr=plan.lr, betas=plan.betas)


def _undecayed(parameter: Tensor) -> bool:
    """Biases, norm scales and tokens ([1, C, 1, 1]): at most one axis is longer than 1."""
    return sum(length > 1 for length in parameter.shape) < 2


def _advance(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[Any, int], Scalars],
    batch: Any,
    sample_ids: Sequence[str],
    plan: Plan,
    index: int,
    recent: deque[float],
) -> dict[str, float]:
    rate = learning_rate(plan, index)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
        group["weight_decay"] = weight_decay(plan, index) if group["decays"] else 0.0
    optimizer.zero_grad(set_to_none=True)
    own: dict[str, float] = {}
    with _memory(index, sample_ids):
        made = step(batch, index)
        for part in [made] if isinstance(made, dict) else made:
            for name, value in part.items():
                own[name] = own.get(name, 0.0) + float(value.detach())
            part["loss"].backward()
    scalars = ranks.totals(own)
    _check_finite("loss", scalars["loss"], index, sample_ids)
    _check_jump(scalars["loss"], recent, plan.max_jump, index, sample_ids)
    ranks.add_gradients(module.parameters())
    norm = nn.utils.clip_grad_norm_(module.parameters(), plan.clip_norm or math.inf)
    scalars["grad_norm"] = float(norm)
    _check_finite("gradient norm", scalars["grad_norm"], index, sample_ids)
    optimizer.step()
    return {**scalars, "lr": rate}


def _check_finite(what: str, value: float, index: int, sample_ids: Sequence[str]) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{what} is {value} at step {index + 1}, expected a finite number; samples: {_shown(sample_ids)}",
            hint="lower lr, or look at these samples; the state before this step is kept",
        )


def _check_jump(
    value: float, recent: deque[float], max_jump: float | None, index: int, sample_ids: Sequence[str]
) -> None:
    """Compare with the median of the last losses, and make it one of them."""
    usual = median(recent) if len(recent) >= _ENOUGH else math.inf
    if max_jump is not None and value > max_jump * usual:
        raise ExplodedError(
            f"loss is {value:.4g} at step {index + 1}, {value / usual:.0f} times the median of the {len(recent)} "
            f"before ({usual:.4g}), expected at most {max_jump:g} times; samples: {_shown(sample_ids)}",
            hint="lower lr or warm up longer, or look at these samples; the state before this step is kept",
        )
    recent.append(value)


def _losses(log: RunLog, tags: Mapping[str, Any], begun: int) -> list[float]:
    """Of the steps that a resumed fit has done."""
    return [
        row["loss"]
        for row in read_metrics(log.out)
        if row["step"] <= begun and row.get("loss") is not None and all(row.get(k) == tags[k] for k in tags)
    ]


def _shown(sample_ids: Sequence[str]) -> str:
    return ", ".join(sample_ids[:8]) + (f" and {len(sample_ids) - 8} more" if len(sample_ids) > 8 else "")


@contextmanager
def _memory(index: int, sample_ids: Sequence[str]) -> Iterator[None]:
    """What torch says where memory ends, in our words."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # A GPU's has a class; the CPU allocator's is a RuntimeError that is known by its words alone.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MemoryFullError(
            f"out of memory in step {index + 1} of {len(sample_ids)} images: {_first_line(error)}",
            hint="the batch must be smaller: lower batch_size; the images' side (size_px) counts squared",
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


@torch.no_grad()
def _average(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            ema[name].mul_(decay).add_(value, alpha=1 - decay)
        else:
            ema[name].copy_(value)


def _collect(
    module: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor] | None, extra: Stateful | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"module/{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in (ema or {}).items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    meta: dict[str, Any] = {}
    if extra is not None:
        more, meta["extra"] = extra.state()
        tensors |= {f"extra/{name}": value for name, value in more.items()}
    return tensors, meta


def _restore(
    begun: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor] | None,
    extra: Stateful | None,
) -> None:
    parts: dict[str, dict[str, Tensor]] = {"module": {}, "ema": {}, "optimizer": {}, "extra": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    parameters = dict(module.named_parameters())
    try:
        module.load_state_dict(parts["module"])
        for name, value in (ema or {}).items():
            value.copy_(parts["ema"][name])
        for name, value in parts["optimizer"].items():
            key, _, owner = name.partition("/")
            parameter = parameters[owner]
            # Moments take the strides of their parameter, as AdamW itself would have made them.
            like = value.dim() > 0 and value.shape == parameter.shape
            optimizer.state[parameter][key] = torch.empty_like(parameter).copy_(value) if like else value
        for group in optimizer.param_groups:
            group["step"] = torch.tensor(float(begun))  # where timm's optimisers count; AdamW does in its state
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CorruptError(f"the saved state is of another module: {reason}") from None
    if extra is not None:
        extra.load(parts["extra"], meta["extra"])
