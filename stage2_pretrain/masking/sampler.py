"""The mask sampler: region maps and names in, hidden patches out. The one place where a policy's plan is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt64

from shared.errors import ConfigError
from shared.rng import seed_key
from stage2_pretrain.kernels import IMPLS, POOLS
from stage2_pretrain.kernels.reference import PATCHES_MAX
from stage2_pretrain.masking.coverage import CoverageOptions, combine, region_weights
from stage2_pretrain.masking.plan import Policy, plan_batch

PURPOSE = "mask"


@dataclass(frozen=True)
class Drawn:
    """The masks of a batch and what is worth counting.

    Attributes:
        hidden: True where the encoder does not see the patch, row by row of the grid.
        coverage: Mean coverage of each patch, 0 .. 254.
        num_patches: Patches of each stratum of the policy.
        num_hidden: Of those, hidden.
        clamped: Samples whose budget could not be met as asked.
        empty: Samples without any coverage: nothing was found in them, or the window missed it.
    """

    hidden: Bool[np.ndarray, "B L"]
    coverage: UInt8[np.ndarray, "B L"]
    num_patches: Int64[np.ndarray, "B S"]
    num_hidden: Int32[np.ndarray, "B S"]
    clamped: Bool[np.ndarray, "B"]
    empty: Bool[np.ndarray, "B"]


class MaskSampler:
    """Draws masks by names: the same sample, seed, epoch and view give the same mask in any batch.

    Args:
        policy: Where and how many; where that changes, the policy of each epoch.
        grid: Rows and columns of patches.
        seed: Of the run.
        regions: Names of the store's regions, the K axis of its maps.
        coverage: How several regions become one coverage.
        impl: Backend, a name in `IMPLS`.

    Raises:
        ConfigError: A grid of no or too many patches, an unknown backend, or weights that do not fit the regions.
    """

    def __init__(
        self,
        policy: Policy | Callable[[int], Policy],
        *,
        grid: tuple[int, int],
        seed: int,
        regions: Sequence[str],
        coverage: CoverageOptions | None = None,
        impl: str = "reference",
    ) -> None:
        if min(grid) < 1 or grid[0] * grid[1] > PATCHES_MAX:
            raise ConfigError(f"grid {grid[0]}x{grid[1]}: expected 1 to {PATCHES_MAX} patches")
        self._policy = policy
        self.grid = grid
        self.impl = impl
        self._pool = POOLS.load("reference" if impl == "reference" else "cpu")
        self._draw_hidden = IMPLS.load(impl)
        self._key = seed_key(PURPOSE, seed)
        self._weights = region_weights(coverage or CoverageOptions(), regions)

    def policy_at(self, epoch: int) -> Policy:
        """Where and how many in an epoch, from 0."""
        return self._policy(epoch) if callable(self._policy) else self._policy

    def draw(self, batch: dict[str, Any], epoch: int, view: int = 0) -> Drawn:
        """Draw the masks of a batch of `RegionDataset`.

        Args:
            batch: ``maps`` uint8 [B, K, H, W], ``window`` int32 [B, 8], ``sample_key`` int64 [B] (the bits of
                the unsigned key), as CPU tensors or arrays.
            epoch: 0 .. 2^24 - 1; the one that the batch's windows were drawn for.
            view: 0 .. 255.

        Raises:
            ConfigError: A patch is smaller than one map pixel.
        """
        keys = np.asarray(batch["sample_key"]).view(np.uint64)
        return self.draw_arrays(np.asarray(batch["maps"]), np.asarray(batch["window"]), keys, epoch, view)

    def draw_arrays(
        self,
        maps: UInt8[np.ndarray, "B K H W"],
        windows: Int32[np.ndarray, "B 8"],
        sample_keys: UInt64[np.ndarray, "B"],
        epoch: int,
        view: int = 0,
    ) -> Drawn:
        """Draw from arrays; `draw` is this for a loader's batch."""
        return self.draw_covered(self.cover(maps, windows), sample_keys, epoch, view)

    def cover(self, maps: UInt8[np.ndarray, "B K H W"], windows: Int32[np.ndarray, "B 8"]) -> UInt8[np.ndarray, "B L"]:
        """Coverage of each patch by the regions together, 0 .. 254; the same for every view."""
        return combine(self._pool(maps, windows, self.grid), self._weights)

    def draw_covered(
        self, coverage: UInt8[np.ndarray, "B L"], sample_keys: UInt64[np.ndarray, "B"], epoch: int, view: int = 0
    ) -> Drawn:
        """Draw where the coverage is known."""
        plan = plan_batch(self.policy_at(epoch), coverage)
        hidden = self._draw_hidden(
            plan.level,
            plan.stratum_of,
            plan.weight_of,
            plan.num_hidden,
            sample_keys,
            seed_key=self._key,
            epoch=epoch,
            view=view,
        )
        stratum = plan.stratum_of[plan.level]
        sizes = np.stack([(stratum == number).sum(1) for number in range(plan.num_hidden.shape[1])], axis=1)
        return Drawn(hidden, coverage, sizes, plan.num_hidden, plan.clamped, coverage.max(axis=1) == 0)
