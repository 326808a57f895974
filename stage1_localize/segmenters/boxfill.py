"""A baseline without weights: a region is everything in its box, as published code fills boxes to make masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from shared.config import Strict
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections


class BoxFill:
    """Fills each box."""

    class Options(Strict):
        """There is nothing to set."""

    version = 1

    def __init__(self, options: Options) -> None:
        del options

    def identity(self) -> dict[str, Any]:
        """Nothing pins a result but the version."""
        return {}

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[Float32[np.ndarray, "n 256 256"]]:
        """1 inside a box, 0 outside; a pixel on its edge has the share of it that is inside."""
        return [
            np.stack([_fill(box, image.shape[1], image.shape[2]) for box in found.box_xyxy_px])
            if len(found)
            else np.zeros((0, MAP_SIZE_PX, MAP_SIZE_PX), np.float32)
            for image, found in zip(batch.images, detections, strict=True)
        ]


def _fill(box_xyxy_px: Float32[np.ndarray, "4"], height_px: int, width_px: int) -> Float32[np.ndarray, "256 256"]:
    x0, y0, x1, y1 = box_xyxy_px.astype(np.float64) * MAP_SIZE_PX / ([width_px, height_px] * 2)
    return np.outer(_shares(y0, y1), _shares(x0, x1)).astype(np.float32)


def _shares(low: float, high: float) -> np.ndarray:
    """How much of each unit cell [i, i + 1) of a side lies in [low, high)."""
    edge = np.arange(MAP_SIZE_PX)
    return np.clip(np.minimum(edge + 1, high) - np.maximum(edge, low), 0, 1)
