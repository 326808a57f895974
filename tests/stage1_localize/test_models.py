"""Where weights come from and what pins them: the same tensors are the same, whatever file they lie in."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import ConfigError, CorruptError, InputMissingError
from stage1_localize.models import ModelOptions, find_model, load_tensors, tensors_sha256, weights_identity

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def test_equal_tensors_are_equal_in_any_file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    torch.save(TENSORS, tmp_path / "plain.pth")
    torch.save({"model": TENSORS}, tmp_path / "nested.pth")
    found = {tensors_sha256(load_tensors(tmp_path / name)) for name in ("x.safetensors", "plain.pth", "nested.pth")}
    assert found == {tensors_sha256(TENSORS)}
    assert tensors_sha256({**TENSORS, "b": torch.tensor([1, 3])}) not in found
    half = {"a": torch.ones(2, dtype=torch.bfloat16)}
    assert tensors_sha256(half) != tensors_sha256({"a": torch.ones(2)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    with pytest.raises(CorruptError, match=r"tensor a\.weight holds NaN or infinite"):
        weights_identity({**TENSORS, "a.weight": torch.tensor([1.0, value])})


def test_a_file_that_would_have_to_be_run_is_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('it ran')",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"model": Evil()}, tmp_path / "torch.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    torch.save([1], tmp_path / "list.pth")
    for name in ("evil.pth", "torch.pth", "cut.safetensors", "list.pth"):
        with pytest.raises(CorruptError, match=rf"weights {name}"):
            load_tensors(tmp_path / name)


def test_files_that_decide_results_are_pinned_and_absent_ones_left_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = weights_identity(TENSORS, [tmp_path / "config.json", tmp_path / "vocab.txt"])
    assert list(found["files_sha256"]) == ["config.json"]


def test_device_and_dtype_are_decided_where_the_run_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (ModelOptions().pinned().device, ModelOptions().pinned().dtype) == ("cpu", "float32")
    with pytest.raises(ConfigError, match="this machine has none"):
        ModelOptions(device="cuda").pinned()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (ModelOptions().pinned().device, ModelOptions().pinned().dtype) == ("cuda", "bfloat16")


def test_paths_are_made_absolute_for_workers_and_hub_names_are_left(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert ModelOptions(model="model").anywhere().model == str(tmp_path / "model")
    assert ModelOptions(model="org/name").anywhere().model == "org/name"


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "org/name", "no such name!"])
def test_what_is_nowhere_is_named(name):
    with pytest.raises(InputMissingError, match=r"model .*: (no such|not on this disk, and offline)"):
        find_model(ModelOptions(model=name, offline=True), "org/default")


def test_a_folder_lacks_a_file(tmp_path):
    with pytest.raises(InputMissingError, match=r"holds no config\.json"):
        find_model(ModelOptions(model=str(tmp_path)), "org/default", needs=("config.json",))
