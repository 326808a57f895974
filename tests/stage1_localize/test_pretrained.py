"""Folders of transformers: weights whole or in shards, and nothing of the library's own noise left switched off."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

from shared.errors import InputMissingError
from stage1_localize.pretrained import read_tensors, without_progress_bar

TENSORS = {"a": torch.ones(2), "b": torch.zeros(3)}


def test_shards_are_the_whole(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "model-1.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found, name = read_tensors(tmp_path, "x")
    assert name == "model.safetensors.index.json"
    assert {key: value.tolist() for key, value in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(InputMissingError, match="lists 2 files, 1 of them absent"):
        read_tensors(tmp_path, "x")


def test_a_progress_bar_comes_back(monkeypatch):
    assert logging.is_progress_bar_enabled()
    with without_progress_bar():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
