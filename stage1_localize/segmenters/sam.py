"""`sam`: Segment Anything, and families built like it, with transformers' own classes; boxes in, probabilities out.

Kirillov et al., "Segment anything", ICCV 2023. The same class reads SAM ViT-B, L, H, MedSAM (Ma et al., Nature
Communications 15, 2024: ``wanglab/medsam-vit-base``) and SAM-HQ (Ke et al., NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import Field
from torch import Tensor

from shared.config import digest
from stage1_localize.contracts import Batch, Detections
from stage1_localize.pretrained import load_pretrained, read_normalisation
from stage1_localize.segmenters.sam_boxes import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    SamOptions,
    best_of,
    describe,
    segment,
)

DEFAULT = "facebook/sam-vit-base"
CLASSES = {"sam": "SamModel", "sam_hq": "SamHQModel"}


class Sam:
    """Turns boxes into pixel probabilities with a model folder of transformers."""

    class Options(SamOptions):
        """A folder with config.json and weights, or a name on the hub."""

        preprocessing: Literal["sam", "medsam"] = Field(
            "sam",
            description="sam: longest side to the input's, normalised as the folder says; medsam: squashed to the "
            "square, each image's own minimum and maximum to 0 and 1, as MedSAM's release does.",
        )

    version = 1

    def __init__(self, options: Options) -> None:
        """Load the model.

        Raises:
            InputMissingError, IncompatibleError, CorruptError: As `load_pretrained`.
            ConfigError: ``cuda`` is asked and there is none.
        """
        self._options = options.pinned()
        loaded = load_pretrained(options, DEFAULT, CLASSES)
        size_px = int(loaded.model.config.vision_config.image_size)
        if self._options.preprocessing == "medsam":
            zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            self._how = Preprocessing(size_px, "squash", zeros, ones, stretch=True, mode="bicubic")
        else:
            mean, std = read_normalisation(loaded.folder, options.model or DEFAULT, IMAGENET_MEAN, IMAGENET_STD)
            self._how = Preprocessing(size_px, "letterbox", mean, std)
        self._identity = {**loaded.identity, **describe(self._how, self._options)}
        self._key = f"sam {digest(self._identity)}"
        self._network = NativeSam(loaded.model, self._options)

    def identity(self) -> dict[str, Any]:
        """Digests of weights and configuration, preprocessing, numeric settings."""
        return dict(self._identity)

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[Float32[np.ndarray, "n 256 256"]]:
        """Probability of each detection's pixels in the map frame."""
        return segment(self._network, self._how, self._options, self._key, batch, detections)


class NativeSam:
    """transformers' ``SamModel`` or ``SamHQModel`` behind the `SamNetwork` protocol.

    Args:
        model: Float32, in evaluation mode; its encoder is moved and cast in place. Prompts and decoder stay float32:
            in bfloat16 a corner of a box would be known to 4 px only.
        options: Pinned.
    """

    def __init__(self, model: Any, options: SamOptions) -> None:
        self.device: str = options.device
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._model = model.to(self.device)
        self._model.vision_encoder.to(self._dtype)

    def encode(self, pixels: Float[Tensor, "B 3 s s"]) -> tuple[Tensor, ...]:
        """The embedding, and for SAM-HQ what its first global block says."""
        said = self._model.get_image_embeddings(pixels.to(self._dtype))
        if isinstance(said, Tensor):
            return (said.float(),)
        return said[0].float(), said[1][0].float()

    def decode(self, embedding: tuple[Tensor, ...], boxes: Float[Tensor, "n 4"], best: bool) -> Float[Tensor, "n h w"]:
        """Logits of the boxes of one image."""
        more = {"intermediate_embeddings": [embedding[1]]} if len(embedding) > 1 else {}
        out = self._model(image_embeddings=embedding[0], input_boxes=boxes[None], multimask_output=best, **more)
        return best_of(out.pred_masks[0], out.iou_scores[0])
