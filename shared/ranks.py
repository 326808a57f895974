"""Several processes that train as one, started by ``torchrun``: who this one is, and sums over all of them.

In a single process every function here is what its name says of one: nothing is sent, no bit changes. A failure
of any process ends all, with one message: the first to fail says it, the others exit with its code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared.errors import ConfigError, InterruptedRun, MwmError
from shared.runlog import RunLog

T = TypeVar("T")

_PATIENCE = timedelta(hours=1)
"""A dead process is noticed at once; this is how long a live one may keep the others waiting."""
_alone = False


class RankLostError(InterruptedRun):
    """Another process of this run ended without a word (exit 75)."""

    kind = "rank-lost"


def rank() -> int:
    """Number of this process, from 0; 0 writes, the others only compute."""
    return 0 if size() == 1 else dist.get_rank()


def size() -> int:
    """Processes of this run."""
    return 1 if _alone or not dist.is_available() or not dist.is_initialized() else dist.get_world_size()


def launched() -> int:
    """Processes that the launcher started, joined or not: 1 unless it was ``torchrun``."""
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return int(os.environ["WORLD_SIZE"]) if named else 1


def speaks() -> bool:
    """Whether this process talks to the user: the first that the launcher started, joined or not."""
    return launched() == 1 or os.environ["RANK"] == "0"


def refuse(what: str) -> None:
    """Refuse to run in several processes.

    Raises:
        ConfigError: There are several; the first process says so, the others exit with its code.
    """
    if launched() == 1:
        return
    error = ConfigError(f"{what} runs in one process; found {launched()}", hint="start it without torchrun")
    if not speaks():
        raise SystemExit(error.exit_code)
    raise error


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Be one of the processes that ``torchrun`` started; without it, nothing.

    Args:
        device: ``cuda`` gives each process of a machine its own GPU; else they share the CPU.

    Raises:
        ConfigError: More processes than GPUs, or a device that can't be shared.
        RankLostError: Another process ended without a word.
        SystemExit: Another process has told its error; carries its exit code.
    """
    if launched() == 1:
        yield
        return
    torch_dist: Any = dist  # not all of its public names are typed as such
    store, number, count = next(iter(torch_dist.rendezvous("env://")))
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=torch_dist.PrefixStore("mwm/group", store),
        rank=number,
        world_size=count,
        timeout=_PATIENCE,
    )
    try:
        if device == "mps":
            raise ConfigError(f"device: mps, but {count} processes were started; expected cpu or cuda")
        if on_gpu:
            _take_gpu()
        yield
        wait()
    except BaseException as error:
        _tell_once(store, error)
    finally:
        dist.destroy_process_group()


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a batch: runs of neighbours whose lengths differ by one at most.

    >>> share([3, 1, 2])
    [3, 1, 2]
    """
    first, last = (len(items) * number // size() for number in (rank(), rank() + 1))
    return items[first:last]


def threads(count: int) -> int:
    """CPU threads of this process, where a machine's processes share so many."""
    return count if size() == 1 else max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def total(value: int) -> int:
    """Sum of one number over the processes."""
    return value if size() == 1 else int(add(torch.tensor(value, dtype=torch.int64)))


def totals(values: Mapping[str, float]) -> dict[str, float]:
    """Sum of each number over the processes."""
    if size() == 1:
        return dict(values)
    return dict(zip(values, add(torch.tensor([*values.values()], dtype=torch.float64)).tolist(), strict=True))


def add(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place; the same bits in each."""
    if size() > 1:
        with _peers():
            dist.all_reduce(tensor)
    return tensor


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the processes, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if size() == 1 or not gradients:
        return
    summed = add(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    parts = summed.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def gather(value: T) -> list[T]:
    """One plain value of each process, in their order, for all of them."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with _peers():
        dist.all_gather_object(found, value)
    return found


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, by itself, given to all; the others wait for it."""
    if size() == 1:
        return make()
    held: list[Any] = [None]
    if rank() == 0:
        with alone():
            held[0] = make()
    with _peers():
        dist.broadcast_object_list(held)
    return held[0]


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process is one by itself: what it computes sums over nobody else."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def wait() -> None:
    """Until every process is here."""
    total(0)


class Unheard(RunLog):
    """The log of a process that is not the first: it says and writes nothing."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)

    def __enter__(self) -> Unheard:
        return self

    def info(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def progress(self, done: int, total: int, unit: str, **values: float | str) -> None:
        """Nothing."""

    def metric(self, step: int, **values: Any) -> None:
        """Nothing."""

    def timing(self, step: int, **values: Any) -> None:
        """Nothing."""

    def picture(self, step: int, name: str, pixels: Callable[[], Any]) -> None:
        """Nothing."""

    def rewind(self, step: int, **where: Any) -> int:
        """Nothing."""
        return 0


def _take_gpu() -> None:
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(
            f"device: cuda, and process {local} of this machine has no GPU: it has {there}",
            hint=f"torchrun --nproc-per-node {max(1, there)}, or device=cpu",
        )
    torch.cuda.set_device(local)


@contextmanager
def _peers() -> Iterator[None]:
    """What torch says when a peer is gone, in our words."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            f"another process of this run ended: {str(error).splitlines()[0][:120]}",
            hint="the same command continues from the last state, with as many processes or others",
        ) from None


def _tell_once(store: Any, error: BaseException) -> NoReturn:
    """Raise the error if this process is the first to fail, else leave with the first one's code."""
    code = error.exit_code if isinstance(error, MwmError) else 75 if isinstance(error, KeyboardInterrupt) else 1
    own = f"{dist.get_rank()} {code}"
    try:
        first = store.compare_set("mwm/told", "", own).decode()
    except RuntimeError:  # the launcher, which keeps the store, is gone
        raise error from None
    if first == own:
        raise error
    raise SystemExit(int(first.split()[1]) if isinstance(error, RankLostError) else code) from None
