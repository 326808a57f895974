"""Batches with their masks, made ahead of the model, and what is counted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import tee
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8, UInt64
from torch import Tensor

from shared import ranks
from shared.errors import MwmError
from shared.loader import load_ahead
from shared.order import schedule
from stage2_pretrain.data import RegionDataset
from stage2_pretrain.guide import Guide
from stage2_pretrain.masking.coverage import COVERAGE_MAX
from stage2_pretrain.masking.plan import guide_of
from stage2_pretrain.masking.sampler import Drawn, MaskSampler
from stage2_pretrain.witness import WitnessRecorder

INSIDE = (COVERAGE_MAX * 500 + 999) // 1000
"""Coverage from which a patch counts as inside: the region policy's default, whatever the policy, so that the
shares of different runs compare."""


@dataclass(frozen=True)
class Step:
    """One batch and its masks.

    Attributes:
        image: [B, C, S, S] in [0, 1], on the CPU.
        epoch: From 0.
        sample_ids: One a row.
        drawn: Its masks, or how to fetch them from where they were drawn; None before that.
        inputs: What a draw on a device, or one that follows a teacher, is still to be made from: ``maps``, ``window``
            and ``sample_key`` of the data set.
        coverage: Of each patch, for a policy that follows a teacher.
        levels: What that policy made of the teacher's answer.
    """

    image: Tensor
    epoch: int
    sample_ids: tuple[str, ...]
    drawn: Drawn | Callable[[], Drawn] | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    coverage: UInt8[np.ndarray, "B L"] | None = None
    levels: UInt8[np.ndarray, "B L"] | None = None

    @cached_property
    def masks(self) -> Drawn:
        """Its masks on the host, which have been drawn."""
        if self.drawn is None:
            raise MwmError("a step whose masks have not been drawn: a bug")
        return self.drawn if isinstance(self.drawn, Drawn) else self.drawn()


class Steps:
    """The steps of a run from any step on, loaded and masked while the model computes.

    Args:
        dataset: Images and maps.
        sampler: Draws the masks.
        batch_size: Images a step, at most.
        seed: Of the run.
        workers: Loader processes; 0: a thread of this one.
    """

    def __init__(
        self, dataset: RegionDataset, sampler: MaskSampler, *, batch_size: int, seed: int, workers: int = 0
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers

    def make(self, task: tuple[int, Sequence[int]]) -> Step:
        """Load and mask some samples, given as ``(epoch, indices)``, as they are in that epoch."""
        epoch, indices = task
        return self.of(self.dataset.batch(indices, epoch), indices, epoch)

    def of(self, batch: Mapping[str, Any], indices: Sequence[int], epoch: int) -> Step:
        """A step of a batch of the data set, with its masks where neither a device nor a teacher is to be asked."""
        names = tuple(self.dataset.sample_ids[index] for index in indices)
        inputs = {name: batch[name] for name in ("maps", "window", "sample_key")}
        guided = guide_of(self.sampler.policy_at(epoch)) is not None
        if self.sampler.impl == "fused" and not guided:
            return Step(batch["image"], epoch, names, inputs=inputs)
        coverage = self.sampler.cover(np.asarray(inputs.pop("maps")), np.asarray(inputs.pop("window")))
        if guided:
            return Step(batch["image"], epoch, names, inputs=inputs, coverage=coverage)
        return Step(batch["image"], epoch, names, self.sampler.draw_covered(coverage, _keys(inputs), epoch))

    def draw(self, step: Step, guide: Guide | None, image: Tensor) -> tuple[Step, Bool[Tensor, "B gh gw"]]:
        """Draw the masks of a step that has none yet.

        Args:
            step: From `make` or `of`.
            guide: Whom the policy follows, if it does.
            image: Of the step, as the method takes it, on its device.

        Returns:
            The step with its masks, and what they leave visible, on the device of the image.
        """
        grid = (-1, *self.sampler.grid)
        if step.drawn is None and guide is None:
            placed = {name: value.to(image.device, non_blocking=True) for name, value in step.inputs.items()}
            there = self.sampler.draw_device(placed, step.epoch)
            fetch = partial(self.sampler.fetch, there, step.epoch)  # waits for the device: not before it must
            return replace(step, drawn=fetch), ~there.hidden.view(grid)
        if step.drawn is None:
            assert guide is not None
            assert step.coverage is not None
            policy: Any = self.sampler.policy_at(step.epoch)
            keys = _keys(step.inputs)
            levels = policy.levels(guide.score(image, keys, step.epoch), step.coverage)
            drawn = self.sampler.draw_covered(step.coverage, keys, step.epoch, levels=levels)
            step = replace(step, drawn=drawn, levels=levels)
        return step, torch.from_numpy(~step.masks.hidden).view(grid).to(image.device)

    def begin(self, begun: int) -> Iterator[tuple[Step, tuple[str, ...]]]:
        """Endless steps after the first ``begun``: this process's share of each, and the sample ids of the whole."""
        plan = schedule(self.dataset.sample_ids, self.batch_size, self.seed, begun)
        return self.follow(plan, workers=self.workers)

    def follow(
        self, plan: Iterator[tuple[int, Sequence[int]]], *, workers: int = 0
    ) -> Iterator[tuple[Step, tuple[str, ...]]]:
        """The steps of a plan of ``(epoch, indices)`` that does not end."""
        names = self.dataset.sample_ids
        tasks, wholes = tee(plan)
        shares = ((epoch, ranks.share(indices)) for epoch, indices in tasks)
        with closing(load_ahead(self.make, shares, workers=workers)) as made:
            for step, (_, whole) in zip(made, wholes, strict=False):
                yield step, tuple(names[index] for index in whole)


def _keys(inputs: Mapping[str, Tensor]) -> UInt64[np.ndarray, "B"]:
    return np.asarray(inputs["sample_key"]).view(np.uint64)


@dataclass
class Tally:
    """What beside the weights a resumed run needs: witnesses, and counts of the epoch under way and of the run."""

    recorder: WitnessRecorder
    epoch: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=lambda: {"clamped_draws": 0, "empty_draws": 0})

    def add(self, step: Step, visible: Tensor) -> None:
        """Count one step; of several processes, each counts what all of them were shown.

        Args:
            step: With its masks.
            visible: bool [B, gh, gw]: the very tensor that the encoder got.
        """
        own = step.sample_ids, ~visible.flatten(1).cpu().numpy(), step.masks, step.levels
        for sample_ids, hidden, drawn, levels in ranks.gather(own):
            self.recorder.record(sample_ids, step.epoch, 0, hidden, levels)
            inside = drawn.coverage >= INSIDE
            for name, flags in {
                "inside": inside,
                "outside": ~inside,
                "hidden_inside": hidden & inside,
                "hidden_outside": hidden & ~inside,
            }.items():
                self.epoch[name] = self.epoch.get(name, 0) + int(flags.sum())
            self.total["clamped_draws"] += int(drawn.clamped.sum())
            self.total["empty_draws"] += int(drawn.empty.sum())

    def close_epoch(self) -> dict[str, float | None]:
        """Shares of the patches hidden in the epoch: inside regions, outside, of all; None where there are none."""
        counts, self.epoch = self.epoch, {}
        inside, outside = counts["inside"], counts["outside"]
        hidden = counts["hidden_inside"] + counts["hidden_outside"]
        return {
            "hidden_inside_share": counts["hidden_inside"] / inside if inside else None,
            "hidden_outside_share": counts["hidden_outside"] / outside if outside else None,
            "hidden_share": hidden / (inside + outside),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For `shared.loop`."""
        tensors, meta = self.recorder.state()
        return tensors, {"recorder": meta, "epoch": self.epoch, "total": self.total}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """For `shared.loop`."""
        self.recorder.load(tensors, meta["recorder"])
        self.epoch, self.total = dict(meta["epoch"]), dict(meta["total"])
