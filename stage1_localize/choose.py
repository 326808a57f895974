"""Choose how each region of a new head is answered: candidates are tried on images that its fit never saw.

Of every candidate and image it is kept what was found. The choice is made on all of it; the scores are those of
rules that were chosen on other images. (The heads that those were tried on did learn from the measured ones.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections
from stage1_localize.evaluate import Case, Tally, dice, match, summarise
from stage1_localize.fuse import fuse
from stage1_localize.grounders.lite import Part, answer_parts
from stage1_localize.grounders.lite_card import Concept
from stage1_localize.grounders.lite_head import LiteHead
from stage1_localize.grounders.lite_text import encode_text
from stage1_localize.segmenters.lite_medsam import LiteMedSam, encode, letterbox
from stage1_localize.segmenters.lite_medsam_engines import load_model

VERSION = 1
"""Raised when equal answers lead to other choices; part of every head's specification."""
PRESENCES_MILLI = (300, 500, 700, 900)
CENTRES_MILLI = (150, 200, 250, 300, 350, 400, 500)
AREAS_PX = (24, 100)
MARGINS_PX = (0, 2)


@dataclass(frozen=True)
class Try:
    """What one candidate found in one image of one region.

    Attributes:
        group: Of the image.
        fold: That the image was held out in.
        hits: True boxes found at IoU .5.
        found: Boxes given.
        true: True boxes; 0 where the region is absent.
        dice: Of the region's map cut at .5, where it is there and has outlines.
    """

    group: str
    fold: int
    hits: int
    found: int
    true: int
    dice: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


Tries = list[list[Try]]
"""An entry an image: a try a candidate."""


def candidates(wordings: tuple[str, ...], outlined: bool) -> list[Concept]:
    """Every way of answering that is tried; of equal ones the first is taken.

    A region without outlines has no mask of its own to learn: its boxes go to a segmenter.
    """

    def concept(route: str, **changes: int) -> Concept:
        return Concept(wordings=wordings, route=route, **changes)

    own = [concept("mask", presence_min_milli=presence) for presence in PRESENCES_MILLI] if outlined else []
    parts = [
        concept("component", presence_min_milli=presence, area_min_px=area, margin_px=margin)
        for presence in PRESENCES_MILLI
        for area in AREAS_PX
        for margin in MARGINS_PX
    ]
    peaks = [
        concept("centre", presence_min_milli=presence, centre_min_milli=centre)
        for presence in PRESENCES_MILLI
        for centre in CENTRES_MILLI
    ]
    return [*own, *parts, *peaks]


class Trier:
    """A head that is asked about held-out images; one look an image, one segmentation a box.

    Args:
        head: In evaluation mode.
        segmenter: Turns boxes into pixels.
    """

    def __init__(self, head: LiteHead, segmenter: LiteMedSam) -> None:
        self._head, self._segmenter = head, segmenter

    def answer(
        self, batch: Batch, wording: str, tried: Sequence[Concept], *, maps: bool
    ) -> list[tuple[Detections, Float32[np.ndarray, "256 256"] | None]]:
        """What each candidate makes of one image.

        Args:
            batch: Of one image.
            wording: A known string of the region.
            tried: Candidates.
            maps: Also the region map.
        """
        encoded = encode(batch, load_model())[0]
        pixels = letterbox(batch.images[0])[0]
        if not pixels.any():
            return [(Detections.none(), np.zeros((MAP_SIZE_PX, MAP_SIZE_PX), np.float32)) for _ in tried]
        tokens = torch.from_numpy(encode_text(wording).copy())[None, None]
        with torch.inference_mode():
            seen = batch.memo("head", lambda: self._head.look(encoded.embedding[None], pixels[None]))
            asked = self._head.ask(seen, tokens, torch.ones(tokens.shape[:3], dtype=torch.bool))
        segments: dict[bytes, np.ndarray] = {}
        result = []
        for concept in tried:
            found = _detections(answer_parts(asked, concept, encoded))
            result.append((found, self._map(batch, found, segments) if maps else None))
        return result

    def _map(
        self, batch: Batch, found: Detections, segments: dict[bytes, np.ndarray]
    ) -> Float32[np.ndarray, "256 256"]:
        own = found.probability
        missing = [i for i in range(len(found)) if own[i] is None and found.box_xyxy_px[i].tobytes() not in segments]
        if missing:
            asked = Detections(
                found.box_xyxy_px[missing], found.score[missing], found.region[missing], found.text[missing],
                [None] * len(missing),
            )  # fmt: skip
            made = self._segmenter.segment(batch, [asked])[0]
            segments |= {box.tobytes(): one for box, one in zip(asked.box_xyxy_px, made, strict=True)}
        pixels = [p if p is not None else segments[found.box_xyxy_px[i].tobytes()] for i, p in enumerate(own)]
        return fuse(found, pixels, 1)[0]


def try_image(
    trier: Trier, case: Case, batch: Batch, regions: Mapping[str, Sequence[Concept]], fold: int
) -> dict[str, list[Try]]:
    """Try every candidate of every region that is known of an image.

    Args:
        trier: The head.
        case: The image and its truth.
        batch: The image, its embedding in the memo.
        regions: Region -> candidates.
        fold: Written down.
    """
    tries = {}
    for name, tried in regions.items():
        known = name in case.boxes
        if not known and name not in case.absent:
            continue
        truth = case.boxes[name] if known else np.zeros((0, 4), np.float32)
        outlined = name in case.masks
        answers = trier.answer(batch, tried[0].wordings[0], tried, maps=outlined)
        tries[name] = [
            Try(
                group=case.group,
                fold=fold,
                hits=match(found, truth) if known else 0,
                found=len(found),
                true=len(truth),
                dice=None if not outlined or drawn is None else dice(drawn > 0.5, case.masks[name], case.ignore),
            )
            for found, drawn in answers
        ]
    return tries


def choose(tries: Tries) -> int:
    """The best candidate: by mean Dice where there are outlines, else by F1 of boxes; by silence where nothing is.

    Silence: the share of images without the region in which nothing is found. It counts as these images are many,
    but never for more than half: a head that says nothing is of no use.
    """
    values = []
    for column in zip(*tries, strict=True):
        there = [one for one in column if one.true]
        absent = [one.found == 0 for one in column if not one.true]
        outlined = [one.dice for one in there if one.dice is not None]
        boxes = sum(one.found + one.true for one in there)
        quality = float(np.mean(outlined)) if outlined else 2 * sum(one.hits for one in there) / max(1, boxes)
        weight = max(0.5, len(there) / len(column))
        values.append(weight * quality + (1 - weight) * (float(np.mean(absent)) if absent else 0.0))
    return int(np.argmax(values))


def tries_without(fold: int, tries: Tries) -> Tries:
    """Tries of the other folds."""
    return [row for row in tries if row[0].fold != fold]


def honest_scores(tries: Tries, seed: int = 0) -> dict[str, Any]:
    """Scores with 95 % intervals by group, every fold answered by what `choose` takes without it."""
    tally = Tally()
    for fold in sorted({row[0].fold for row in tries}):
        best = choose(tries_without(fold, tries) or tries)
        for one in (row[best] for row in tries if row[0].fold == fold):
            _count(tally, one)
    scores = summarise(tally, seed)
    scores.pop("false_pixels", None)  # maps of absent regions are not drawn here
    if tally.groups and not any(tally.found):
        del scores["precision"]  # of nothing
    return scores


def _count(tally: Tally, one: Try) -> None:
    if not one.true:
        tally.absent_groups.append(one.group)
        tally.false_region.append(float(one.found > 0))
        tally.false_pixels.append(0.0)
        return
    tally.groups.append(one.group)
    tally.hits.append(one.hits)
    tally.found.append(one.found)
    tally.true.append(one.true)
    if one.dice is not None:
        tally.dice_groups.append(one.group)
        tally.dice.append(one.dice)


def _detections(parts: Sequence[Part]) -> Detections:
    if not parts:
        return Detections.none()
    zeros = np.zeros(len(parts), np.int64)
    return Detections(
        box_xyxy_px=np.stack([box for box, _, _ in parts]).astype(np.float32),
        score=np.array([score for _, score, _ in parts], np.float32),
        region=zeros,
        text=zeros,
        probability=[probability for _, _, probability in parts],
    )
