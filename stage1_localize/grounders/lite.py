"""`lite`: the embedded text-prompted grounder. A closed vocabulary of concepts with synonyms, for grey and colour 2D.

A small head (`lite_head`) reads the LiteMedSAM embedding of an image together with the words. Each concept has a
route, chosen when the head was fitted and written in the weights' card:

- ``mask``: the head's own probability map is the answer;
- ``component``: each connected part of that map gives a box for the segmenter;
- ``centre``: peaks of the centre map give boxes for the segmenter (touching cells would merge as components).

Not open grounding: a wording far from the vocabulary is refused by name. Research use, not for diagnosis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import Field, model_validator
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from shared.artifact import Input
from shared.config import Strict, runtime
from shared.errors import PromptError
from stage1_localize.boxes import overlaps
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.lite_card import Concept, Head, load_packaged, open_folds, open_head
from stage1_localize.grounders.lite_head import CELLS, Answer, Features
from stage1_localize.grounders.lite_text import MODEL_SHA256, Vocabulary, encode_text
from stage1_localize.segmenters.lite_medsam import INPUT_SIZE_PX, Encoded, encode, encoder_key, letterbox, to_map_frame
from stage1_localize.segmenters.lite_medsam_engines import Engine, identity_of, load_model

CELL_PX = INPUT_SIZE_PX // CELLS
OVERLAP_MAX = 0.5
"""Of two centre boxes that overlap more (IoU), the lower score goes."""


Part = tuple[Float32[np.ndarray, "4"], float, Float32[np.ndarray, "256 256"] | None]
"""Box in px of the image as given, score, and the map where the head gives it."""


@dataclass(frozen=True)
class _Asked:
    region: int
    text: int
    known: str
    concept: str


class Lite:
    """Finds the regions of a closed vocabulary by text, in one encoder pass an image."""

    class Options(Strict):
        """Which head answers, on which engine; thresholds belong to its weights."""

        engine: Engine = Field(
            "onnxruntime", description="What computes the encoder; a segmenter lite_medsam on the same one shares it."
        )

        # Neither is part of the options' identity: the artifact's id is an input of the store, digests of the head, and
        # of folds where they answer, are the part's own.
        head: str | None = runtime(
            None, "Head artifact of mwm fit-grounder, PATH or PATH@sha256:... to pin it; none: the packaged head."
        )
        cross_fitted: bool = runtime(
            False,
            "Localise the images that the head was fitted on: each is answered by the head of the fold that never saw "
            "its group. Other images are refused.",
        )

        @model_validator(mode="after")
        def _of_a_head(self) -> Lite.Options:
            if self.cross_fitted and self.head is None:
                raise ValueError("cross_fitted: expected a 'head' of mwm fit-grounder beside it")
            return self

        def pinned(self) -> Lite.Options:
            """With the head's digest spelled out, as ``resolved.yaml`` keeps it."""
            if self.head is None:
                return self
            origin = open_head(self.head).origin
            assert origin is not None
            return self.model_copy(update={"head": f"{_path(self.head)}@sha256:{origin.artifact_id}"})

        def anywhere(self) -> Lite.Options:
            """With a path that a worker finds whatever its folder."""
            if self.head is None:
                return self
            place = f"{Path(_path(self.head)).absolute()}{self.head[len(_path(self.head)) :]}"
            return self.model_copy(update={"head": place})

    version = 2

    def __init__(self, options: Options, head: Head | None = None) -> None:
        """Load the packaged head or the one that is named, or take one that was just fitted.

        Raises:
            CorruptError, IncompatibleError, InputMissingError, LockedError: As `open_head`.
        """
        self._engine: Engine = options.engine
        self._folds = open_folds(str(options.head)) if options.cross_fitted else None
        if self._folds is not None:
            head = self._folds.whole
        elif head is None:
            head = load_packaged() if options.head is None else open_head(options.head)
        self._whole, self._card, self._origin = head, head.card, head.origin
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
        heads = (self._whole,) if self._folds is None else self._folds.heads.values()
        asked = self._resolve(regions)
        return any(head.card.concepts[one.concept].route != "mask" for head in heads for one in asked)

    def identity(self) -> dict[str, Any]:
        """Digests of head, text model, encoder, and folds where they answer; a card's thresholds are in its digest."""
        return {
            "head_sha256": self._card.weights_sha256,
            "card_sha256": self._card.rules_sha256,
            "text_sha256": MODEL_SHA256,
            "encoder": dict(identity_of(self._engine)),
            **({} if self._folds is None else {"cross_fitted": self._folds.digest}),
        }

    def inputs(self) -> list[Input]:
        """Artifacts that answers come from: the head, unless it is the packaged one."""
        return [] if self._origin is None else [self._origin]

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """Find every wording in every image.

        Each wording is asked alone over the image's shared features: other regions cannot change its bits.

        Returns:
            Detections with ``probability`` for concepts of route ``mask``, boxes alone for the others; their
            score is the head's own confidence.

        Raises:
            PromptError: A wording outside the vocabulary.
            UsageError: Cross-fitted, an image that the head was not fitted on, or other pixels under its id.
        """
        resolved = self._resolve(regions)
        heads = self._heads(batch)
        key = f"lite {self._card.weights_sha256} {self._folds and self._folds.digest} {encoder_key(self._engine)}"
        features = batch.memo(key, lambda: self._look(batch, heads))
        return [
            Detections.none() if seen is None else self._locate(head, seen, encoded, resolved)
            for head, seen, encoded in zip(heads, features, encode(batch, load_model(self._engine)), strict=True)
        ]

    def _heads(self, batch: Batch) -> list[Head]:
        """Who answers each image; a blank one has no name, and whoever answers it finds nothing."""
        if self._folds is None:
            return [self._whole] * len(batch)
        return [
            self._folds.head_of(name, image) if name else self._whole
            for name, image in zip(batch.sample_ids, batch.images, strict=True)
        ]

    def _look(self, batch: Batch, heads: Sequence[Head]) -> list[Features | None]:
        """Features of every image; None for a constant one, which holds nothing."""
        pixels = [letterbox(image)[0] for image in batch.images]
        with torch.inference_mode():
            return [
                head.network.look(encoded.embedding[None], seen[None]) if seen.any() else None
                for head, encoded, seen in zip(heads, encode(batch, load_model(self._engine)), pixels, strict=True)
            ]

    def _locate(self, head: Head, seen: Features, encoded: Encoded, resolved: Sequence[_Asked]) -> Detections:
        found: list[tuple[_Asked, Part]] = []
        with torch.inference_mode():
            for asked in resolved:
                answer = self._ask(head, seen, asked.known)
                concept = head.card.concepts[asked.concept]
                found += [(asked, part) for part in answer_parts(answer, concept, encoded)]
        if not found:
            return Detections.none()
        return Detections(
            box_xyxy_px=np.stack([box for _, (box, _, _) in found]).astype(np.float32),
            score=np.array([score for _, (_, score, _) in found], np.float32),
            region=np.array([asked.region for asked, _ in found], np.int64),
            text=np.array([asked.text for asked, _ in found], np.int64),
            probability=[probability for _, (_, _, probability) in found],
        )

    def _ask(self, head: Head, seen: Features, known: str) -> Answer:
        if known not in self._vectors:
            self._vectors[known] = torch.from_numpy(encode_text(known).copy())
        tokens = self._vectors[known][None, None]
        return head.network.ask(seen, tokens, torch.ones(tokens.shape[:3], dtype=torch.bool))

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
                asked.append(_Asked(r, t, known, self._vocabulary.concept_of[known]))
        return asked


def _path(reference: str) -> str:
    return reference.partition("@sha256:")[0]


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
