"""Labelled pictures, and how the fit and the evaluation of a head see them: embeddings, truth in their frames."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch.nn import functional as F

from shared.artifact import write_atomic
from stage1_localize.contracts import MAP_SIZE_PX
from stage1_localize.evaluate import Case
from stage1_localize.fit import Example
from stage1_localize.grounders.lite_head import CELLS, MASK_CELLS
from stage1_localize.segmenters.lite_medsam import (
    INPUT_SIZE_PX,
    Encoded,
    encode_image,
    letterbox,
)
from stage1_localize.segmenters.lite_medsam_engines import WEIGHTS_SHA256, load_model


@dataclass(frozen=True)
class Picture:
    """One labelled image in its own frame; a concept in no field is unknown.

    Attributes:
        source: Name of the set.
        group: What must stay on one side of a split.
        image: Float32, [0, 1].
        masks: Concept -> share of each pixel, [0, 1]; no mask where only boxes are known.
        boxes: Concept -> half-open boxes in px.
        absent: Concepts that are not there.
        ignore: 1 where the masks' truth is unknown.
    """

    source: str
    group: str
    image: Float32[np.ndarray, "C H W"]
    masks: dict[str, Float32[np.ndarray, "H W"]] = field(default_factory=dict)
    boxes: dict[str, Float32[np.ndarray, "n 4"]] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    ignore: Float32[np.ndarray, "H W"] | None = None


def as_case(picture: Picture) -> Case:
    """A picture as the evaluation sees it: truth in the map frame."""
    return Case(
        group=picture.group,
        image=picture.image,
        masks={name: truth_map(mask) for name, mask in picture.masks.items()},
        boxes=picture.boxes,
        absent=picture.absent,
        ignore=None if picture.ignore is None else truth_map(picture.ignore),
    )


def as_example(
    picture: Picture, encoded: Encoded, *, lateral: frozenset[str] = frozenset(), turns: bool = False
) -> Example:
    """A picture in the frame of the padded input, for fitting; ``lateral`` and ``turns`` as `Example` has them."""
    pixels, height_px, width_px = letterbox(picture.image)
    scale = np.tile(encoded.scale_xy, 2) * (CELLS / INPUT_SIZE_PX)
    boxes = {name: (b * scale).astype(np.float32) for name, b in picture.boxes.items()}
    masks = {name: _to_cells(mask, height_px, width_px) for name, mask in picture.masks.items()}
    masks |= {name: _ellipses(b) for name, b in boxes.items() if name not in masks}
    return Example(
        source=picture.source,
        group=picture.group,
        embedding=encoded.embedding.numpy().astype(np.float16),
        pixels=pixels[: len(picture.image)].numpy().astype(np.float16),
        masks=masks,
        absent=picture.absent,
        boxes=boxes,
        ignore=None if picture.ignore is None else _to_cells(picture.ignore, height_px, width_px),
        lateral=lateral,
        turns=turns,
    )


def cached_encode(image: Float32[np.ndarray, "C H W"], cache: Path) -> Encoded:
    """An image's embedding, float16 on disk under the digest of the padded input and the encoder's weights."""
    _, height_px, width_px = letterbox(image)
    path = cache_path(image, cache)
    try:
        kept = np.load(path)
    except (OSError, ValueError, EOFError):  # none yet, or damaged by a power cut
        cache.mkdir(parents=True, exist_ok=True)
        kept = encode_image(load_model(), image).embedding.numpy().astype(np.float16)
        data = io.BytesIO()
        np.save(data, kept)
        write_atomic(path, data.getvalue())
    return Encoded(torch.from_numpy(kept).float(), height_px, width_px, *image.shape[1:])


def cache_path(image: Float32[np.ndarray, "C H W"], cache: Path) -> Path:
    """Where `cached_encode` keeps an image's embedding."""
    padded = letterbox(image)[0].contiguous().numpy().tobytes()
    return cache / f"{hashlib.sha256(WEIGHTS_SHA256.encode() + padded).hexdigest()[:32]}.npy"


def truth_map(mask: Float32[np.ndarray, "H W"]) -> Bool[np.ndarray, "256 256"]:
    """A mask in the map frame."""
    whole = torch.from_numpy(mask.copy())[None, None]
    size = (MAP_SIZE_PX, MAP_SIZE_PX)
    return (F.interpolate(whole, size, mode="bilinear", align_corners=False)[0, 0] > 0.5).numpy()


def _to_cells(mask: Float32[np.ndarray, "H W"], height_px: int, width_px: int) -> UInt8[np.ndarray, "128 128"]:
    whole = torch.from_numpy(mask.copy())[None, None]
    if mask.shape != (height_px, width_px):
        whole = F.interpolate(whole, (height_px, width_px), mode="bilinear", align_corners=False, antialias=True)
    padded = F.pad(whole, (0, INPUT_SIZE_PX - width_px, 0, INPUT_SIZE_PX - height_px))
    share = F.avg_pool2d(padded, INPUT_SIZE_PX // MASK_CELLS)[0, 0]
    return (share * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def _ellipses(boxes: Float32[np.ndarray, "n 4"]) -> UInt8[np.ndarray, "128 128"]:
    """Cells are round: the ellipse in each box stands for the outline that nobody drew."""
    centre = (np.arange(MASK_CELLS) + 0.5) * (CELLS / MASK_CELLS)
    inside = np.zeros((MASK_CELLS, MASK_CELLS), bool)
    for x0, y0, x1, y1 in boxes:
        x = (centre - (x0 + x1) / 2) / max((x1 - x0) / 2, 0.1)
        y = (centre - (y0 + y1) / 2) / max((y1 - y0) / 2, 0.1)
        inside |= x[None, :] ** 2 + y[:, None] ** 2 <= 1
    return inside.astype(np.uint8) * 255
