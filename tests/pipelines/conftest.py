"""A whole chain on twelve small pictures, made once: what the command line tests break and audit."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]

RECIPE = {
    "corpus": "given",
    "localize": {
        "regions": {"bright": "disc"},
        "grounder": {"name": "planted"},
        "segmenter": {"name": "none"},
        "grid_px": 64,
        "workers": 0,
    },
    "pretrain": {
        "backbone": "resnet18",
        "backbone_options": {"output_stride": 16, "channels": [8, 8, 16, 16]},
        "method": {"name": "spark", "decoder_width": 32},
        "size_px": 64,
        "epochs": 2,
        "batch_size": 6,
        "warmup_epochs": 0,
        "threads": 1,
    },
    "finetune": {
        "backbone": "resnet18",
        "backbone_options": {"output_stride": 16, "channels": [8, 8, 16, 16]},
        "size_px": 64,
        "epochs": 2,
        "batch_size": 4,
        "warmup_epochs": 0,
        "threads": 1,
        "resamples": 100,
    },
}


class Chain:
    """Where the inputs and the finished chain of a test are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.labels = root / "labels.csv"
        self.recipe = root / "mini.yaml"
        self.out = root / "out"

    def command(self, *more: str) -> list[str]:
        return [
            "run", str(self.recipe), "--out", str(self.out), "--images", str(self.images), "--labels", str(self.labels),
            *more,
        ]  # fmt: skip


def write_inputs(root: Path, count: int = 12) -> Chain:
    """Discs of two sizes, six patients of two pictures each."""
    chain = Chain(root)
    chain.images.mkdir(parents=True)
    y, x = np.mgrid[0:80, 0:96]
    with chain.labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", "label", "group", "split"])
        for index in range(count):
            rng = np.random.default_rng(index)
            radius = 8 if index % 2 else 20
            disc = (y - rng.integers(30, 50)) ** 2 + (x - rng.integers(35, 60)) ** 2 < radius**2
            pixels = np.where(disc, 220, 60) + rng.integers(-20, 20, (80, 96))
            Image.fromarray(pixels.astype(np.uint8)).save(chain.images / f"p{index:02d}.png")
            split = "train" if index < count * 2 // 3 else "test"
            writer.writerow([f"p{index:02d}.png", ("large", "small")[index % 2], f"patient{index // 2}", split])
    chain.recipe.write_text(yaml.safe_dump(RECIPE))
    return chain


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A finished chain; tests that change it take `chain`."""
    from pipelines.cli import main

    chain = write_inputs(tmp_path_factory.mktemp("chain"))
    with pytest.raises(SystemExit) as stopped:
        main(chain.command())
    assert not stopped.value.code
    return chain


@pytest.fixture
def chain(finished: Chain, tmp_path: Path) -> Chain:
    """A copy of a finished chain."""
    shutil.copytree(finished.root, tmp_path / "chain")
    return Chain(tmp_path / "chain")


@pytest.fixture
def mwm(capsys: pytest.CaptureFixture[str]):
    """Run a command in this process: exit code, stdout, stderr."""

    from pipelines.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(stopped.value.code or 0), out, err

    return run
