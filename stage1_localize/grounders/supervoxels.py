"""`supervoxels`: blocks with the shape of anatomy, chosen by chance: a control that reads no word and needs no weight.

A store of it stands beside one made by words, with the same regions: what is hidden then has borders that follow the
image and a chosen area, yet means nothing. Is a region by words better than this one at a matched budget, the words
did it. Each region of an image is an own random set of SLIC segments, drawn from the pixels, the region's name and a
seed, until ``cover_milli`` of the foreground is covered; sets of two regions may overlap, so that a region does not
depend on which others are asked. Every wording of a region means the same set.

2D only, as every store is so far. Source of the idea: MASS (arXiv 2603.13660), where supervoxels are a mask source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from pydantic import Field
from torch.nn.functional import interpolate

from shared.config import Strict
from shared.rng import draw_u32, seed_key
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections, Region
from stage1_localize.grounders.saliency_map import box_of
from stage1_localize.grounders.slic import superpixels


class Supervoxels:
    """Random segments."""

    class Options(Strict):
        """How large and how many."""

        segments: int = Field(100, ge=4, le=2000, description="Segments an image is cut into, about.")
        compactness: int = Field(
            20, ge=1, le=255, description="Grey levels of 255 that weigh as a segment's side; high makes them square."
        )
        cover_milli: int = Field(
            250, ge=1, le=1000, description="Foreground that a region covers, thousandths; at least one segment."
        )
        foreground_milli: int = Field(
            100, ge=0, le=999, description="Segments of a darker mean are background, thousandths of the grey range."
        )
        seed: int = Field(0, ge=0, le=(1 << 53) - 1, description="Of the choice.")

    version = 1

    def __init__(self, options: Options) -> None:
        self.options = options

    def check(self, regions: Sequence[Region]) -> None:
        """Any words will do: none is read."""

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Every segment comes with pixels."""
        return False

    def identity(self) -> dict[str, Any]:
        """There are no weights; the card says that words are not read."""
        return {"reads_words": False, "segments": "SLIC on 256 x 256 min-max grey; version 1"}

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Each chosen segment is a detection of score 1."""
        return [self._locate(image, regions) for image in batch.images]

    def _locate(self, image: Float32[np.ndarray, "C H W"], regions: Sequence[Region]) -> Detections:
        grey = to_grey(image)
        if grey is None:
            return Detections.none()
        _, height, width = image.shape
        labels = superpixels(grey, self.options.segments, self.options.compactness, (width, height))
        pixels = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image, "<f4").tobytes()).digest()
        found = [
            (r, t, labels == label)
            for r, region in enumerate(regions)
            for label in self._choose(grey, labels, pixels, region.name)
            for t in range(len(region.texts))
        ]
        return Detections(
            box_xyxy_px=np.array([box_of(inside, height, width) for _, _, inside in found], np.float32).reshape(-1, 4),
            score=np.ones(len(found), np.float32),
            region=np.array([r for r, _, _ in found], np.int64),
            text=np.array([t for _, t, _ in found], np.int64),
            probability=[inside.astype(np.float32) for _, _, inside in found],
        )

    def _choose(self, grey: UInt8[np.ndarray, "256 256"], labels: np.ndarray, pixels: bytes, name: str) -> list[int]:
        """Segments of the foreground in a random order, until enough is covered."""
        areas = np.bincount(labels.ravel())
        sums = np.bincount(labels.ravel(), weights=grey.ravel()).astype(np.int64)  # exact below 2^53
        front = np.flatnonzero(sums * 1000 >= areas * 255 * self.options.foreground_milli)
        name_key = hashlib.sha256(pixels + name.encode()).digest()[:8]
        words = draw_u32(
            seed_key("supervoxels", self.options.seed), [int.from_bytes(name_key, "little")], epoch=0, n=len(areas)
        )[0]
        order = front[np.argsort(words[front], kind="stable")]
        covered = np.cumsum(areas[order]) * 1000 >= self.options.cover_milli * areas[front].sum()
        return order[: int(covered.argmax()) + 1].tolist() if len(order) else []


def to_grey(image: Float32[np.ndarray, "C H W"]) -> UInt8[np.ndarray, "256 256"] | None:
    """Mean of the channels in the map frame, the image's minimum to 0 and maximum to 255; None for a constant one."""
    grey = torch.from_numpy(image.mean(axis=0, dtype=np.float64))[None, None]
    frame = interpolate(grey, (MAP_SIZE_PX, MAP_SIZE_PX), mode="bilinear", antialias=True)[0, 0].numpy()
    low, high = float(grey.min()), float(grey.max())
    if not high > low:
        return None
    return np.clip((frame - low) * 255 / (high - low) + 0.5, 0, 255).astype(np.uint8)
