"""What the segmenters of the SAM family share: preprocessing, one embedding an image, boxes through the decoder.

Kirillov et al., "Segment anything", ICCV 2023: a heavy encoder runs once an image, a light decoder once a box. Only
the decoder's own low-resolution logits are read (256 x 256 for 1024 px), and resampled to the map frame as logits.

A box's bits do not depend on what else was asked: every decoder call has the same shape (a chunk that is not full is
padded with its first box), and equal boxes of an image are decoded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Self

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from shared.config import digest
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections
from stage1_localize.frames import Frame, letterboxed, squashed, to_map_frame
from stage1_localize.models import ModelOptions

BOXES_BATCH_GPU = 16
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class SamOptions(ModelOptions):
    """How a model of the family is asked."""

    multimask: Literal["single", "best"] = Field(
        "single",
        description="Of the decoder's answers: the single mask (a box says which object is meant, as the paper has "
        "it), or of the three for ambiguous prompts the one with the best predicted IoU.",
    )
    boxes_batch: Annotated[int, Field(ge=1, le=256)] | Literal["auto"] = Field(
        "auto", description="Boxes a decoder call; auto: 1 on a CPU, where more gain nothing, 16 on cuda."
    )
    images_batch: int = Field(1, ge=1, le=64, description="Images an encoder call; more than 1 pays on cuda only.")

    def pinned(self) -> Self:
        """With device, dtype and boxes_batch decided.

        Raises:
            ConfigError: ``cuda`` is asked and there is none.
        """
        known = super().pinned()
        if known.boxes_batch != "auto":
            return known
        return known.model_copy(update={"boxes_batch": BOXES_BATCH_GPU if known.device == "cuda" else 1})


class MedSamOptions(SamOptions):
    """Of a model that may be MedSAM, which is SAM's network and another preprocessing."""

    preprocessing: Literal["sam", "medsam"] = Field(
        "sam",
        description="sam: longest side to the input's, normalised as in training; medsam: squashed to the square, "
        "each image's own minimum and maximum to 0 and 1, as MedSAM's release does.",
    )


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the model's input.

    Attributes:
        size_px: Side of the square input.
        fit: ``letterbox`` (longest side fills, zeros below and right after normalising) or ``squash``.
        mean: Of each channel, for values in [0, 1].
        std: Likewise.
        stretch: First bring each image's own minimum and maximum to 0 and 1.
        mode: Interpolation, antialiased.
    """

    size_px: int
    fit: Literal["letterbox", "squash"]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stretch: bool = False
    mode: Literal["bilinear", "bicubic"] = "bilinear"

    def __str__(self) -> str:
        return (
            f"{self.fit} {self.size_px} px, {self.mode} antialiased by torch in float32, never rounded to 8 bit; "
            f"{'min-max, ' if self.stretch else ''}mean {' '.join(map(str, self.mean))}, "
            f"std {' '.join(map(str, self.std))}; version 1"
        )

    def frame(self, image: Float32[np.ndarray, "C H W"]) -> Frame:
        """Where the image lies in the input."""
        return (letterboxed if self.fit == "letterbox" else squashed)(image.shape[1], image.shape[2], self.size_px)


def medsam_preprocessing(size_px: int) -> Preprocessing:
    """As MedSAM's release has it (Ma et al., Nature Communications 15, 2024)."""
    return Preprocessing(size_px, "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), stretch=True, mode="bicubic")


class SamNetwork(Protocol):
    """A model of the family, loaded and on its device."""

    device: str

    def encode(self, pixels: Float[Tensor, "B 3 s s"]) -> tuple[Tensor, ...]:
        """Embedding of each image, and what else the decoder wants of it, each [B, ...]."""
        ...

    def decode(self, embedding: tuple[Tensor, ...], boxes: Float[Tensor, "n 4"], best: bool) -> Float[Tensor, "n h w"]:
        """Float32 low-resolution logits of boxes (px of the square input) in one image; each of ``embedding`` [1, ...].

        With ``best`` the answer of the best predicted IoU among those for ambiguous prompts, else the single one.
        """
        ...


class SamSegmenter:
    """What every segmenter of the family does once its network is there.

    Args:
        network: On its device.
        how: Preprocessing.
        options: Pinned.
        weights: What pins the weights, from `weights_identity`.
    """

    def __init__(
        self, network: SamNetwork, how: Preprocessing, options: SamOptions, weights: Mapping[str, Any]
    ) -> None:
        self._network, self._how, self._options = network, how, options
        self._identity = {**weights, **describe(how, options)}
        self._key = f"{type(self).__name__} {digest(self._identity)}"

    def identity(self) -> dict[str, Any]:
        """Digests of weights and configuration, preprocessing, numeric settings."""
        return dict(self._identity)

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[Float32[np.ndarray, "n 256 256"]]:
        """Probability of each detection's pixels in the map frame."""
        return segment(self._network, self._how, self._options, self._key, batch, detections)


def prepare(image: Float32[np.ndarray, "C H W"], how: Preprocessing) -> Float32[Tensor, "3 s s"]:
    """Resize, normalise and pad one image of values in [0, 1]; grey is repeated to three channels."""
    frame = how.frame(image)
    pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None]
    if image.shape[1:] != (frame.height_px, frame.width_px):
        size = (frame.height_px, frame.width_px)
        pixels = F.interpolate(pixels, size, mode=how.mode, align_corners=False, antialias=True)
        pixels = pixels.clamp(0, 1)  # bicubic overshoots
    if how.stretch:
        # A constant image is constant before resizing: the rounding of its weights is not to be stretched.
        blank = bool((image == image[:, :1, :1]).all())
        low, high = pixels.min(), pixels.max()
        pixels = torch.zeros_like(pixels) if blank or high <= low else (pixels - low) / (high - low)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (how.mean, how.std))
    normalised = (pixels[0].expand(3, -1, -1) - mean) / std
    return F.pad(normalised, (0, frame.size_px - frame.width_px, 0, frame.size_px - frame.height_px))


def embed(
    network: SamNetwork, how: Preprocessing, images_batch: int, key: str, batch: Batch, places: Sequence[int]
) -> dict[int, tuple[Tensor, ...]]:
    """Embeddings of some images of a batch, each computed once a batch however often it is asked.

    Args:
        network: Encoder.
        how: Preprocessing.
        images_batch: Images a call; a call that is not full is padded with blank input.
        key: Digest of weights, preprocessing and numeric settings.
        batch: Images.
        places: Which of them are needed; others may be in the answer too.

    Returns:
        Place -> what `SamNetwork.encode` says, each [1, ...].
    """
    known: dict[int, tuple[Tensor, ...]] = batch.memo(key, dict)
    wanted = [place for place in places if place not in known]
    for start in range(0, len(wanted), images_batch):
        chosen = wanted[start : start + images_batch]
        pixels = torch.zeros(images_batch, 3, how.size_px, how.size_px)
        for slot, place in enumerate(chosen):
            pixels[slot] = prepare(batch.images[place], how)
        with torch.inference_mode():
            made = network.encode(pixels.to(network.device))
        for slot, place in enumerate(chosen):
            known[place] = tuple(each[slot : slot + 1] for each in made)
    return known


def segment(
    network: SamNetwork,
    how: Preprocessing,
    options: SamOptions,
    key: str,
    batch: Batch,
    detections: Sequence[Detections],
) -> list[Float32[np.ndarray, "n 256 256"]]:
    """Probability of each detection's pixels in the map frame; images without boxes are not encoded.

    Args:
        network: Encoder and decoder.
        how: Preprocessing.
        options: Pinned.
        key: As for `embed`.
        batch: Images.
        detections: One an image.
    """
    embedded = embed(
        network, how, options.images_batch, key, batch, [i for i, each in enumerate(detections) if len(each)]
    )
    answers = []
    for place, found in enumerate(detections):
        if not len(found):
            answers.append(np.zeros((0, MAP_SIZE_PX, MAP_SIZE_PX), np.float32))
            continue
        frame = how.frame(batch.images[place])
        answers.append(_segment(network, options, embedded[place], frame, found.box_xyxy_px))
    return answers


def _segment(
    network: SamNetwork,
    options: SamOptions,
    embedding: tuple[Tensor, ...],
    frame: Frame,
    box_xyxy_px: Float32[np.ndarray, "n 4"],
) -> Float32[np.ndarray, "n 256 256"]:
    assert options.boxes_batch != "auto"
    size = options.boxes_batch
    different, which = np.unique(frame.to_input(box_xyxy_px), axis=0, return_inverse=True)
    maps = []
    for start in range(0, len(different), size):
        chosen = different[start : start + size]
        full = np.concatenate([chosen, np.repeat(chosen[:1], size - len(chosen), axis=0)])
        with torch.inference_mode():
            logits = network.decode(embedding, torch.from_numpy(full).to(network.device), options.multimask == "best")
            # Box by box: vector instructions may round the end of a row otherwise than its middle.
            maps += [to_map_frame(each[None], frame)[0].sigmoid().cpu().numpy() for each in logits[: len(chosen)]]
    return np.stack(maps)[which.reshape(-1)]


def best_of(logits: Float[Tensor, "n m h w"], iou: Float[Tensor, "n m"]) -> Float[Tensor, "n h w"]:
    """Of the m answers to each box the one of the best predicted IoU; the first of equals."""
    return logits[torch.arange(len(logits), device=logits.device), iou.argmax(dim=1)].float()


def describe(how: Preprocessing, options: SamOptions) -> dict[str, Any]:
    """Preprocessing and numeric settings of the encoder, for an identity."""
    return {
        "preprocessing": str(how),
        "numeric": f"torch {options.device}: encoder {options.dtype}, {options.images_batch} images a call; "
        f"prompts and decoder float32; logits resampled, then sigmoid",
    }
