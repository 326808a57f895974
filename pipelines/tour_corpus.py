"""The tour's corpus: axial slices of a real T1 template, labelled by eighths of the brain's own extent."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.artifact import write_atomic

BLOCK = 8
"""Slices of a block; blocks go to train and test in turn."""
GAP = 4
"""Slices dropped between two blocks, so that no test slice is the neighbour of a training slice."""
CLASSES = 8


@dataclass(frozen=True)
class Row:
    """One slice that stays in the corpus."""

    index: int
    label: str
    group: str
    split: str


def plan(count: int) -> Iterator[Row]:
    """Blocks of `BLOCK` slices, alternating train and test, `GAP` dropped between; labels are eighths.

    Args:
        count: Slices over the brain's own axial extent, bottom to top.

    Yields:
        The slices that stay, bottom to top.
    """
    for index in range(count):
        block, place = divmod(index, BLOCK + GAP)
        if place < BLOCK:
            label = f"eighth {index * CLASSES // count + 1}"
            yield Row(index, label, f"block{block:02d}", ("train", "test")[block % 2])


def write_tour_corpus(folder: Path) -> tuple[Path, Path]:
    """Write the slices as 8-bit PNGs and their labels as CSV; the same bytes each time.

    Args:
        folder: Gets ``images/`` and ``labels.csv``.

    Returns:
        Both paths.
    """
    images, labels = folder / "images", folder / "labels.csv"
    if labels.is_file():  # written last
        return images, labels
    from PIL import Image

    from pipelines.template import template_slices

    slices = template_slices()
    images.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["sample_id", "label", "group", "split"])
    for row in plan(len(slices)):
        name = f"slice{row.index:03d}.png"
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(slices[row.index].pixels)).save(png, format="PNG")
        write_atomic(images / name, png.getvalue())
        writer.writerow([name, row.label, row.group, row.split])
    write_atomic(labels, table.getvalue().encode())
    return images, labels
