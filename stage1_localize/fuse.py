"""From detections to one probability map a region; float32, in a fixed order, so equal inputs give equal bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from stage1_localize.contracts import MAP_SIZE_PX, Detections

VERSION = 1
"""Raised when results change; part of every store's specification."""


def fuse(
    found: Detections, segments: Sequence[Float32[np.ndarray, "256 256"]], num_regions: int
) -> Float32[np.ndarray, "K 256 256"]:
    """Merge detections into region maps.

    The detections of one wording are folded as ``p = 1 - prod_i (1 - s_i * m_i)`` by descending score, then
    box (x0, y0, x1, y1 ascending), then pixels; the wordings of a region merge by ``max``. A region without
    detections is 0 everywhere.

    Args:
        found: Detections of one image; ``probability`` is not read.
        segments: Pixel probability of each detection, [0, 1], map frame.
        num_regions: K.

    Returns:
        Probabilities in [0, 1], map frame.

    Raises:
        ValueError: A score or pixel that is not in [0, 1] (NaN included), or a box that is not finite.
    """
    maps = np.zeros((num_regions, MAP_SIZE_PX, MAP_SIZE_PX), np.float32)
    if not np.all((found.score >= 0) & (found.score <= 1)):
        raise ValueError("a score outside [0, 1]")
    if not np.isfinite(found.box_xyxy_px).all():
        raise ValueError("a box that is not finite")
    order = sorted(
        range(len(found)),
        key=lambda i: (-float(found.score[i]), tuple(map(float, found.box_xyxy_px[i])), segments[i].tobytes()),
    )
    absent: dict[tuple[int, int], np.ndarray] = {}
    one = np.float32(1)
    for i in order:
        segment = np.asarray(segments[i], np.float32)
        if not (segment.min() >= 0 and segment.max() <= 1):
            raise ValueError("a pixel probability outside [0, 1]")
        factor = one - np.float32(found.score[i]) * segment
        wording = (int(found.region[i]), int(found.text[i]))
        absent[wording] = absent[wording] * factor if wording in absent else factor
    for (region, _), product in absent.items():
        np.maximum(maps[region], one - product, out=maps[region])
    return maps


def to_grid(maps: Float32[np.ndarray, "K h w"], size_px: int) -> Float32[np.ndarray, "K s s"]:
    """Resample square maps bilinearly with half-pixel centres; the identity at equal size."""
    if maps.shape[-1] == size_px:
        return maps
    index, next_index, share = _taps(maps.shape[-1], size_px)
    rows = maps[:, index, :] * (1 - share)[:, None] + maps[:, next_index, :] * share[:, None]
    resampled = rows[:, :, index] * (1 - share) + rows[:, :, next_index] * share
    return np.clip(resampled, maps.min(), maps.max())  # the two shares may round to a sum above 1


def _taps(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = (np.arange(target, dtype=np.float64) + 0.5) * size / target - 0.5
    position = np.clip(position, 0, size - 1)
    index = np.floor(position).astype(np.int64)
    return index, np.minimum(index + 1, size - 1), (position - index).astype(np.float32)
