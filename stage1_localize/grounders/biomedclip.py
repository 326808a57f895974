"""`biomedclip`: the published way from words to regions, with any CLIP-like model: M2IB saliency, threshold, boxes.

Text and image go through a frozen CLIP; an information bottleneck at a vision layer (`m2ib`) says which tokens carry
what the text says; the map is cut by a threshold, and its largest connected parts are boxes for a segmenter.

What it cannot do: M2IB stretches every map from 0 to 1, so it finds something for any words, there or not. With
``against``, wordings that compete with the one asked, a detection's score is multiplied by the share that the model's
own softmax gives the wording; that share says which of these wordings fits the whole image best and no more: it
depends on the list, and no probability of a finding has been calibrated.

Sources: Mask What Matters (arXiv 2509.23054), MedCLIP-SAMv2; Zhang et al., BiomedCLIP (arXiv 2303.00915).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from shared.config import digest
from shared.errors import ConfigError, PromptError
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.clip_model import load_clip
from stage1_localize.grounders.m2ib import Noise, saliency
from stage1_localize.grounders.saliency_map import box_of, parts, threshold, to_levels, to_map_frame
from stage1_localize.models import ModelOptions, find_model
from stage1_localize.prompts import refuse_wordless

DEFAULT_MODEL = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"

Part = tuple[Float32[np.ndarray, "4"], float, Float32[np.ndarray, "256 256"] | None]
"""Box in px of the image, score, and the map where it is the answer."""


class BiomedClip:
    """Saliency of a text in an image, as boxes or as the map itself."""

    class Options(ModelOptions):
        """Which layer, how strong a bottleneck, and what becomes of the map. Nothing is ever chosen by labels."""

        output: Literal["boxes", "saliency"] = Field(
            "boxes", description="boxes: of connected parts, for a segmenter. saliency: the map itself is the region."
        )
        layer: int = Field(7, ge=0, le=60, description="Vision block, the first is 0, after which the bottleneck sits.")
        beta_milli: int = Field(
            100, ge=1, le=100_000, description="Weight of compression against fit, thousandths; published: 100 to 2000."
        )
        steps: int = Field(10, ge=2, le=1000, description="Losses evaluated of the bottleneck.")
        draws: int = Field(10, ge=1, le=1000, description="Draws of the noise a step, in one batch.")
        seed: int = Field(0, ge=0, le=(1 << 53) - 1, description="Of the noise.")
        threshold: Literal["kmeans", "otsu", "fixed"] = Field(
            "kmeans", description="What is inside: by two means, by Otsu, or above a fixed level."
        )
        level_milli: int = Field(300, ge=0, le=999, description="Level of 'fixed', thousandths of the map's maximum.")
        boxes_max: int = Field(1, ge=1, le=100, description="Largest connected parts that are kept of a wording.")
        area_min_px: int = Field(40, ge=1, description="Smallest part, px of the 256 x 256 map frame.")
        against: tuple[str, ...] = Field(
            (), description="Wordings that compete with the one asked for the image's presence; none: presence is 1."
        )
        presence_min_milli: int = Field(
            0, ge=0, le=1000, description="Least presence for any detection, thousandths; needs 'against'."
        )

    version = 1

    def __init__(self, options: Options) -> None:
        """Load the model.

        Raises:
            ConfigError: A layer the model lacks, or a presence asked without ``against``.
            InputMissingError, CorruptError, IncompatibleError: As `find_model` and `load_clip`.
        """
        if options.presence_min_milli and not options.against:
            raise ConfigError(
                "presence_min_milli: without 'against' every presence is 1", hint="against: [a normal scan, ...]"
            )
        self.options = options.pinned()
        self._clip = load_clip(find_model(options, DEFAULT_MODEL), self.options.device, self.options.dtype)
        last = len(self._clip.blocks) - 2
        if self.options.layer > last:
            raise ConfigError(
                f"layer: {options.layer}, but this model's vision tower has {last + 2} blocks",
                hint=f"0 to {last}: attention must follow the bottleneck, or no patch could matter",
            )
        self._texts: dict[str, Tensor] = {}

    def check(self, regions: Sequence[Region]) -> None:
        """Any words will do that the text tower takes in whole.

        Raises:
            PromptError: A wording of more tokens than the model reads, or without a word.
        """
        asked = [(f"region '{region.name}'", text) for region in regions for text in region.texts]
        for where, text in [*asked, *(("against", text) for text in self.options.against)]:
            refuse_wordless(text, where)
            count = self._clip.count_tokens(text)
            if count > self._clip.context_tokens:
                raise PromptError(
                    f"{where}: '{text[:40]}' has {count} tokens, this model reads {self._clip.context_tokens}",
                    hint="say it shorter; nothing is cut off silently",
                )

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Boxes come without pixels."""
        return self.options.output == "boxes"

    def identity(self) -> dict[str, Any]:
        """Digests of weights, configuration and tokenizer; how pixels and noise are made."""
        return {
            **self._clip.identity,
            "preprocessing": f"longest side {self._clip.size_px} px antialiased bicubic, zeros below and right",
            "saliency": "m2ib, raw features, KL of the last loss; version 1",
            "noise": "stretches of a Philox Box-Muller table, by seed, pixels, step and draw; version 1",
        }

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Find every wording in every image that is not constant.

        An image goes through the lower layers alone and once, whatever the wordings; each wording is optimised
        alone, so that neither other images nor other regions reach its bits.
        """
        below = batch.memo(f"clip below {self._key}", lambda: [self._below(image) for image in batch.images])
        return [
            self._locate(batch, place, tokens, regions) if tokens is not None else Detections.none()
            for place, tokens in enumerate(below)
        ]

    @cached_property
    def _key(self) -> str:
        return digest([self.identity(), self.options])

    @cached_property
    def _noise(self) -> Noise:
        clip = self._clip
        width = clip.stem(self._batch_of_one(torch.zeros(3, clip.size_px, clip.size_px))).shape[-1]
        return Noise(self.options.seed, (clip.grid**2 + 1, width), self.options.device)

    def _batch_of_one(self, pixels: Float[Tensor, "3 s s"]) -> Float[Tensor, "1 3 s s"]:
        return pixels[None].to(self.options.device, getattr(torch, self.options.dtype))

    def _below(self, image: Float32[np.ndarray, "C H W"]) -> Float[Tensor, "T C"] | None:
        """Tokens at the bottleneck; None for a constant image, which holds nothing."""
        if image.min() == image.max():
            return None
        with torch.no_grad():
            return self._clip.below(self._batch_of_one(self._clip.prepare(image)[0]), self.options.layer)[0]

    def _locate(self, batch: Batch, place: int, tokens: Float[Tensor, "T C"], regions: Sequence[Region]) -> Detections:
        image = batch.images[place]
        asked = [(r, t, text) for r, region in enumerate(regions) for t, text in enumerate(region.texts)]
        found: list[tuple[int, int, Part]] = []
        for r, t, text in asked:
            presence = self._presence(tokens, text)
            if presence * 1000 < self.options.presence_min_milli:
                continue
            key = f"m2ib {self._key} {place} {text}"
            frame = batch.memo(key, partial(self._map, image, tokens, text))
            found += [(r, t, part) for part in self._parts(frame, presence, *image.shape[1:])]
        return Detections(
            box_xyxy_px=np.array([box for _, _, (box, _, _) in found], np.float32).reshape(-1, 4),
            score=np.array([score for _, _, (_, score, _) in found], np.float32),
            region=np.array([r for r, _, _ in found], np.int64),
            text=np.array([t for _, t, _ in found], np.int64),
            probability=[own for _, _, (_, _, own) in found],
        )

    def _map(
        self, image: Float32[np.ndarray, "C H W"], tokens: Float[Tensor, "T C"], text: str
    ) -> Float32[np.ndarray, "256 256"]:
        """Saliency of a wording, 0 to 1, map frame."""
        clip, options = self._clip, self.options
        _, rows, columns = clip.prepare(image)
        content = np.ascontiguousarray(image, "<f4")
        pixels_key = int.from_bytes(
            hashlib.sha256(repr(image.shape).encode() + content.tobytes()).digest()[:8], "little"
        )
        dtype = getattr(torch, options.dtype)
        carried = saliency(
            tokens,
            self._embed(text),
            lambda t: clip.above(t.to(dtype), options.layer),
            lambda step: self._noise.draw(pixels_key, step, options.draws),
            beta=options.beta_milli / 1000,
            steps=options.steps,
        )
        grid = carried[1:].reshape(clip.grid, clip.grid).cpu().numpy()
        return to_map_frame(grid, clip.size_px, rows, columns)

    def _parts(self, frame: Float32[np.ndarray, "256 256"], presence: float, height: int, width: int) -> list[Part]:
        """What is above the threshold; a box scores its mean saliency, times the presence."""
        options = self.options
        above = to_levels(frame) > threshold(frame, options.threshold, options.level_milli)
        if options.output == "saliency":
            return [(box_of(above, height, width), presence, frame)] if above.any() else []
        return [
            (box_of(inside, height, width), presence * float(frame[inside].mean(dtype=np.float64)), None)
            for inside in parts(above, options.area_min_px, options.boxes_max)
        ]

    def _presence(self, tokens: Float[Tensor, "T C"], text: str) -> float:
        """Share of the wording among itself and its competitors, by the model's own temperature."""
        others = [other for other in self.options.against if other != text]
        if not others:
            return 1.0
        with torch.no_grad():
            image = self._clip.above(tokens[None], self.options.layer).float()
            cosines = F.cosine_similarity(image, torch.stack([self._embed(each) for each in (text, *others)]))
            return float((cosines * self._clip.logit_scale).softmax(dim=0)[0])

    def _embed(self, text: str) -> Float[Tensor, "D"]:
        if text not in self._texts:
            with torch.no_grad():
                self._texts[text] = self._clip.embed_text(text)
        return self._texts[text]
