"""From maps and windows to hidden patches: the parts joined, in any batch."""

from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import ConfigError
from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels.reference import draw_hidden
from stage2_pretrain.masking import POLICIES
from stage2_pretrain.masking.coverage import CoverageOptions, combine, pool
from stage2_pretrain.masking.plan import build_policy, plan_batch
from stage2_pretrain.masking.sampler import MaskSampler
from stage2_pretrain.window import WindowOptions, draw_windows

NAMES = [f"{number}.png" for number in range(30)]
KEYS = sample_keys(NAMES)
WINDOWS = draw_windows(
    np.random.default_rng(1).integers(50, 200, (30, 2)), KEYS, seed=0, epoch=2, options=WindowOptions(turns=True)
)


def region_maps() -> np.ndarray:
    maps = np.random.default_rng(0).integers(0, 255, (30, 2, 64, 64), dtype=np.uint8)
    maps[:, :, :, 30:] //= 6
    maps[4] = 0
    return maps


def build(name: str = "region", options: dict[str, Any] | None = None, **changes: Any) -> MaskSampler:
    settings: dict[str, Any] = {"grid": (7, 7), "seed": 11, "regions": ("lung", "heart"), **changes}
    return MaskSampler(build_policy(name, options), **settings)


@pytest.mark.parametrize("name", list(POLICIES))
def test_counts_are_exact_and_batches_do_not_matter(name: str) -> None:
    sampler, maps = build(name), region_maps()
    whole = sampler.draw_arrays(maps, WINDOWS, KEYS, 2, view=1)
    plan = plan_batch(sampler.policy_at(0), whole.coverage)
    stratum = plan.stratum_of[plan.level]
    for number in range(len(sampler.policy_at(0).strata)):
        assert ((whole.hidden & (stratum == number)).sum(1) == whole.num_hidden[:, number]).all()
        assert ((stratum == number).sum(1) == whole.num_patches[:, number]).all()
    for part in (np.array([9]), np.array([20, 4, 11]), np.arange(29, -1, -1)):
        again = sampler.draw_arrays(maps[part], WINDOWS[part], KEYS[part], 2, view=1)
        assert np.array_equal(again.hidden, whole.hidden[part])
    assert np.flatnonzero(whole.empty).tolist() == [4]


def test_the_parts_are_joined_as_specified() -> None:
    maps = region_maps()
    sampler = build(coverage=CoverageOptions(combine="weighted", weights={"lung": 3, "heart": 1}))
    drawn = sampler.draw_arrays(maps, WINDOWS, KEYS, 2, view=3)
    coverage = combine(pool(maps, WINDOWS, (7, 7)), np.array([3, 1]))
    plan = plan_batch(sampler.policy_at(0), coverage)
    assert np.array_equal(drawn.coverage, coverage)
    expected = draw_hidden(
        coverage, plan.stratum_of, plan.weight_of, plan.num_hidden, KEYS, seed_key=seed_key("mask", 11), epoch=2, view=3
    )
    assert np.array_equal(drawn.hidden, expected)


def test_a_loader_batch_of_tensors_draws_the_same() -> None:
    maps = region_maps()
    batch = {
        "maps": torch.from_numpy(maps),
        "window": torch.from_numpy(WINDOWS),
        "sample_key": torch.from_numpy(KEYS.view(np.int64)),
    }
    assert (KEYS >= 1 << 63).any()
    assert np.array_equal(build().draw(batch, 2).hidden, build().draw_arrays(maps, WINDOWS, KEYS, 2).hidden)


def test_clamped_samples_are_counted() -> None:
    maps = np.zeros((1, 1, 49, 49), np.uint8)
    maps[..., :35, :] = 254
    windows = np.array([[0, 0, 49, 49, 49, 49, 0, 0]], np.int32)
    sampler = build("region", {"overall": 600, "hide_inside": 900}, regions=("lung",))
    drawn = sampler.draw_arrays(maps, windows, KEYS[:1], 0)
    assert drawn.num_patches.tolist() == [[35, 14]]
    assert drawn.num_hidden.tolist() == [[29, 0]]
    assert drawn.clamped.tolist() == [True]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"grid": (0, 7)}, "grid 0x7"),
        ({"grid": (256, 256)}, "grid 256x256"),
        ({"impl": "refrence"}, "unknown impl 'refrence'"),
        ({"coverage": CoverageOptions(combine="weighted", weights={"liver": 1})}, "liver"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(**changes)


def test_a_grid_finer_than_the_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="one or more"):
        build(grid=(65, 65)).draw_arrays(region_maps(), WINDOWS, KEYS, 0)
