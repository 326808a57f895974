"""Label maps as PNG files of class indices, each of its image's size."""

from __future__ import annotations

import csv
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from pipelines.answers.contract import Asked, Place
from pipelines.exportable_store import Names, refuse_difference
from shared.images import Source

MANIFEST = "manifest.csv"
FOLDER = "labels"


class PngFiles:
    """See the module."""

    kinds: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        (asked.folder / FOLDER).mkdir()
        self._file = (asked.folder / MANIFEST).open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        areas = [f"px {name}" for name in asked.classes]
        self._writer.writerow(["sample_id", "file", "width", "height", *areas])

    def refuses(self, source: Source) -> str | None:
        """None: every image has a file."""
        return None

    def put(self, place: Place, answer: Any) -> None:
        """Write a file and read it back."""
        label = answer.label
        path = self._asked.folder / FOLDER / f"{Names([]).sample(place.row, place.source.sample_id)}.png"
        Image.fromarray(label).save(path)
        with Image.open(path) as read:
            refuse_difference(read.mode == "L" and np.array_equal(np.asarray(read), label), path)
        areas = np.bincount(label.ravel(), minlength=len(self._asked.classes) + 1)[1:].tolist()
        height, width = label.shape
        self._writer.writerow([place.source.sample_id, f"{FOLDER}/{path.name}", width, height, *areas])

    def skip(self, source: Source) -> None:
        """Nothing."""

    def close(self) -> None:
        """Close the manifest."""
        self._file.close()

    def notes(self) -> str:
        """What the values mean."""
        return (
            f"`{FOLDER}/`: a grey PNG an image, of its size, upright as it was read. Values are classes, so it looks "
            f"black: {_numbered(self._asked)}. `{MANIFEST}` says which file is of which image, and how many pixels of "
            "each class it has."
        )


def _numbered(asked: Asked) -> str:
    return ", ".join(["0 background", *(f"{number} {name}" for number, name in enumerate(asked.classes, 1))])
