"""`lite`: the embedded text-prompted grounder. A closed vocabulary of concepts with synonyms, for grey and colour 2D.

A small head (`lite_head`) reads the LiteMedSAM embedding of an image together with the words. Each concept has a
route, chosen when the head was fitted and written in the weights' card:

- ``mask``: the head's own probability map is the answer;
- ``component``: each connected part of that map gives a box for the segmenter;
- ``centre``: peaks of the centre map give boxes for the segmenter (touching cells would merge as components).

Not open grounding: a wording far from the vocabulary is refused by name. Research use, not for diagnosis.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field
from safetensors.torch import load as load_safetensors
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from shared.config import Strict
from shared.errors import CorruptError, PromptError
from stage1_localize.boxes import overlaps
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.lite_head import CELLS, Answer, Features, LiteHead
from stage1_localize.grounders.lite_text import MODEL_SHA256, Vocabulary, encode_text
from stage1_localize.segmenters.lite_medsam import IDENTITY as ENCODER_IDENTITY
from stage1_localize.segmenters.lite_medsam import INPUT_SIZE_PX, Encoded, encode, letterbox, to_map_frame

CELL_PX = INPUT_SIZE_PX // CELLS
OVERLAP_MAX = 0.5
"""Of two centre boxes that overlap more (IoU), the lower score goes."""


class Concept(Strict):
    """How one concept of the vocabulary is answered; part of the weights' card."""

    wordings: tuple[str, ...] = Field(description="Strings that mean it.")
    route: str = Field(pattern="^(mask|component|centre)$", description="mask, component or centre.")
    presence_min_milli: int = Field(500, ge=0, le=1000, description="Below this presence it is not there.")
    area_min_px: int = Field(24, ge=1, description="Smaller parts are dropped, px of the 256 px padded input.")
    margin_px: int = Field(0, ge=0, description="Added to each side of a component box, px of the padded input.")
    centre_min_milli: int = Field(300, ge=1, le=999, description="Peaks below this are dropped; it maps to score .5.")


class Card(Strict):
    """The weights' card: what they know, how it is answered, and what they were fitted on."""

    name: str
    weights_sha256: str
    not_for_diagnosis: str
    concepts: dict[str, Concept]
    foreign: tuple[str, ...] = Field(description="Strings known to mean something else.")
    data: dict[str, str] = Field(description="Training source -> what it is and its terms.")
    fit: dict[str, Any] = Field(description="Settings, seed and software.")
    scores: dict[str, Any] = Field(description="On held-out parts, with 95 % intervals.")


Part = tuple[Float32[np.ndarray, "4"], float, Float32[np.ndarray, "256 256"] | None]
"""Box in px of the image as given, score, and the map where the head gives it."""


@dataclass(frozen=True)
class _Asked:
    region: int
    text: int
    known: str
    concept: Concept


class Lite:
    """Finds the regions of a closed vocabulary by text, in one encoder pass an image."""

    class Options(Strict):
        """There is nothing to set: thresholds belong to the weights."""

    version = 1

    def __init__(self, options: Options, parts: tuple[Card, LiteHead] | None = None) -> None:
        """Load the packaged weights, or take a card and head that were just fitted."""
        del options
        self._card, self._head = parts or load_packaged()
        self._vocabulary = Vocabulary(
            {name: concept.wordings for name, concept in self._card.concepts.items()}, self._card.foreign
        )
        self._vectors: dict[str, Tensor] = {}

    def check(self, regions: Sequence[Region]) -> None:
        """Accept wordings that are known, or near a known one.

        Raises:
            PromptError: A wording that is empty or outside the vocabulary.
        """
        self._resolve(regions)

    def needs_segmenter(self, regions: Sequence[Region]) -> bool:
        """Whether any of these regions comes without pixels."""
        return any(asked.concept.route != "mask" for asked in self._resolve(regions))

    def identity(self) -> dict[str, Any]:
        """Digests of head, text model and encoder; thresholds are in the card, which the digest covers."""
        card = json.dumps(self._card.model_dump(mode="json", include={"concepts", "foreign"}), sort_keys=True)
        return {
            "head_sha256": self._card.weights_sha256,
            "card_sha256": hashlib.sha256(card.encode()).hexdigest(),
            "text_sha256": MODEL_SHA256,
            "encoder": dict(ENCODER_IDENTITY),
        }

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Find every wording in every image.

        Each wording is asked alone over the image's shared features: other regions cannot change its bits.

        Returns:
            Detections with ``probability`` for concepts of route ``mask``, boxes alone for the others; their
            score is the head's own confidence.

        Raises:
            PromptError: A wording outside the vocabulary.
        """
        resolved = self._resolve(regions)
        features = batch.memo(f"lite {self._card.weights_sha256}", lambda: self._look(batch))
        return [
            Detections.none() if seen is None else self._locate(seen, encoded, resolved)
            for seen, encoded in zip(features, encode(batch), strict=True)
        ]

    def _look(self, batch: Batch) -> list[Features | None]:
        """Features of every image; None for a constant one, which holds nothing."""
        pixels = [letterbox(image)[0] for image in batch.images]
        with torch.inference_mode():
            return [
                self._head.look(encoded.embedding[None], seen[None]) if seen.any() else None
                for encoded, seen in zip(encode(batch), pixels, strict=True)
            ]

    def _locate(self, seen: Features, encoded: Encoded, resolved: Sequence[_Asked]) -> Detections:
        found: list[tuple[_Asked, Part]] = []
        with torch.inference_mode():
            for asked in resolved:
                answer = self._ask(seen, asked.known)
                found += [(asked, part) for part in answer_parts(answer, asked.concept, encoded)]
        if not found:
            return Detections.none()
        return Detections(
            box_xyxy_px=np.stack([box for _, (box, _, _) in found]).astype(np.float32),
            score=np.array([score for _, (_, score, _) in found], np.float32),
            region=np.array([asked.region for asked, _ in found], np.int64),
            text=np.array([asked.text for asked, _ in found], np.int64),
            probability=[probability for _, (_, _, probability) in found],
        )

    def _ask(self, seen: Features, known: str) -> Answer:
        if known not in self._vectors:
            self._vectors[known] = torch.from_numpy(encode_text(known).copy())
        tokens = self._vectors[known][None, None]
        return self._head.ask(seen, tokens, torch.ones(tokens.shape[:3], dtype=torch.bool))

    def _resolve(self, regions: Sequence[Region]) -> list[_Asked]:
        asked = []
        for r, region in enumerate(regions):
            for t, text in enumerate(region.texts):
                known = self._vocabulary.snap(text).known if text.strip() else None
                if known is None:
                    what = f"'{text}' is not in this head's vocabulary" if text.strip() else "empty wording"
                    raise PromptError(
                        f"region '{region.name}': {what} (grounder 'lite')",
                        hint=f"it knows {', '.join(self._card.concepts)}, and near synonyms of these",
                    )
                asked.append(_Asked(r, t, known, self._card.concepts[self._vocabulary.concept_of[known]]))
        return asked


def answer_parts(answer: Answer, concept: Concept, image: Encoded) -> list[Part]:
    """Turn the head's answer to one prompt about one image into parts, by the concept's route.

    Returns:
        Nothing where the concept is not present, or too small.
    """
    presence = float(answer.presence.sigmoid())
    if presence * 1000 < concept.presence_min_milli:
        return []
    if concept.route == "centre":
        return centre_boxes(answer, concept, image)
    logits = F.interpolate(answer.mask, (INPUT_SIZE_PX, INPUT_SIZE_PX), mode="bilinear", align_corners=False)[0, 0]
    filled = logits[: image.height_px, : image.width_px].sigmoid().numpy()
    if int((filled > 0.5).sum()) < concept.area_min_px:
        return []
    if concept.route == "component":
        return component_boxes(filled, presence, concept, image)
    return [(_to_image(_extent(filled > 0.5), image), presence, to_map_frame(logits.sigmoid(), image))]


def _extent(inside: np.ndarray) -> tuple[int, int, int, int]:
    """The box around the parts that hold a tenth of the whole or more: specks must not widen it."""
    labels, count = ndimage.label(inside)
    areas = ndimage.sum_labels(inside, labels, np.arange(count + 1))
    rows, columns = np.nonzero((areas >= inside.sum() / 10)[labels] & inside)
    if not len(rows):
        rows, columns = np.nonzero(inside)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def component_boxes(
    filled: Float32[np.ndarray, "h w"], presence: float, concept: Concept, image: Encoded
) -> list[Part]:
    """A box around every connected part above .5; its score is its mean probability, at most the presence."""
    labels, _ = ndimage.label(filled > 0.5)
    parts: list[Part] = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == number
        if int(inside.sum()) < concept.area_min_px:
            continue
        margin = concept.margin_px
        box = [columns.start - margin, rows.start - margin, columns.stop + margin, rows.stop + margin]
        score = min(presence, float(filled[rows, columns][inside].mean()))
        parts.append((_to_image(box, image), score, None))
    return parts


def centre_boxes(answer: Answer, concept: Concept, image: Encoded) -> list[Part]:
    """A box at every peak of the centre map, the better one of two that overlap.

    The score is shifted in logits so that the card's threshold becomes .5: a kept box is more likely than not.
    """
    heat = answer.centre[0, 0].sigmoid()
    peak = heat == F.max_pool2d(heat[None, None], 3, 1, 1)[0, 0]
    threshold = concept.centre_min_milli / 1000
    rows, columns = (index.numpy() for index in torch.nonzero(peak & (heat >= threshold), as_tuple=True))
    if not len(rows):
        return []
    shifted = torch.logit(heat[rows, columns], eps=1e-6) - np.log(threshold / (1 - threshold))
    scores = shifted.sigmoid().numpy()
    x, y = _refined(heat.numpy(), rows, columns)
    width, height = answer.log_size[0][:, rows, columns].clamp(-2, np.log(CELLS)).exp().numpy()
    boxes = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1) * CELL_PX
    inside = (x * CELL_PX < image.width_px) & (y * CELL_PX < image.height_px)
    parts: list[Part] = []
    taken = np.zeros((0, 4))
    for i in np.argsort(-scores, kind="stable"):
        box = _to_image(boxes[i], image)
        if inside[i] and (overlaps(box[None], taken) <= OVERLAP_MAX).all():
            parts.append((box, float(scores[i]), None))
            taken = np.vstack([taken, box])
    return parts


def _refined(heat: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres in cells: the centroid of the 3 x 3 cells around each peak."""
    padded = np.pad(heat, 1)
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    around = np.stack([padded[rows + 1 + dy, columns + 1 + dx] for dy, dx in offsets])
    dy, dx = (np.array(offsets).T[:, :, None] * around).sum(axis=1) / around.sum(axis=0)
    return columns + 0.5 + dx, rows + 0.5 + dy


def _to_image(box_xyxy: Any, image: Encoded) -> Float32[np.ndarray, "4"]:
    """From px of the padded input to px of the image, inside it and at least one input px wide."""
    x0, y0, x1, y1 = (float(value) for value in box_xyxy)
    x0, y0 = np.clip(x0, 0, image.width_px - 1), np.clip(y0, 0, image.height_px - 1)
    x1, y1 = np.clip(x1, x0 + 1, image.width_px), np.clip(y1, y0 + 1, image.height_px)
    box = np.array([x0, y0, x1, y1]) / np.tile(image.scale_xy, 2)
    limit = np.tile([image.width_image_px, image.height_image_px], 2)
    return np.minimum(box, limit).astype(np.float32)


@cache
def load_packaged() -> tuple[Card, LiteHead]:
    """The shipped card and head.

    Raises:
        CorruptError: The weights are not those of the card.
    """
    folder = importlib.resources.files("stage1_localize").joinpath("weights")
    card = Card.model_validate_json(folder.joinpath("lite.json").read_text(encoding="utf-8"))
    raw = folder.joinpath("lite.safetensors").read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != card.weights_sha256:
        raise CorruptError(
            f"weights lite.safetensors: sha256 {found[:12]}, the card says {card.weights_sha256[:12]}",
            hint="reinstall mask-what-matters",
        )
    return card, build_head(load_safetensors(raw))


def build_head(state: dict[str, Tensor]) -> LiteHead:
    """A head in evaluation mode with these weights."""
    head = LiteHead()
    head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return head.eval().requires_grad_(False)
