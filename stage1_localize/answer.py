"""From a micro-batch of images to what the store keeps of each; a failing image is found and left out.

A micro-batch is cut by row and always full: rows that are absent or have failed are blank. What shares a model
call with a row thus depends on the row and on which neighbours failed, never on who computes it or when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, UInt8, UInt16

from shared.errors import DecodeError, MwmError
from shared.images import Image, Source, read_image
from shared.region_layout import encode_boxes, encode_probability, encode_scores
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.fuse import fuse, to_grid
from stage1_localize.parts import Parts

BLANK_SIDE_PX = 64


@dataclass(frozen=True)
class Answer:
    """What is kept of one image: maps 0..254, boxes in 1/16 px, scores 0..65535, region of each box."""

    maps: UInt8[np.ndarray, "K s s"]
    boxes: Int32[np.ndarray, "m 4"]
    scores: UInt16[np.ndarray, "m"]
    box_regions: UInt16[np.ndarray, "m"]


@dataclass(frozen=True)
class Failure:
    """Why one image is quarantined."""

    reason: str
    stage: str
    message: str


def read(source: Source, expected_sha256: str) -> Image | Failure:
    """Decode an image whose bytes must still be those that the corpus lists."""
    try:
        image = read_image(source)
    except DecodeError as error:
        return Failure(error.reason, "read", str(error))
    except MemoryError:
        return Failure("out_of_memory", "read", f"{source.sample_id}: does not fit into memory")
    if image.source_sha256 != expected_sha256:
        return Failure("source_changed", "read", f"{source.sample_id}: the file changed while the run was on")
    return image


def answer(
    images: Mapping[int, Image],
    ids: Mapping[int, str],
    places: Sequence[int],
    parts: Parts,
    regions: Sequence[Region],
    grid_px: int,
) -> dict[int, Answer | Failure]:
    """Ground, segment and fuse a micro-batch.

    Args:
        images: Row -> image; rows of ``places`` without one are blank.
        ids: Row -> sample id, for the parts.
        places: The micro-batch: every row of it, then -1 for padding.
        parts: Grounder and segmenter.
        regions: What is asked.
        grid_px: Side of the stored maps.

    Returns:
        An answer or a failure for each row of ``images``.

    Raises:
        Exception: Whatever a part raises even when all images are blank: the part is broken, not an image.
    """
    failed: dict[int, Answer | Failure] = {}
    good = dict(images)
    if not good:
        return failed
    try:
        return {**_together(good, ids, places, parts, regions, grid_px)}
    except MwmError:
        raise
    except Exception:
        # One image may have upset a model. Each is tried alone, the others blank; if blanks fail too, the
        # part itself is broken and the first error stands.
        _together({}, ids, places, parts, regions, grid_px)
    for row, image in images.items():
        try:
            _together({row: image}, ids, places, parts, regions, grid_px)
        except MwmError:
            raise
        except Exception as error:
            failed[row] = Failure(
                "out_of_memory" if isinstance(error, MemoryError) else "model_failed",
                "localize",
                f"{ids[row]}: {type(error).__name__} in the grounder, the segmenter or the fusion",
            )
            del good[row]
    if not failed:
        return dict(_together(good, ids, places, parts, regions, grid_px))
    return {**answer(good, ids, places, parts, regions, grid_px), **failed}


def _together(
    images: Mapping[int, Image],
    ids: Mapping[int, str],
    places: Sequence[int],
    parts: Parts,
    regions: Sequence[Region],
    grid_px: int,
) -> dict[int, Answer]:
    blank = np.zeros((1, BLANK_SIDE_PX, BLANK_SIDE_PX), np.float32)
    batch = Batch(
        [images[row].pixels if row in images else blank for row in places],
        [ids[row] if row in images else "" for row in places],
    )
    found = parts.grounder.locate(batch, regions)
    segments = _segments(batch, found, parts)
    return {
        row: _encode(found[place], segments[place], len(regions), grid_px)
        for place, row in enumerate(places)
        if row in images
    }


def _segments(batch: Batch, found: Sequence[Detections], parts: Parts) -> list[list[Float32[np.ndarray, "256 256"]]]:
    """Pixels of every detection: the grounder's own, else the segmenter's."""
    open_ = [[i for i, own in enumerate(each.probability) if own is None] for each in found]
    if not any(open_):
        return [[own for own in each.probability if own is not None] for each in found]
    asked = [
        Detections(each.box_xyxy_px[i], each.score[i], each.region[i], each.text[i], [None] * len(i))
        for each, i in zip(found, open_, strict=True)
    ]
    made = parts.segmenter.segment(batch, asked)
    result = []
    for each, indices, segments in zip(found, open_, made, strict=True):
        filled = dict(zip(indices, segments, strict=True))
        result.append([filled[i] if own is None else own for i, own in enumerate(each.probability)])
    return result


def _encode(
    found: Detections, segments: Sequence[Float32[np.ndarray, "256 256"]], num_regions: int, grid_px: int
) -> Answer:
    maps = to_grid(fuse(found, segments, num_regions), grid_px)
    # Kept in the order in which they are folded (the last column counts first), so that equal answers are equal bytes.
    order = sorted(
        range(len(found)),
        key=lambda i: (
            int(found.region[i]),
            int(found.text[i]),
            -float(found.score[i]),
            *map(float, found.box_xyxy_px[i]),
        ),
    )
    return Answer(
        encode_probability(maps),
        encode_boxes(found.box_xyxy_px[order]),
        encode_scores(found.score[order]),
        found.region[order].astype(np.uint16),
    )
