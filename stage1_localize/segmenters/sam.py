"""`sam`: Segment Anything, and families built like it, with transformers' own classes; boxes in, probabilities out.

Kirillov et al., "Segment anything", ICCV 2023. The same class reads SAM ViT-B, L, H, MedSAM (Ma et al., Nature
Communications 15, 2024: ``wanglab/medsam-vit-base``) and SAM-HQ (Ke et al., NeurIPS 2023).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stage1_localize.pretrained import load_pretrained, read_normalisation
from stage1_localize.segmenters.sam_boxes import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MedSamOptions,
    Preprocessing,
    SamOptions,
    SamSegmenter,
    best_of,
    medsam_preprocessing,
)

DEFAULT = "facebook/sam-vit-base"
CLASSES = {"sam": "SamModel", "sam_hq": "SamHQModel"}


class Sam(SamSegmenter):
    """Turns boxes into pixel probabilities with a model folder of transformers."""

    class Options(MedSamOptions):
        """A folder with config.json and weights, or a name on the hub."""

    version = 1

    def __init__(self, options: Options) -> None:
        """Load the model.

        Raises:
            InputMissingError, IncompatibleError, CorruptError: As `load_pretrained`.
            ConfigError: ``cuda`` is asked and there is none.
        """
        pinned = options.pinned()
        loaded = load_pretrained(options, DEFAULT, CLASSES)
        size_px = int(loaded.model.config.vision_config.image_size)
        if pinned.preprocessing == "medsam":
            how = medsam_preprocessing(size_px)
        else:
            mean, std = read_normalisation(loaded.folder, options.model or DEFAULT, IMAGENET_MEAN, IMAGENET_STD)
            how = Preprocessing(size_px, "letterbox", mean, std)
        super().__init__(NativeSam(loaded.model, pinned), how, pinned, loaded.identity)


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
