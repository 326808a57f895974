"""A corpus of bright squares on a ramp, its recipe, and the maps it must give, computed apart from the job."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from shared.config import load
from shared.regions import RegionStore
from stage1_localize.config import LocalizeConfig
from stage1_localize.job import localize

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH, SIDE = 60, 80, 12


def write_images(folder: Path, count: int, width: int = WIDTH) -> Path:
    """Image i is a square of ``SIDE`` px at a place that depends on i."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_image(folder / f"{number:03d}.png", number, width)
    return folder


def write_image(path: Path, number: int, width: int = WIDTH) -> None:
    rows, columns = np.indices((HEIGHT, width))
    pixels = ((rows + 2 * columns + number) % 100).astype(np.uint8)
    top, left = corner(number)
    pixels[top : top + SIDE, left : left + SIDE] = 250
    Pillow.fromarray(pixels).save(path)


def corner(number: int) -> tuple[int, int]:
    return 5 + 7 * number % 40, 3 + 11 * number % 60


def disc_map(number: int, score: float = 1.0) -> np.ndarray:
    """The stored map of the word 'disc', from where the square was put and not from the image."""
    top, left = corner(number)
    x, y = (left + SIDE / 2) / WIDTH, (top + SIDE / 2) / HEIGHT
    radius_squared = SIDE * SIDE / (HEIGHT * WIDTH) / np.pi
    centres = (np.arange(256) + 0.5) / 256
    inside = (centres[None] - x) ** 2 + (centres[:, None] - y) ** 2 <= radius_squared
    return np.where(inside, np.floor(254 * np.float32(score) + 0.5), 0).astype(np.uint8)


def recipe(**fields: Any) -> LocalizeConfig:
    options = fields.pop("options", {})
    defaults: dict[str, Any] = {
        "regions": {"spot": "disc", "hill": ["cone", "nothing"]},
        "grounder": {"name": "planted", "options": options},
        "segmenter": "none",
        "workers": 0,
        "micro_batch": 4,
    }
    return load(LocalizeConfig, {**defaults, **fields})


def planted_store(folder: Path) -> tuple[RegionStore, Path]:
    """A store of 21 images and a broken one, and the images."""
    images = write_images(folder / "images", 21)
    (images / "broken.png").write_bytes(b"no picture")
    return localize(recipe(), images=images, out=folder / "store"), images


def start(images: Path, out: Path, config: LocalizeConfig, patch: str = "") -> "subprocess.Popen[str]":
    """Run `localize` in a process of its own, which ends with the error's exit code.

    Args:
        images: The corpus.
        out: The run's folder.
        config: The recipe.
        patch: Python statements run first.
    """
    code = f"""
import json, pathlib, sys, time
{patch}
from shared.config import load
from shared.regions import RegionStore
from shared.errors import MwmError
from stage1_localize.config import LocalizeConfig
from stage1_localize.job import localize
if __name__ == "__main__":
    try:
        localize(
            load(LocalizeConfig, json.loads({json.dumps(config.model_dump_json())})),
            images=pathlib.Path({str(images)!r}), out=pathlib.Path({str(out)!r}),
        )
    except MwmError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
