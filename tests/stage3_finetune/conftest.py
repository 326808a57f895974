"""Small images whose class can be seen, their table, and an encoder, made once a session."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.artifact import publish
from shared.backbones import build, export_encoder
from shared.merkle import tensor_digest
from stage3_finetune.config import FinetuneConfig

CLASSES = ("dark", "grey", "light")
BACKBONE = "test_resnet"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six groups a class, three 40 px images each: noise around a level that is the class."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for index, name in enumerate(CLASSES):
        for number in range(18):
            level = 60 + 60 * index
            pixels = np.clip(noise.normal(level, 20, (40, 40)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number:02d}.png")
    return folder


def rows() -> list[dict[str, str]]:
    """The table's rows: groups of three; the last group of a class is test, the one before val."""
    return [
        {
            "sample_id": f"{name}{number:02d}.png",
            "label": name,
            "group": f"{name}-patient{number // 3}",
            "split": {4: "val", 5: "test"}.get(number // 3, "train"),
        }
        for name in CLASSES
        for number in range(18)
    ]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a CSV with the given columns."""

    def write(
        lines: list[dict[str, str]] | None = None, columns: tuple[str, ...] = ("sample_id", "label", "group", "split")
    ) -> Path:
        path = tmp_path / "labels.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows() if lines is None else lines)
        return path

    return write


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published encoder with weights that no seed of a test gives."""
    folder = tmp_path_factory.mktemp("published") / "encoder"
    backbone = build(BACKBONE, in_chans=1, seed=12345)
    export_encoder(backbone, folder / "encoder", size_px=32, mean=(0.4,), std=(0.3,))
    weights = tensor_digest({name: value.numpy() for name, value in backbone.model.state_dict().items()})
    publish(folder, kind="encoder", inputs=(), spec={"made": "by a test"}, outputs={"weights": weights})
    return folder


@pytest.fixture
def quick() -> Callable[..., FinetuneConfig]:
    """Settings that train in a second."""

    def settings(**changes: object) -> FinetuneConfig:
        base: dict[str, object] = {
            "backbone": BACKBONE,
            "size_px": 32,
            "epochs": 2,
            "warmup_epochs": 0,
            "batch_size": 16,
            "threads": 1,
            "device": "cpu",
            "resamples": 200,
        }
        return FinetuneConfig.model_validate({**base, **changes})

    return settings
