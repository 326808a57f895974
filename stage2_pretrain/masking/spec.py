"""What a card must say so that every mask of the run can be drawn again from it and the region store alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64
from pydantic import Field, ValidationError

from shared.config import Strict, spec
from shared.errors import IncompatibleError
from shared.order import schedule, steps_per_epoch
from stage2_pretrain.kernels.reference import BITS_VERSION
from stage2_pretrain.masking.coverage import CoverageOptions
from stage2_pretrain.masking.plan import Policy, build_policy, maps_of, policy_of_card, policy_spec
from stage2_pretrain.masking.sampler import MaskSampler
from stage2_pretrain.masking.schedule import ScheduleOptions, options_at
from stage2_pretrain.window import VERSION as WINDOW_VERSION
from stage2_pretrain.window import WindowOptions


class PolicySpec(Strict):
    """A policy by name and version, with every option."""

    name: str
    version: int
    options: dict[str, Any]


class MaskSpec(Strict):
    """The section ``mask`` of an encoder's specification.

    The samples are those of the region store with status ``ok``, in its order; `shared.order` says which of them
    take part in an epoch, from seed, batch and steps.
    """

    bits_version: int = Field(description="Version of the bits that `draw_hidden` gives.")
    window_version: int = Field(description="Version of how windows are drawn.")
    seed: int = Field(ge=0, lt=1 << 64, description="Of masks, windows and order.")
    grid: tuple[int, int] = Field(description="Rows and columns of patches.")
    policy: PolicySpec = Field(description="Where and how many.")
    coverage: CoverageOptions = Field(description="How several regions become one coverage.")
    window: WindowOptions = Field(description="How images are cropped, flipped and turned.")
    schedule: ScheduleOptions = Field(ScheduleOptions(), description="How the policy's settings change.")
    samples: int = Field(ge=1, description="Samples of the run.")
    batch: int = Field(ge=1, description="Largest number of samples in a step.")
    steps: int = Field(ge=1, description="Steps of the run.")
    views: int = Field(1, ge=1, le=256, description="Draws of a sample in one epoch.")

    @property
    def patches(self) -> int:
        """L, patches of a sample."""
        return self.grid[0] * self.grid[1]

    @property
    def epochs(self) -> int:
        """Epochs begun, the last perhaps unfinished."""
        return -(-self.steps // steps_per_epoch(self.samples, self.batch))

    def policy_at(self, epoch: int) -> Policy:
        """The policy with its settings of an epoch, from 0."""
        options = options_at(self.schedule, self.policy.options, epoch=epoch, epochs=self.epochs)
        return policy_of_card({**self.policy.model_dump(), "options": options})

    def sampler(self, regions: Sequence[str], impl: str = "reference") -> MaskSampler:
        """The sampler that this section describes, for a store's regions; every backend gives the same bits."""
        return MaskSampler(
            self.policy_at if self.schedule.first else self.policy_at(0),
            grid=self.grid,
            seed=self.seed,
            regions=regions,
            coverage=self.coverage,
            impl=impl,
        )

    def maps_of(self) -> Int64[np.ndarray, "N"]:
        """Whose region maps each sample is masked by: an index for each."""
        return maps_of(policy_of_card(self.policy.model_dump()), self.samples, self.seed)

    def taking_part(self, sample_ids: Sequence[str]) -> Iterator[set[int]]:
        """Indices of the samples drawn in each epoch: all, but in an unfinished last one."""
        count = steps_per_epoch(self.samples, self.batch)
        whole, rest = divmod(self.steps, count)
        for _ in range(whole):
            yield set(range(len(sample_ids)))
        if rest:
            batches = schedule(sample_ids, self.batch, self.seed, begun=whole * count)
            yield {index for _, (_, indices) in zip(range(rest), batches, strict=False) for index in indices}


def mask_spec(
    *,
    policy: str,
    options: Mapping[str, Any],
    seed: int,
    grid: tuple[int, int],
    samples: int,
    batch: int,
    steps: int,
    coverage: CoverageOptions | None = None,
    window: WindowOptions | None = None,
    schedule: ScheduleOptions | None = None,
    views: int = 1,
) -> MaskSpec:
    """Describe the masks of a run to come; embed ``shared.config.spec`` of it in the card as ``mask``.

    Args:
        policy: A name in `POLICIES`.
        options: Plain data for the policy's ``Options``.
        seed: Of masks, windows and order.
        grid: Rows and columns of patches.
        samples: Samples of the store with maps.
        batch: Largest number of samples in a step.
        steps: Steps of the run.
        coverage: How several regions become one.
        window: How images are cropped, flipped and turned.
        schedule: How the policy's settings change over the epochs.
        views: Draws of a sample in one epoch.

    Raises:
        ConfigError: An unknown policy, or options that do not fit, in the first epoch or the last.
    """
    described = MaskSpec(
        bits_version=BITS_VERSION,
        window_version=WINDOW_VERSION,
        seed=seed,
        grid=grid,
        policy=PolicySpec(**policy_spec(policy, build_policy(policy, options))),
        coverage=coverage or CoverageOptions(),
        window=window or WindowOptions(),
        schedule=schedule or ScheduleOptions(),
        samples=samples,
        batch=batch,
        steps=steps,
        views=views,
    )
    for epoch in (0, described.epochs - 1):
        described.policy_at(epoch)
    return described


def mask_section(specification: MaskSpec) -> dict[str, Any]:
    """The section as float-free JSON, for the card."""
    return spec(specification)


def mask_spec_of_card(card_spec: Mapping[str, Any]) -> MaskSpec:
    """Read the section ``mask`` of a card's specification.

    Raises:
        IncompatibleError: There is none, or one that this release cannot draw again.
    """
    try:
        found = MaskSpec.model_validate(card_spec.get("mask"))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in ("mask", *problem["loc"]))
        raise IncompatibleError(f"card: {where}: {problem['msg']}; its masks cannot be drawn again") from None
    for what, value, own in (
        ("bits", found.bits_version, BITS_VERSION),
        ("window", found.window_version, WINDOW_VERSION),
    ):
        if value != own:
            raise IncompatibleError(f"card: mask.{what}_version {value}, this release draws version {own}")
    return found
