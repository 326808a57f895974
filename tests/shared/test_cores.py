"""Threads and device: what a setting means here; what would crash torch is refused."""

import pytest
import torch

from shared import cores
from shared.errors import ConfigError


def test_auto_is_a_thread_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cores", lambda: 6)
    assert cores.resolve_threads("auto") == 6
    assert cores.resolve_threads(64) == 64  # a run of a larger machine continues here


@pytest.mark.parametrize(("threads", "here", "most"), [(100_000, 2, 64), (65, 16, 64), (129, 32, 128), (0, 2, 64)])
def test_too_many_are_refused_with_the_machines_cores(
    threads: int, here: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "cores", lambda: here)
    with pytest.raises(ConfigError, match=f"threads: {threads}, expected 1 to {most} on this machine of {here} cores"):
        cores.resolve_threads(threads)


@pytest.mark.parametrize(("gpu", "wanted"), [(True, "cuda"), (False, "cpu")])
def test_a_device_is_what_there_is_or_refused(gpu: bool, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [cores.resolve_device(name) for name in ("auto", "cpu")] == [wanted, "cpu"]
    with pytest.raises(ConfigError, match="device: mps, but this machine has none"):
        cores.resolve_device("mps")
    if gpu:
        assert cores.resolve_device("cuda") == "cuda"
    else:
        with pytest.raises(ConfigError, match="device: cuda, but this machine has no usable GPU"):
            cores.resolve_device("cuda")
