"""A grounder whose answers are known in closed form: for tests and scale trials, never for quality.

It knows four words and reads the image only through its bright pixels (grey at least ``level_milli`` / 1000 of
the image's maximum): their centroid is the centre of a disc of their area, in the normalised frame.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32
from pydantic import Field

from shared.config import Strict, runtime
from shared.errors import PromptError
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections, Region

WORDS = {
    "disc": "1 where a pixel's centre lies in the disc, else 0",
    "cone": "falls linearly from 1 at the disc's centre to 0 at its rim",
    "box": "the disc's box, without pixels: a segmenter must make them",
    "nothing": "never found",
}


class Planted:
    """Answers computed from the image by arithmetic alone."""

    class Options(Strict):
        """What is planted, and what is simulated."""

        score_milli: int = Field(1000, ge=1, le=1000, description="Score of every detection, in thousandths.")
        level_milli: int = Field(800, ge=1, le=1000, description="Bright: at least this share of the maximum.")
        delay_ms: int = runtime(0, "Sleep an image, in ms, to simulate a slow model.", ge=0)
        deadly_width_px: int | None = runtime(None, "An image of this width kills the process, as lack of memory does.")

    version = 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, regions: Sequence[Region]) -> None:
        """Accept the four words only.

        Raises:
            PromptError: Any other text.
        """
        for region in regions:
            for text in region.texts:
                if text not in WORDS:
                    raise PromptError(
                        f"region '{region.name}': '{text}' is not in the vocabulary of 'planted'",
                        hint=f"known: {', '.join(WORDS)}",
                    )

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Whether any of these regions comes without pixels."""
        return any("box" in region.texts for region in regions)

    def identity(self) -> dict[str, Any]:
        """There are no weights."""
        return {}

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Find each wording once in every image that has a bright part and is not constant."""
        return [self._locate(image, regions) for image in batch.images]

    def _locate(self, image: Float32[np.ndarray, "C H W"], regions: Sequence[Region]) -> Detections:
        if self.options.delay_ms:
            time.sleep(self.options.delay_ms / 1000)
        if image.shape[2] == self.options.deadly_width_px:
            os.kill(os.getpid(), signal.SIGKILL)
        disc = bright_disc(image, self.options.level_milli)
        if disc is None:
            return Detections.none()
        x, y, radius = disc
        _, height, width = image.shape
        box = np.clip([x - radius, y - radius, x + radius, y + radius], 0, 1) * [width, height, width, height]
        asked = [(r, t, text) for r, region in enumerate(regions) for t, text in enumerate(region.texts)]
        asked = [entry for entry in asked if entry[2] != "nothing"]
        return Detections(
            box_xyxy_px=np.tile(np.asarray(box, np.float32), (len(asked), 1)),
            score=np.full(len(asked), self.options.score_milli / 1000, np.float32),
            region=np.array([r for r, _, _ in asked], np.int64),
            text=np.array([t for _, t, _ in asked], np.int64),
            probability=[None if text == "box" else draw(text, x, y, radius) for _, _, text in asked],
        )


def bright_disc(image: Float32[np.ndarray, "C H W"], level_milli: int) -> tuple[float, float, float] | None:
    """Centre x, y and radius of the planted disc in the normalised frame (sides of length 1).

    Returns:
        The disc of the bright pixels' centroid and area, or None for a constant image.
    """
    grey = image.mean(axis=0, dtype=np.float64)
    if grey.min() == grey.max():
        return None
    rows, columns = np.nonzero(grey >= grey.max() * level_milli / 1000)
    height, width = grey.shape
    x, y = (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height
    return float(x), float(y), float(np.sqrt(len(rows) / (height * width) / np.pi))


def draw(word: str, x: float, y: float, radius: float) -> Float32[np.ndarray, "256 256"]:
    """The map of ``disc`` or ``cone``, sampled at pixel centres of the map frame."""
    centre = (np.arange(MAP_SIZE_PX) + 0.5) / MAP_SIZE_PX
    distance = np.hypot(centre[None, :] - x, centre[:, None] - y)
    if word == "disc":
        return (distance <= radius).astype(np.float32)
    return np.clip(1 - distance / radius, 0, 1).astype(np.float32)
