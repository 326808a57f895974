"""States: whole or absent, the newest whole one wins, never a silent new run."""

import errno
import shutil

import pytest
import torch

from shared import checkpoint
from shared.checkpoint import latest_state, save_state
from shared.errors import CorruptError, DiskFullError


def tensors(value: float) -> dict[str, torch.Tensor]:
    image = torch.full((2, 3, 4, 4), value).to(memory_format=torch.channels_last)
    return {"a": image, "b": torch.tensor(value, dtype=torch.float64), "same": image, "n": torch.arange(3)}


def test_round_trip_to_the_bit(tmp_path):
    save_state(tmp_path / "state", 7, tensors(0.1), {"loss": 0.1 + 0.2, "rows": [1, None, "x"]})
    step, found, meta = latest_state(tmp_path / "state")
    assert (step, meta) == (7, {"loss": 0.1 + 0.2, "rows": [1, None, "x"]})
    assert found.keys() == tensors(0.1).keys()
    for name, value in tensors(0.1).items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_keeps_the_last_and_orders_by_number(tmp_path):
    folder = tmp_path / "state"
    for step in (9, 10, 99_999_999, 100_000_000):
        save_state(folder, step, tensors(step), {}, keep=2)
    assert latest_state(folder)[0] == 100_000_000
    assert sorted(path.name for path in folder.iterdir()) == ["step-100000000", "step-99999999"]


def test_the_loss_of_every_state_is_noticed(tmp_path):
    save_state(tmp_path / "state", 1, tensors(1), {})
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(CorruptError, match="none is usable"):
        latest_state(tmp_path / "state")


def test_none_where_nothing_was_saved(tmp_path):
    assert latest_state(tmp_path / "state") is None
    (tmp_path / "state").mkdir()
    assert latest_state(tmp_path / "state") is None


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "harm",
    [
        lambda state: flip(state / "tensors.safetensors"),
        lambda state: (state / "tensors.safetensors").write_bytes(b""),
        lambda state: (state / "tensors.safetensors").unlink(),
        lambda state: (state / "state.json").write_text("[]"),
        lambda state: (state / "state.json").write_text((state / "state.json").read_text().replace("0.5", "0.6")),
        shutil.rmtree,
    ],
)
def test_a_broken_newest_state_falls_back_aloud(tmp_path, harm):
    folder = tmp_path / "state"
    for step in (1, 2):
        save_state(folder, step, tensors(step), {"loss": 0.5})
    harm(folder / "step-00000002")
    warnings: list[str] = []
    step, found, _ = latest_state(folder, warnings.append)
    assert step == 1
    assert found["b"] == 1
    assert any("step 2 had been saved: 1 steps lost" in text for text in warnings)
    harm(folder / "step-00000001")
    with pytest.raises(CorruptError, match="none is usable"):
        latest_state(folder)


def test_a_full_disk_names_the_bytes_and_keeps_the_old_state(tmp_path, monkeypatch):
    folder = tmp_path / "state"
    save_state(folder, 1, tensors(1), {})

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(DiskFullError, match="step 2 needs 800 bytes"):
        save_state(folder, 2, tensors(2.0), {})
    assert latest_state(folder)[0] == 1
    assert not list(folder.glob(".*"))


def test_a_draft_left_by_a_kill_is_no_state(tmp_path):
    (tmp_path / "state/.step-00000005.draft").mkdir(parents=True)
    (tmp_path / "state/.step-00000005.draft/tensors.safetensors").write_bytes(b"torn")
    assert latest_state(tmp_path / "state") is None
    save_state(tmp_path / "state", 5, tensors(5), {})
    assert latest_state(tmp_path / "state")[0] == 5
