"""How the golden artifacts of a release were made: a whole chain on drawn pictures, without its ``run/`` folders.

::

    python -m tests.compat.make_golden tests/compat/v0.1.0

with the release installed. Made once a release and never again: what lies there must open for ever. Losses and weights
differ in their last bits from machine to machine, so a second making gives other ids; that is no fault.
"""

import csv
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipelines.audit import audit
from shared.artifact import CARD, read_card
from shared.config import load
from stage1_localize.config import LocalizeConfig
from stage1_localize.job import localize
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.train import pretrain
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.train import finetune

NETWORK = {"output_stride": 16, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}
SETTINGS: dict[str, dict[str, Any]] = {
    "localize": {
        "regions": {"bright": "disc", "slope": ["cone", "nothing"]},
        "grounder": "planted",
        "segmenter": "none",
        "grid_px": 32,
        "workers": 0,
        "max_failures": 1,
    },
    "pretrain": {
        "backbone": "resnet18",
        "backbone_options": NETWORK,
        "method": {"name": "spark", "decoder_width": 16},
        "size_px": 64,
        "epochs": 2,
        "batch_size": 6,
        "warmup_epochs": 0,
        "threads": 1,
        "device": "cpu",
        "pictures": 1,
    },
    "finetune": {
        "size_px": 64,
        "epochs": 2,
        "batch_size": 4,
        "warmup_epochs": 0,
        "threads": 1,
        "device": "cpu",
        "resamples": 100,
    },
}
COUNT = 18


def draw_pictures(folder: Path) -> Path:
    """Discs of two sizes on an even ground, two pictures a made-up patient, and a file that is no picture."""
    (folder / "images").mkdir(parents=True)
    y, x = np.mgrid[0:40, 0:48]
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", "label", "group", "split"])
        for index in range(COUNT):
            rng = np.random.default_rng(index)
            disc = (y - rng.integers(14, 26)) ** 2 + (x - rng.integers(16, 32)) ** 2 < (36 if index % 2 else 100)
            pixels = np.where(disc, 220, 60 + index)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"p{index:02d}.png")
            split = "train" if index < 10 else "val" if index < 14 else "test"
            writer.writerow([f"p{index:02d}.png", ("large", "small")[index % 2], f"patient{index // 2}", split])
    (folder / "images" / "p99.png").write_bytes(b"no picture")
    return folder


def make(out: Path) -> None:
    """Make every kind of artifact in a folder that does not exist yet."""
    if out.exists():
        sys.exit(f"{out}: is there; golden artifacts are never made anew")
    with tempfile.TemporaryDirectory() as scratch:
        inputs = draw_pictures(Path(scratch))
        images, labels = inputs / "images", inputs / "labels.csv"
        command = "python -m tests.compat.make_golden <out>"
        localize(load(LocalizeConfig, SETTINGS["localize"]), images=images, out=out / "regions", command=command)
        pretrain(
            load(PretrainConfig, SETTINGS["pretrain"]),
            images=images, regions=str(out / "regions"), out=out / "encoder", command=command,
        )  # fmt: skip
        finetune(
            load(FinetuneConfig, SETTINGS["finetune"]),
            images=images, labels=labels, encoder=str(out / "encoder"), out=out / "model", command=command,
        )  # fmt: skip
    audit(out, level="masks", out=out / "audit", command=command)
    for run in out.rglob("run"):
        shutil.rmtree(run)
    ids = {card.parent.relative_to(out).as_posix(): read_card(card.parent).artifact_id for card in out.rglob(CARD)}
    (out / "ids.json").write_text(json.dumps(dict(sorted(ids.items())), indent=2) + "\n")
    (out / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
