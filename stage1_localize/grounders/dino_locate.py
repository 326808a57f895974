"""What both GroundingDINO grounders share: options, the loop over images and prompts, and boxes out of raw answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from pydantic import Field
from torch import Tensor

from shared.config import digest
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.dino_images import Preprocessing, gather
from stage1_localize.grounders.dino_words import Prompt, build_prompts
from stage1_localize.models import ModelOptions

TOKENS_MAX = 256
"""Columns of the models' answers: no prompt may be longer."""
SIDE_MIN_PX = 1 / 16
"""The store keeps boxes in 1/16 px; a thinner box would be empty there."""


class DinoOptions(ModelOptions):
    """How images and words are put to a GroundingDINO."""

    box_min_milli: int = Field(
        250, ge=1, le=1000, description="Weakest box: score of its best wording in the prompt, thousandths."
    )
    text_min_milli: int = Field(
        250, ge=1, le=1000, description="Weakest tie of a wording to a box, thousandths; matters where joint."
    )
    # 480 is the smallest side that the published models saw in training (480 to 800), and medical images are rarely
    # larger than 512 px: the published 800 would cost twice the time for pixels that are not there.
    size_px: int = Field(
        480, ge=32, le=2048, description="Shortest side that the model sees, px; the longest at most 1.67 times it."
    )
    joint: bool = Field(
        False,
        description="All wordings in one prompt, as published: one pass an image, not one a wording; regions interact.",
    )
    boxes_max: int = Field(10, ge=1, le=900, description="Strongest boxes that are kept of a wording in an image.")
    batch: int | Literal["auto"] = Field(
        "auto", description="Images of one size a model call; auto: 1 on a CPU (exact), 8 on cuda."
    )

    def pinned(self) -> Self:
        """With device, dtype and batch decided."""
        options = super().pinned()
        batch = (8 if options.device == "cuda" else 1) if self.batch == "auto" else self.batch
        return options.model_copy(update={"batch": batch})


class Network(Protocol):
    """A GroundingDINO whose image side is run apart from its prompts.

    Attributes:
        strides: Of its feature levels, px.
        num_queries: Boxes that it answers with.
        device: Where it computes.
    """

    strides: tuple[int, ...]
    num_queries: int
    device: str

    def see(self, pixels: Float[Tensor, "B 3 H W"]) -> Any:
        """Everything about the images that no word changes."""
        ...

    def ask(self, seen: Any, prompt: Prompt) -> tuple[Float[Tensor, "B Q T"], Float[Tensor, "B Q 4"]]:
        """Logits of each query for each token, and boxes (centre, size) as shares of the image's sides."""
        ...


class DinoGrounder:
    """What both grounders do once their model is there; their ``__init__`` fills the attributes.

    Attributes:
        options: Pinned.
    """

    options: DinoOptions
    _identity: dict[str, Any]
    _network: Network
    _how: Preprocessing
    _tokenizer: Any
    _tokens_max: int

    def check(self, regions: Sequence[Region]) -> None:
        """Accept any words that the text encoder can read.

        Raises:
            PromptError: As `build_prompts`.
        """
        self._prompts(regions)

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Boxes only."""
        return bool(regions)

    def identity(self) -> dict[str, Any]:
        """Digests of weights, configuration and vocabulary; preprocessing; whether regions change each other."""
        return self._identity

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Boxes of every wording in every image, each wording asked alone unless ``joint``."""
        key = f"{type(self).__name__} {digest({'is': self._identity, 'batch': self.options.batch})}"
        return locate(self._network, self._prompts(regions), self._how, self.options, batch, key)

    def _prompts(self, regions: Sequence[Region]) -> list[Prompt]:
        return build_prompts(self._tokenizer, regions, joint=self.options.joint, tokens_max=self._tokens_max)


@dataclass(frozen=True)
class _Seen:
    places: tuple[int, ...]
    features: Any


def locate(
    network: Network, prompts: Sequence[Prompt], how: Preprocessing, options: DinoOptions, batch: Batch, key: str
) -> list[Detections]:
    """Put every prompt to every image; the image side runs once a batch, whatever is asked of it.

    With one image a call an answer depends on its image alone, to the bit. With more, calls hold the images of one
    size in the batch's order, and neighbours move an answer's last bits (scores by 1e-5 in float32).

    Args:
        network: Any GroundingDINO.
        prompts: From `build_prompts`.
        how: Preprocessing.
        options: Pinned.
        batch: Images; a constant one holds nothing.
        key: Digest of all that decides what is seen, for the batch's memo.
    """
    found: list[list[_Found]] = [[] for _ in batch.images]
    with torch.inference_mode():
        for seen in batch.memo(key, lambda: _see(network, how, options, batch)):
            for prompt in prompts:
                logits, boxes = network.ask(seen.features, prompt)
                answers = zip(seen.places, logits.float().cpu(), boxes.float().cpu(), strict=True)
                for place, token_logits, box_cxcywh in answers:
                    _, height, width = batch.images[place].shape
                    found[place] += read_answer(token_logits, box_cxcywh, prompt, options, height, width)
    return [_detections(each) for each in found]


def _see(network: Network, how: Preprocessing, options: DinoOptions, batch: Batch) -> list[_Seen]:
    assert isinstance(options.batch, int)
    calls = gather(batch.images, how, batch=options.batch, strides=network.strides, cells_min=network.num_queries)
    return [_Seen(call.places, network.see(call.pixels.to(network.device))) for call in calls]


_Found = tuple[Float32[np.ndarray, "n 4"], Float32[np.ndarray, "n"], int, int]
"""Boxes in px of the image, their scores, region and wording."""


def read_answer(
    logits: Float32[Tensor, "Q T"],
    box_cxcywh: Float32[Tensor, "Q 4"],
    prompt: Prompt,
    options: DinoOptions,
    height: int,
    width: int,
) -> list[_Found]:
    """Boxes of each wording of a prompt in one image, the strongest first.

    A wording's score is its best token's; delimiters have none. A box is kept if its best wording reaches
    ``box_min_milli``, and given to each wording that reaches ``text_min_milli``, with that wording's score.
    """
    scores = {span: logits[:, span.start : span.stop].amax(dim=1).sigmoid().numpy() for span in prompt.spans}
    best = np.max(list(scores.values()), axis=0)
    boxes, whole = _to_image(box_cxcywh.numpy().astype(np.float64), height, width)
    kept = whole & (best * 1000 >= options.box_min_milli)
    result: list[_Found] = []
    for span, score in scores.items():
        (chosen,) = np.nonzero(kept & (score * 1000 >= options.text_min_milli))
        chosen = chosen[np.argsort(-score[chosen], kind="stable")][: options.boxes_max]
        result.append((boxes[chosen], score[chosen], span.region, span.text))
    return result


def _to_image(
    box_cxcywh: np.ndarray, height: int, width: int
) -> tuple[Float32[np.ndarray, "Q 4"], Bool[np.ndarray, "Q"]]:
    """Corners in px, clipped to the image, and which of them still hold something."""
    centre, half = box_cxcywh[:, :2], box_cxcywh[:, 2:] / 2
    corners = np.clip(np.concatenate([centre - half, centre + half], axis=1), 0, 1)
    boxes = (corners * [width, height, width, height]).astype(np.float32)
    return boxes, (boxes[:, 2:] - boxes[:, :2] >= SIDE_MIN_PX).all(axis=1)


def _detections(found: Sequence[_Found]) -> Detections:
    found = sorted(found, key=lambda each: each[2:])  # by region and wording, whatever was asked first
    counts = [len(scores) for _, scores, _, _ in found]
    if not sum(counts):
        return Detections.none()
    return Detections(
        box_xyxy_px=np.concatenate([boxes for boxes, _, _, _ in found]),
        score=np.concatenate([scores for _, scores, _, _ in found]),
        region=np.repeat(np.array([region for _, _, region, _ in found], np.int64), counts),
        text=np.repeat(np.array([text for _, _, _, text in found], np.int64), counts),
        probability=[None] * sum(counts),
    )
