"""Pixels -> COCO's run lengths, packed into text as pycocotools reads it; `shared.outlines` unpacks them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool


def runs_of(inside: Bool[np.ndarray, "H W"]) -> list[int]:
    """Lengths of the runs of equal pixels, column by column, zeros first.

    >>> runs_of(np.array([[True, False], [True, True]]))
    [0, 2, 1, 1]
    """
    flat = inside.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def pack_runs(runs: list[int]) -> str:
    """Run lengths as COCO's packed text: see `shared.outlines`.

    >>> pack_runs([5, 2, 2, 2, 2, 2, 1, 1, 3])
    '522000OO2'
    """
    text = []
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            digit = value & 31
            value >>= 5
            more = value != (-1 if digit & 16 else 0)
            text.append(chr(48 + digit + 32 * more))
            if not more:
                break
    return "".join(text)
