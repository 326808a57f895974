"""`sam2`: Segment Anything 2 on single images, with transformers' own class; boxes in, probabilities out.

Ravi et al., "SAM 2: segment anything in images and videos", 2024 (arXiv 2408.00714). Images are squashed to the
square, not padded. With ``multimask: single`` the model itself falls back to its best of three where its single
answer is unstable, if its configuration says so (as released).
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
    Preprocessing,
    SamOptions,
    SamSegmenter,
    best_of,
)

DEFAULT = "facebook/sam2.1-hiera-tiny"
CLASSES = {"sam2": "Sam2Model", "sam2_video": "Sam2Model"}
"""Releases hold the video model; what it adds for images that follow one another is left out, and counted."""


class Sam2(SamSegmenter):
    """Turns boxes into pixel probabilities with a model folder of transformers."""

    class Options(SamOptions):
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
        mean, std = read_normalisation(loaded.folder, options.model or DEFAULT, IMAGENET_MEAN, IMAGENET_STD)
        # The frame of prompts is the prompt encoder's; released configurations name 1024 in both places.
        how = Preprocessing(int(loaded.model.config.prompt_encoder_config.image_size), "squash", mean, std)
        super().__init__(NativeSam2(loaded.model, pinned), how, pinned, loaded.identity)


class NativeSam2:
    """transformers' ``Sam2Model`` behind the `SamNetwork` protocol; encoder in ``dtype``, the rest float32.

    Args:
        model: Float32, in evaluation mode; its encoder is moved and cast in place.
        options: Pinned.
    """

    def __init__(self, model: Any, options: SamOptions) -> None:
        self.device: str = options.device
        self._dtype: torch.dtype = getattr(torch, options.dtype)
        self._model = model.to(self.device)
        self._model.vision_encoder.to(self._dtype)

    def encode(self, pixels: Float[Tensor, "B 3 s s"]) -> tuple[Tensor, ...]:
        """Features of three levels as the decoder wants them, the finest first."""
        levels = [level.float() for level in self._model.vision_encoder(pixels.to(self._dtype)).fpn_hidden_states]
        decoder = self._model.mask_decoder
        coarsest = levels[2] + self._model.no_memory_embedding.reshape(1, -1, 1, 1)
        return decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1]), coarsest

    def decode(self, embedding: tuple[Tensor, ...], boxes: Float[Tensor, "n 4"], best: bool) -> Float[Tensor, "n h w"]:
        """Logits of the boxes of one image."""
        out = self._model(image_embeddings=list(embedding), input_boxes=boxes[None], multimask_output=best)
        return best_of(out.pred_masks[0], out.iou_scores[0])
