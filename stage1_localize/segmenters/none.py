"""No segmenter: for grounders that give pixel probabilities themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from shared.config import Strict
from shared.errors import ConfigError
from stage1_localize.contracts import Batch, Detections


class NoSegmenter:
    """Refuses to be needed."""

    class Options(Strict):
        """There is nothing to set."""

    version = 1

    def __init__(self, options: Options) -> None:
        del options

    def identity(self) -> dict[str, Any]:
        """Nothing pins a result here."""
        return {}

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[Float32[np.ndarray, "n 256 256"]]:
        """Return nothing for nothing.

        Raises:
            ConfigError: There are boxes without pixels.
        """
        boxes = sum(len(found) for found in detections)
        if boxes:
            raise ConfigError(
                f"segmenter 'none': the grounder left {boxes} boxes without pixels",
                hint="choose a segmenter, e.g. --set segmenter.name=lite_medsam",
            )
        return [np.zeros((0, 256, 256), np.float32) for _ in detections]
