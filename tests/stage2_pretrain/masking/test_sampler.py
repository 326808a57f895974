"""From maps and windows to hidden patches: the parts joined, in any batch."""

import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import ConfigError, CorruptError, UsageError
from shared.rng import sample_keys, seed_key
from stage2_pretrain.kernels.choice import resolve_impl
from stage2_pretrain.kernels.reference import draw_hidden
from stage2_pretrain.masking import POLICIES
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.masking.coverage import CoverageOptions, combine, pool
from stage2_pretrain.masking.plan import Tables, build_policy, plan_batch
from stage2_pretrain.masking.sampler import Drawn, MaskSampler
from stage2_pretrain.window import WindowOptions, draw_windows

NAMES = [f"{number}.png" for number in range(30)]
KEYS = sample_keys(NAMES)
WINDOWS = draw_windows(
    np.random.default_rng(1).integers(50, 200, (30, 2)), KEYS, seed=0, epoch=2, options=WindowOptions(turns=True)
)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


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


def loaded(device: str = "cpu") -> dict[str, torch.Tensor]:
    return {
        "maps": torch.from_numpy(region_maps()).to(device),
        "window": torch.from_numpy(WINDOWS).to(device),
        "sample_key": torch.from_numpy(KEYS.view(np.int64)).to(device),
    }


def test_a_loader_batch_of_tensors_draws_the_same() -> None:
    assert (KEYS >= 1 << 63).any()
    drawn = build().draw(loaded(), 2)
    assert np.array_equal(drawn.hidden, build().draw_arrays(region_maps(), WINDOWS, KEYS, 2).hidden)


def assert_equal(one: Drawn, other: Drawn) -> None:
    for name in Drawn.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype, name
        assert np.array_equal(a, b), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("coverage", [None, CoverageOptions(combine="weighted", weights={"lung": 2**33, "heart": 1})])
@pytest.mark.parametrize("name", list(POLICIES))
def test_what_is_drawn_on_a_device_is_what_is_drawn_here(
    name: str, coverage: CoverageOptions | None, device: str
) -> None:
    sampler = build(name, coverage=coverage, seed=2**64 - 1)
    assert_equal(sampler.fetch(sampler.draw_device(loaded(device), 2, view=3), 2), sampler.draw(loaded(), 2, view=3))


@pytest.mark.parametrize("device", DEVICES)
def test_a_policy_that_changes_changes_on_the_device_too(device: str) -> None:
    asked = []

    def policy_at(epoch: int) -> Any:
        asked.append(epoch)
        return build_policy("region", {"hide_inside": 500 + 100 * epoch})

    sampler = MaskSampler(policy_at, grid=(7, 7), seed=11, regions=("lung", "heart"))
    for epoch in (0, 1, 1, 0):
        drawn = sampler.draw_device(loaded(device), epoch)
        count = len(asked)
        assert torch.equal(drawn.hidden, sampler.draw_device(loaded(device), epoch).hidden)
        assert len(asked) == count  # the tables are kept as long as the epoch lasts
        assert_equal(sampler.fetch(drawn, epoch), sampler.draw(loaded(), epoch))


def test_a_loader_s_process_gets_no_tables_of_a_device() -> None:
    sampler = build()
    drawn = sampler.draw_device(loaded(), 2)
    assert sampler._placed is not None
    sent = pickle.loads(pickle.dumps(sampler))
    assert sent._placed is None
    assert torch.equal(sent.draw_device(loaded(), 2).hidden, drawn.hidden)


def test_drawing_on_the_host_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from stage2_pretrain.masking.sampler import MaskSampler\n"
        "from stage2_pretrain.masking.plan import build_policy\n"
        "MaskSampler(build_policy('region'), grid=(7, 7), seed=1, regions=('lung',))\n"
        "assert not {'torch', 'triton', 'numba'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_absent_sample_is_told_when_masks_come_back() -> None:
    sampler = build()
    drawn = sampler.draw_device(loaded(), 2)
    drawn.absent[7] = True
    with pytest.raises(CorruptError, match="batch item 7: value 255"):
        sampler.fetch(drawn, 2)


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        (Tables(np.zeros(256, np.uint8), np.zeros(256, np.int32), Counts(600, 600)), "weights 0 .. 0; expected 1"),
        (Tables(np.full(256, 2, np.uint8), np.ones(256, np.int32), Counts(600, 600)), "strata 2 .. 2; expected 0 .. 1"),
        (Tables(np.zeros(256, np.uint8), np.ones(256, np.int32), Counts(None, 1001)), "expected 0 .. 1000"),
    ],
)
def test_tables_that_a_gpu_would_misread_are_refused(
    tables: Tables, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = build()
    monkeypatch.setattr(sampler.policy_at(0), "tables", lambda: tables)
    with pytest.raises(UsageError, match=match):
        sampler.draw_device(loaded(), 2)


def test_fused_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="impl: fused, but this machine has no usable GPU") as caught:
        build(impl="fused")
    assert caught.value.exit_code == 2
    assert "impl=auto" in str(caught.value.hint)


def test_fused_draws_by_host_code_what_is_drawn_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fused = build(impl="fused")
    assert fused.impl == "fused"
    assert_equal(fused.draw(loaded(), 2), build().draw(loaded(), 2))
    with pytest.raises(ConfigError, match="4160 patches; expected at most 4096"):
        build(impl="fused", grid=(65, 64))


@pytest.mark.parametrize(
    ("impl", "device", "patches", "has_gpu", "becomes"),
    [
        ("auto", "cuda", 196, True, "fused"),
        ("auto", "cuda", 4096, True, "fused"),
        ("auto", "cuda", 4097, True, "cpu"),
        ("auto", "cpu", 196, True, "cpu"),
        ("auto", "mps", 196, False, "cpu"),
        ("reference", "cuda", 196, True, "reference"),
        ("cpu", "cuda", 196, True, "cpu"),
        ("fused", "cuda", 4096, True, "fused"),
        ("fused", "cuda", 4097, True, None),
        ("fused", "cpu", 196, True, None),
        ("fused", "cuda", 196, False, None),
        ("fsed", "cpu", 196, False, None),
    ],
)
def test_which_backend_draws(
    impl: str, device: str, patches: int, has_gpu: bool, becomes: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    if becomes:
        assert resolve_impl(impl, device=device, patches=patches) == becomes
    else:
        with pytest.raises(ConfigError, match="impl"):
            resolve_impl(impl, device=device, patches=patches)


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


def test_a_policy_that_changes_is_built_once_an_epoch() -> None:
    built: list[int] = []

    def policy_at(epoch: int) -> Any:
        built.append(epoch)
        return build_policy("uniform", {"hide": 100 + epoch})

    sampler = MaskSampler(policy_at, grid=(2, 5), seed=0, regions=("a",))
    keys = np.arange(3, dtype=np.uint64)
    for epoch in (0, 0, 400, 400, 0):
        drawn = sampler.draw_covered(np.zeros((3, 10), np.uint8), keys, epoch)
        assert (drawn.hidden.sum(1) == 1 + epoch // 100).all()
    assert built == [0, 400, 0]
