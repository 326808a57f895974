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
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shared import ranks
from shared.artifact import refuse_without_room
from shared.checkpoint import latest_state, save_state
from shared.errors import CorruptError, InterruptedRun, UsageError
from shared.guards import RECENT, check_finite, check_jump, memory_in_words
from shared.heap import keep_freed_memory
from shared.loader import loader_deaths
from shared.optimizer import Plan, build_optimizer, ema_decay, learning_rate, weight_decay
from shared.rng import seed_key
from shared.runlog import RunLog, read_metrics
from shared.signals import Signals

VERSION = 2
"""Raised when equal inputs and plans give other weights; part of a run's specification."""
_PATIENCE_S = 20.0
"""How long a whole step may take, by a first trial of few images, to be tried whole."""


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
    optimizer = build_optimizer(module, plan, lr_scale)
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
    recent = deque(_losses(log, tags, begun), RECENT)
    saved_at = time.monotonic()
    source = iter(batches(begun))
    with Signals() as signals, torch.random.fork_rng(devices=[]), _closing(source), loader_deaths():
        for index in range(begun, plan.steps):
            waited = time.perf_counter()
            batch, sample_ids = next(source)
            started = time.perf_counter()
            torch.manual_seed((seed_key("torch", plan.seed) + index) % 2**63)
            with memory_in_words(index, sample_ids):
                scalars = _advance(module, optimizer, step, batch, sample_ids, plan, index, recent)
                if ema is not None:
                    _average(ema, module, ema_decay(plan, index))
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
    optimizer = build_optimizer(module, plan, None)
    seconds: list[float] = []
    source = iter(batches)
    with torch.random.fork_rng(devices=[]):
        for index in range(count):
            started = time.perf_counter()
            batch, sample_ids = next(source)
            torch.manual_seed((seed_key("torch", plan.seed) + index) % 2**63)
            with memory_in_words(index, sample_ids):
                _advance(module, optimizer, step, batch, sample_ids, plan, index, deque())
            seconds.append(time.perf_counter() - started)
    return seconds


def rehearse_briefly(
    module: nn.Module,
    batches: Callable[[int], Iterable[tuple[Any, Sequence[str]]]],
    step: Callable[[Any, int], Scalars],
    plan: Plan,
    count: int,
    size: int,
    few: int = 4,
) -> tuple[list[float], int]:
    """As `rehearse`; where whole steps would take longer than one waits, with few images, and multiplied.

    Args:
        module: Of `rehearse`.
        batches: Gives batches of as many images.
        step: Of `rehearse`.
        plan: Of `rehearse`.
        count: Steps to try.
        size: Images of a whole step.
        few: Images of a step that is tried first.

    Returns:
        Seconds of whole steps, warming up in the first; images a step that were tried.

    Raises:
        NonFiniteError: Loss or gradient not finite.
    """
    warming = 0.0
    if few < size:
        first, second = rehearse(module, batches(few), step, plan, 2)
        warming, whole = max(0.0, first - second), second * size / few
        if whole > _PATIENCE_S:
            return [warming + whole, *[whole] * (count - 1)], few
    seconds = rehearse(module, batches(size), step, plan, count)
    return [warming + seconds[0], *seconds[1:]], size


@contextmanager
def _closing(source: Iterator[Any]) -> Iterator[None]:
    """End a generator, and with it its threads and processes, also when an error's traceback still holds it."""
    try:
        yield
    finally:
        if isinstance(source, Generator):
            source.close()


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
    made = step(batch, index)
    for part in [made] if isinstance(made, dict) else made:
        for name, value in part.items():
            own[name] = own.get(name, 0.0) + float(value.detach())
        part["loss"].backward()
    scalars = ranks.totals(own)
    check_finite("loss", scalars["loss"], index, sample_ids)
    check_jump(scalars["loss"], recent, plan.max_jump, index, sample_ids)
    ranks.add_gradients(module.parameters())
    norm = nn.utils.clip_grad_norm_(module.parameters(), plan.clip_norm or math.inf)
    scalars["grad_norm"] = float(norm)
    check_finite("gradient norm", scalars["grad_norm"], index, sample_ids)
    optimizer.step()
    return {**scalars, "lr": rate}


def _losses(log: RunLog, tags: Mapping[str, Any], begun: int) -> list[float]:
    """Of the steps that a resumed fit has done."""
    return [
        row["loss"]
        for row in read_metrics(log.out)
        if row["step"] <= begun and row.get("loss") is not None and all(row.get(k) == tags[k] for k in tags)
    ]


@torch.no_grad()
def _average(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    """Weights are averaged; buffers (statistics of batch norms, which are averages already) are copied."""
    averaged = {name for name, _ in module.named_parameters()}
    for name, value in module.state_dict().items():
        if name in averaged:
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
