"""A study of two arms on discs, which runs in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.study_config import StudyConfig
from shared.config import validate

GROUPS = 12
RECIPE = {
    "corpora": {
        "discs": {
            "images": "discs.csv",
            "labels": "labels.csv",
            "regions": {"disc": "disc"},
            "endpoints": {
                "full": {},
                "probe": {"finetune": {"freeze": True}, "scratch": False},
            },
        }
    },
    "arms": {
        "scratch": {},
        "uniform": {"pretrain": {"policy": {"name": "uniform", "hide": 400}}},
    },
    "claims": [
        {"text": "pretraining helps", "corpus": "discs", "endpoint": "full", "score": "accuracy", "arm": "uniform",
         "than": "scratch", "milli": 31},
    ],
    "localize": {"grounder": "contrast", "segmenter": "boxfill", "grid_px": 64, "workers": 0},
    "pretrain": {"method": {"name": "spark", "decoder_width": 32}, "backbone": "test_resnet", "backbone_options": {},
                 "size_px": 64, "epochs": 1, "warmup_epochs": 0, "batch_size": 16, "threads": 1, "pictures": 0},
    "finetune": {"size_px": 64, "epochs": 1, "warmup_epochs": 0, "batch_size": 16, "threads": 1, "resamples": 100},
    "folds": 2,
    "resamples": 100,
    "jobs": 2,
}  # fmt: skip


def config(**changes: object) -> StudyConfig:
    return validate(StudyConfig, {**RECIPE, **changes})


def disc_outlines(folder: Path) -> dict[str, Any]:
    """COCO labels of the discs: a box each."""
    names = [f"{group:02d}-{number}.png" for group in range(GROUPS) for number in range(2)]
    images = [{"id": i, "file_name": name, "width": 48, "height": 48} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [8, 12, 24, 24]} for i in range(len(names))]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "disc"}]}


def write_discs(folder: Path) -> Path:
    """Two images a group; what a disc's size is, is the class."""
    (folder / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    images, labels = ["image,sample_id,group"], ["sample_id,label,group"]
    for group in range(GROUPS):
        for number in range(2):
            name, label = f"{group:02d}-{number}.png", "ab"[group % 2]
            y, x = np.mgrid[:48, :48]
            disc = np.hypot(y - 24, x - 20 - number) < (6, 12)[group % 2]
            pixels = 60 + noise.normal(0, 10, (48, 48)) + 120 * disc
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
            images.append(f"images/{name},{name},g{group}")
            labels.append(f"{name},{label},g{group}")
    (folder / "discs.csv").write_text("\n".join(images) + "\n")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    return folder
