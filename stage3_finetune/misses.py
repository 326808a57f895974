"""The images that a detector got most wrong, drawn for a report: truth and answers as lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32

from shared.gallery import Outlined, outlined
from shared.page import Section
from stage3_finetune.annotations import HUNDREDTHS, unpack
from stage3_finetune.average_precision import match
from stage3_finetune.instances import Things

SHOWN = 8
SURE = 500_000
"""Answers of at least this score, in millionths, are counted and drawn."""


def worst_images(
    sample_ids: Sequence[str],
    pairs: Sequence[tuple[Things, Things]],
    classes: Sequence[str],
    read: Callable[[str], Float32[np.ndarray, "C H W"]],
) -> list[Section]:
    """The images with most errors: things that no answer of score .5 finds (IoU .5, boxes), and such answers that err.

    Args:
        sample_ids: Of each image.
        pairs: Truth and answers.
        classes: Class names.
        read: Pixels of a sample.

    Returns:
        A section, or none where there is no error.
    """
    sure = [(truth, _sure(found)) for truth, found in pairs]
    missed, false = np.zeros(len(sure), np.int64), np.zeros(len(sure), np.int64)
    for label in range(len(classes)):
        matches = match(sure, label, "box")
        right = np.bincount(matches.image[matches.hit[0]], minlength=len(sure))
        missed += matches.things - right
        false += np.bincount(matches.image, minlength=len(sure)) - right
    errors = missed + false
    order = sorted(range(len(sure)), key=lambda place: (-int(errors[place]), sample_ids[place]))
    shown = []
    for place in order[:SHOWN]:
        if not errors[place]:
            break
        truth, found = sure[place]
        counts = f"{len(truth) - missed[place]} of {len(truth)} found, {false[place]} false{_best(found)}"
        there, said = ([_field(things, index) for index in range(len(things))] for things in (truth, found))
        shown.append(Outlined(sample_ids[place], read(sample_ids[place]), there, said, counts))
    if not shown:
        return []
    total = f"{int((errors > 0).sum())} of {len(sure)} images have an error at a score of .5 and IoU of .5 (boxes)."
    note = "Light line: truth. Orange line: answers of a score of .5 or more."
    return [Section("Most wrong", f'<p class="lead">{total}</p>{outlined(shown)}', note)]


def _sure(found: Things) -> Things:
    assert found.scores is not None
    kept = np.flatnonzero(found.scores >= SURE)
    masks = None if found.masks is None else tuple(found.masks[index] for index in kept)
    return Things(found.size_px, found.boxes[kept], found.labels[kept], masks, found.scores[kept])


def _field(things: Things, index: int) -> Float32[np.ndarray, "H W"]:
    """The mask, or the box filled."""
    if things.masks is not None:
        return unpack(things.masks[index], things.size_px).astype(np.float32)
    field = np.zeros(things.size_px, np.float32)
    x0, y0, x1, y1 = (things.boxes[index] + HUNDREDTHS // 2) // HUNDREDTHS
    field[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = 1
    return field


def _best(found: Things) -> str:
    return f", best {int(found.scores[0]) / 1_000_000:.2f}" if found.scores is not None and len(found) else ""
