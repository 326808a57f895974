"""What TensorBoard's own reader finds in a run."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.events import FOLDER


def _read(out: Path, part: str) -> EventAccumulator:
    found = EventAccumulator(str(out / FOLDER / part), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def points(out: Path, part: str = "") -> dict[str, list[tuple[int, float]]]:
    """Step and value of every point, by name."""
    found = _read(out, part)
    return {name: [(item.step, item.value) for item in found.Scalars(name)] for name in found.Tags()["scalars"]}


def pictures(out: Path) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Step and pixels of every picture, by name."""
    found = _read(out, "")
    return {
        name: [
            (item.step, np.asarray(Image.open(io.BytesIO(item.encoded_image_string)))) for item in found.Images(name)
        ]
        for name in found.Tags()["images"]
    }
