"""A baseline without weights and without words: blobs that stand out from what is around them.

Every prompt gets the same boxes, so a grounder that reads words must beat this one. Response: the difference of two
Gaussians (the wider 1.6 times the narrower), a band-pass that peaks at blobs of its own size, the largest over a few
sizes. Boxes: around each peak, the connected part above a share of that peak.

Source: Marr and Hildreth, Theory of edge detection (1980), for the ratio; Lindeberg, Feature detection with automatic
scale selection (1998), for the largest over sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32
from pydantic import Field
from scipy import ndimage

from shared.config import Strict
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections, Region

WIDER = 1.6
SIGMAS_PX = (3.0, 5.0, 8.0, 12.0, 18.0)
"""Narrow Gaussians, px of the map frame; a blob of radius r answers most at about r / 1.4."""
PEAKS_APART_PX = 9
SCALE = 1 << 20
"""Responses are compared as whole numbers of 2^-20: the last bits of a convolution decide nothing."""


class Contrast:
    """Blobs by local contrast; words are not read."""

    class Options(Strict):
        """Which blobs."""

        polarity: Literal["bright", "dark", "both"] = Field("both", description="Against their surroundings.")
        level_milli: int = Field(
            500, ge=1, le=1000, description="A blob reaches down to this share of its own peak response, thousandths."
        )
        peak_min_milli: int = Field(
            250, ge=1, le=1000, description="Weakest peak, as a share of the image's strongest, thousandths."
        )
        area_min_px: int = Field(40, ge=1, description="Smallest blob, px of the 256 x 256 map frame.")
        boxes_max: int = Field(5, ge=1, le=100, description="Strongest blobs that are kept of an image.")

    version = 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, regions: Sequence[Region]) -> None:
        """Any words will do: none is read."""

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Boxes only."""
        return bool(regions)

    def identity(self) -> dict[str, Any]:
        """There are no weights; the card says that words are not read."""
        return {"reads_words": False, "sigmas": "3, 5, 8, 12, 18 of 256; wider 1.6"}

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """The same blobs for every wording; score: the blob's largest response over the image's."""
        return [self._locate(image, regions) for image in batch.images]

    def _locate(self, image: Float32[np.ndarray, "C H W"], regions: Sequence[Region]) -> Detections:
        box_shares, score = self._blobs(image)
        asked = [(r, t) for r, region in enumerate(regions) for t in range(len(region.texts))]
        n = len(score)
        sides = np.array([image.shape[2], image.shape[1]] * 2, np.float32)
        return Detections(
            box_xyxy_px=np.tile(box_shares * sides, (len(asked), 1)),
            score=np.tile(score, len(asked)),
            region=np.repeat(np.array([r for r, _ in asked], np.int64), n),
            text=np.repeat(np.array([t for _, t in asked], np.int64), n),
            probability=[None] * (n * len(asked)),
        )

    def _blobs(self, image: Float32[np.ndarray, "C H W"]) -> tuple[np.ndarray, np.ndarray]:
        """Boxes as shares of the sides [n, 4], and scores [n], the strongest first."""
        response = response_map(image, self.options.polarity)
        strongest = int(response.max())
        floor = max(1, -(-strongest * self.options.peak_min_milli // 1000))
        peaks = (response == ndimage.maximum_filter(response, PEAKS_APART_PX)) & (response >= floor)
        taken = np.zeros(response.shape, np.bool_)
        found: list[tuple[float, ...]] = []
        for row, column in sorted(np.argwhere(peaks).tolist(), key=lambda at: -int(response[tuple(at)])):
            if taken[row, column] or len(found) == self.options.boxes_max:
                continue
            peak = int(response[row, column])
            labels, _ = ndimage.label(response * 1000 >= peak * self.options.level_milli)
            blob = labels == labels[row, column]
            taken |= blob
            if blob.sum() >= self.options.area_min_px:
                ((rows, columns),) = ndimage.find_objects(blob.astype(np.int8))
                found.append((columns.start, rows.start, columns.stop, rows.stop, peak / strongest))
        boxes = np.array([box for *box, _ in found], np.float32).reshape(-1, 4) / MAP_SIZE_PX
        return boxes, np.array([score for *_, score in found], np.float32)


def response_map(image: Float32[np.ndarray, "C H W"], polarity: str) -> np.ndarray:
    """Local contrast, int64 [256, 256], at least 0, in units of 2^-20 of the image's own grey range."""
    grey = image.mean(axis=0, dtype=np.float64)
    low, high = grey.min(), grey.max()
    if low == high:
        return np.zeros((MAP_SIZE_PX, MAP_SIZE_PX), np.int64)
    sides = [np.clip((np.arange(MAP_SIZE_PX) + 0.5) * side / MAP_SIZE_PX - 0.5, 0, side - 1) for side in grey.shape]
    # A large image is smoothed first, or single pixels would stand for what is between the samples.
    blurred = ndimage.gaussian_filter(grey, [max(0.0, side / MAP_SIZE_PX - 1) / 2 for side in grey.shape])
    frame = (ndimage.map_coordinates(blurred, np.meshgrid(*sides, indexing="ij"), order=1) - low) / (high - low)
    best = np.zeros(frame.shape)
    for sigma in SIGMAS_PX:
        band = ndimage.gaussian_filter(frame, sigma) - ndimage.gaussian_filter(frame, WIDER * sigma)
        best = np.maximum(best, {"bright": band, "dark": -band, "both": np.abs(band)}[polarity])
    return np.rint(best * SCALE).astype(np.int64)
