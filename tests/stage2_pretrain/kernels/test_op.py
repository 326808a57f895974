"""The operator on every device there is, eager and compiled; those of a GPU are skipped, and counted, without one.

`interpreted_fused` holds the kernel behind it to the same results without a GPU.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch._inductor.compile_fx import compile_fx

from shared.errors import ConfigError, CorruptError, UsageError
from shared.rng import sample_keys
from stage2_pretrain.kernels import op
from stage2_pretrain.kernels.drawn import DrawnOnDevice
from stage2_pretrain.kernels.op import draw_hidden
from stage2_pretrain.masking.budget import Counts
from stage2_pretrain.window import WindowOptions
from tests.stage2_pretrain.kernels.region_cases import (
    assert_equal,
    assert_none,
    cases,
    expected,
    launch,
    none,
    one,
    poisoned,
    windows_of,
)

ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "allocate", poisoned)
    if torch.cuda.is_available():
        monkeypatch.setattr("stage2_pretrain.kernels.fused.allocate", poisoned)


@DEVICES
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_it_gives_the_bits_of_the_reference(device: str, case: dict[str, Any]) -> None:
    assert_equal(launch(draw_hidden, case, device), expected(case))


@DEVICES
@pytest.mark.parametrize("key", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_bit_of_the_seed_key_arrives(device: str, key: int) -> None:
    case = one(seed_key=key)
    assert_equal(launch(draw_hidden, case, device), expected(case))


@DEVICES
def test_every_bit_of_a_sample_key_arrives(device: str) -> None:
    keys = np.array([0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    case = one(maps=np.repeat(one()["maps"][:1], 7, axis=0), sizes=np.full((7, 2), 80), keys=keys)
    case["windows"] = np.tile(np.array([0, 0, 80, 80, 80, 80, 0, 0], np.int32), (7, 1))
    made = launch(draw_hidden, case, device)
    assert_equal(made, expected(case))
    assert len({row.numpy().tobytes() for row in made.hidden.cpu()}) == 7


@DEVICES
def test_a_batch_of_none(device: str) -> None:
    assert_none(launch(draw_hidden, none(), device))


@DEVICES
def test_slices_of_larger_tensors_are_taken(device: str) -> None:
    case = one()
    made = launch(draw_hidden, case, device)
    wide = torch.from_numpy(np.repeat(case["maps"], 2, axis=3)).to(device)[..., ::2]
    windows = torch.from_numpy(np.repeat(windows_of(case), 2, axis=0)).to(device)[::2]
    keys = torch.from_numpy(np.repeat(case["keys"], 3).view(np.int64)).to(device)[::3]
    tables = [torch.from_numpy(np.repeat(case[name], 2)).to(device)[::2] for name in ("stratum_of", "weight_of")]
    names = {name: case[name] for name in ("grid", "seed_key", "epoch", "view")}
    assert_equal(draw_hidden(wide, windows, keys, *tables, case["counts"], **names), made)


@DEVICES
@pytest.mark.parametrize("changes", [{}, {"counts": Counts(None, 800, 300), "region_weights": np.array([3, 1])}])
@pytest.mark.filterwarnings("ignore")
def test_torch_library_s_own_check(device: str, changes: dict[str, Any]) -> None:
    case = one(maps=np.random.default_rng(1).integers(0, 255, (2, 2, 80, 80), dtype=np.uint8), **changes)
    seen: list[tuple[Any, ...]] = []

    def remember(*given: Any, **names: Any) -> Any:
        *tensors, counts = given
        seen.append((*tensors, names["region_weights"], names["grid"], counts.total, counts.first, counts.second, -9))

    launch(remember, case, device)
    checked = torch.library.opcheck(torch.ops.mwm.draw_hidden.default, (*seen[0], case["epoch"], case["view"]))
    assert set(checked.values()) == {"SUCCESS"}
    assert len(checked) == 4


@pytest.mark.slow
@DEVICES
def test_a_compiled_step_draws_the_same(device: str) -> None:
    case, graphs = one(), []
    parts = (case["maps"], windows_of(case), case["keys"].view(np.int64), case["stratum_of"], case["weight_of"])
    tensors = [torch.from_numpy(part).to(device) for part in parts]

    def step(epoch: int, key: int) -> tuple[torch.Tensor, DrawnOnDevice]:
        drawn = draw_hidden(*tensors, case["counts"], grid=case["grid"], seed_key=key, epoch=epoch, view=1)
        return (~drawn.hidden).view(-1, *case["grid"]).sum((1, 2)), drawn

    def counted(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return compile_fx(module, inputs)

    compiled = torch.compile(step, fullgraph=True, backend=counted)
    for epoch, key in [(5, 7), (6, 7), (1 << 23, 7), (3, 2**62 + 1)]:
        count, drawn = compiled(epoch, key)
        wanted = expected({**case, "epoch": epoch, "seed_key": key})
        assert_equal(drawn, wanted)
        assert torch.equal(count.cpu(), (~wanted.hidden).sum(1))
    assert len(graphs) <= 3  # as constants, with the epoch as a variable, with the key too


@DEVICES
def test_a_compiled_step_holds_a_key_beyond_signed_integers(device: str) -> None:
    case = one(seed_key=2**64 - 3)
    parts = (case["maps"], windows_of(case), case["keys"].view(np.int64), case["stratum_of"], case["weight_of"])
    tensors = [torch.from_numpy(part).to(device) for part in parts]
    names = {name: case[name] for name in ("grid", "seed_key", "epoch", "view")}
    compiled = torch.compile(
        lambda maps: draw_hidden(maps, *tensors[1:], case["counts"], **names), fullgraph=True, backend="aot_eager"
    )
    assert_equal(compiled(tensors[0]), expected(case))


BAD = {
    "maps": ("maps", lambda t: t.to(torch.int16), "int16"),
    "maps of a region": ("maps", lambda t: t[:, 0], r"\[2, 80, 80\]"),
    "windows": ("windows", lambda t: t.long(), "expected int32"),
    "window": ("windows", lambda t: t[:1], r"expected int32 \[2, 8\]"),
    "keys": ("sample_keys", lambda t: t.to(torch.int32), "expected int64"),
    "strata": ("stratum_of", lambda t: t[:255], r"\[255\]; expected uint8 \[256\]"),
    "weights": ("weight_of", lambda t: t.float(), "expected int32"),
    "region weights": ("region_weights", lambda t: torch.ones(2, dtype=torch.int64), r"expected int64 \[1\]"),
    "grid": ("grid", lambda grid: (0, 7), "grid"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_would_be_read_as_something_else_is_refused(name: str) -> None:
    case = one()
    given: dict[str, Any] = {
        "maps": torch.from_numpy(case["maps"]),
        "windows": torch.from_numpy(windows_of(case)),
        "sample_keys": torch.from_numpy(case["keys"].view(np.int64)),
        "stratum_of": torch.from_numpy(case["stratum_of"]),
        "weight_of": torch.from_numpy(case["weight_of"]),
        "counts": case["counts"],
        "region_weights": None,
        **{key: case[key] for key in ("grid", "seed_key", "epoch", "view")},
    }
    draw_hidden(**given)
    argument, broken, match = BAD[name]
    given[argument] = broken(given[argument])
    with pytest.raises(UsageError, match=f"{argument}: .*{match}" if argument != match else match):
        draw_hidden(**given)


def test_what_only_a_cpu_can_refuse() -> None:
    maps = np.zeros((2, 1, 80, 80), np.uint8)
    maps[1] = 255
    with pytest.raises(CorruptError, match="item 1"):
        launch(draw_hidden, one(maps=maps))
    with pytest.raises(ConfigError, match="one or more"):
        launch(draw_hidden, one(grid=(81, 1), window=WindowOptions()))
    with pytest.raises(UsageError, match="weights 0"):
        launch(draw_hidden, one(weight_of=np.zeros(256, np.int32)))


@ON_GPU
def test_nothing_waits_for_the_gpu() -> None:
    case = one()
    tensors = [torch.from_numpy(case[name]).cuda() for name in ("maps", "stratum_of", "weight_of")]
    windows, keys = torch.from_numpy(windows_of(case)).cuda(), torch.from_numpy(case["keys"].view(np.int64)).cuda()
    names = {name: case[name] for name in ("grid", "seed_key", "view")}
    draw_hidden(tensors[0], windows, keys, *tensors[1:], case["counts"], epoch=0, **names)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = draw_hidden(tensors[0], windows, keys, *tensors[1:], case["counts"], epoch=case["epoch"], **names)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(made, expected(case))


def many(epoch: int) -> dict[str, Any]:
    count = 3000  # more than run at once on any GPU: late programs wait for early ones
    return one(
        maps=np.random.default_rng(epoch).integers(0, 255, (count, 1, 32, 32), dtype=np.uint8),
        sizes=np.full((count, 2), 32),
        keys=sample_keys(map(str, range(count))),
        grid=(7, 7),
        counts=Counts(None, 900, 250),
        epoch=epoch,
    )


@ON_GPU
def test_launches_on_two_streams_do_not_meet() -> None:
    made, streams = {}, [torch.cuda.Stream(), torch.cuda.Stream()]
    for epoch in range(20):
        with torch.cuda.stream(streams[epoch % 2]):
            made[epoch] = launch(draw_hidden, many(epoch), "cuda")
    torch.cuda.synchronize()
    for epoch, drawn in made.items():
        assert_equal(drawn, expected(many(epoch)))


@ON_GPU
def test_a_captured_graph_packs_anew_at_every_replay() -> None:
    first, second = many(1), many(2)
    maps = torch.from_numpy(first["maps"]).cuda()
    rest = [torch.from_numpy(windows_of(first)).cuda(), torch.from_numpy(first["keys"].view(np.int64)).cuda()]
    rest += [torch.from_numpy(first[name]).cuda() for name in ("stratum_of", "weight_of")]
    names = {name: first[name] for name in ("grid", "seed_key", "epoch", "view")}
    draw_hidden(maps, *rest, first["counts"], **names)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = draw_hidden(maps, *rest, first["counts"], **names)
    for case in (first, second, first):
        maps.copy_(torch.from_numpy(case["maps"]))
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(made, expected({**first, "maps": case["maps"]}))
