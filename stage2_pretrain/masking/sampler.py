"""The mask sampler: region maps and names in, hidden patches out. The one place where a policy's plan is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt64

from shared.errors import ConfigError, CorruptError
from shared.rng import seed_key
from stage2_pretrain.kernels import IMPLS, POOLS
from stage2_pretrain.kernels.reference import PATCHES_MAX
from stage2_pretrain.masking.coverage import CoverageOptions, combine, region_weights
from stage2_pretrain.masking.plan import Policy, plan_batch

if TYPE_CHECKING:  # whoever draws on the host alone, an audit say, loads no torch
    from stage2_pretrain.kernels.drawn import DrawnOnDevice
    from stage2_pretrain.masking.placed import Placed

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
    """Draws masks by names: the same sample, seed, epoch and view give the same mask in any batch, on any device.

    On the host by `draw` and its parts; on the device of a batch's tensors by `draw_device`, without waiting for it.
    With ``fused``, what is still drawn on the host, for a picture say, is drawn by ``cpu``: the bits are the same.

    Args:
        policy: Where and how many; where that changes, the policy of each epoch.
        grid: Rows and columns of patches.
        seed: Of the run.
        regions: Names of the store's regions, the K axis of its maps.
        coverage: How several regions become one coverage.
        impl: Backend, a name in `IMPLS`.

    Raises:
        ConfigError: A grid of no or too many patches, an unknown backend, one that cannot run here, or weights that do
            not fit the regions.
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
        if impl == "fused":
            from stage2_pretrain.kernels.choice import resolve_impl

            resolve_impl(impl, device="cuda", patches=grid[0] * grid[1])
        self._pool = POOLS.load("reference" if impl == "reference" else "cpu")
        self._draw_hidden = IMPLS.load("cpu" if impl == "fused" else impl)
        self._key = seed_key(PURPOSE, seed)
        self._weights = region_weights(coverage or CoverageOptions(), regions)
        self._latest: tuple[int, Policy] | None = None
        self._placed: Placed | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": None}  # a loader's process has no use for a GPU's memory

    def policy_at(self, epoch: int) -> Policy:
        """Where and how many in an epoch, from 0."""
        if not callable(self._policy):
            return self._policy
        kept = self._latest
        if kept is None or kept[0] != epoch:  # to build one takes longer than to draw a batch
            self._latest = kept = (epoch, self._policy(epoch))
        return kept[1]

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
        self,
        coverage: UInt8[np.ndarray, "B L"],
        sample_keys: UInt64[np.ndarray, "B"],
        epoch: int,
        view: int = 0,
        levels: UInt8[np.ndarray, "B L"] | None = None,
    ) -> Drawn:
        """Draw where the coverage is known, and for a policy that follows a network the levels."""
        plan = plan_batch(self.policy_at(epoch), coverage if levels is None else levels)
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

    def draw_device(self, batch: dict[str, Any], epoch: int, view: int = 0) -> DrawnOnDevice:
        """Draw the masks of a batch on the device of its tensors: by one launch on a GPU, by the host's code on a CPU.

        The host does not wait for the device, but once an epoch to send it the policy's tables.

        Args:
            batch: ``maps`` uint8 [B, K, H, W], ``window`` int32 [B, 8], ``sample_key`` int64 [B], on one device.
            epoch: As of `draw`.
            view: As of `draw`.

        Raises:
            UsageError: Tensors of other kinds or shapes, or a policy's tables out of range.
            ConfigError: As of `draw`, on a CPU alone: before, see `stage2_pretrain.checks.check_grid`.
            CorruptError: Map value 255: an absent sample came in; on a CPU alone, elsewhere by `fetch`.
        """
        from stage2_pretrain.kernels.op import draw_hidden
        from stage2_pretrain.masking.placed import place

        maps, placed = batch["maps"], self._placed
        if placed is None or (placed.epoch, placed.device) != (epoch, maps.device):
            self._placed = placed = place(self.policy_at(epoch), self._weights, epoch, maps.device)
        return draw_hidden(
            maps,
            batch["window"],
            batch["sample_key"],
            placed.stratum_of,
            placed.weight_of,
            placed.tables.counts,
            grid=self.grid,
            region_weights=placed.region_weights,
            seed_key=self._key,
            epoch=epoch,
            view=view,
        )

    def fetch(self, drawn: DrawnOnDevice, epoch: int) -> Drawn:
        """Bring what `draw_device` drew to the host, equal to what `draw` gives: waits for the device.

        Raises:
            CorruptError: Map value 255: an absent sample came in.
        """
        hidden, coverage, num_patches, num_hidden, clamped, absent = (part.cpu().numpy() for part in drawn[:6])
        if absent.any():
            raise CorruptError(f"region maps of batch item {absent.argmax()}: value 255 (absent) cannot be pooled")
        strata = len(self.policy_at(epoch).strata)
        sizes = num_patches[:, :strata].astype(np.int64)
        return Drawn(hidden, coverage, sizes, num_hidden[:, :strata], clamped, coverage.max(axis=1) == 0)
