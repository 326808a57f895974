"""Label maps as PNG files of class indices, each of its image's size."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from PIL import Image

from pipelines.answers.contract import Asked, Place
from pipelines.exportable_store import Names, refuse_difference, table
from shared.images import Source

MANIFEST = "manifest.csv"
FOLDER = "labels"


class PngFiles:
    """See the module."""

    kinds: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        (asked.folder / FOLDER).mkdir()
        self._rows: list[tuple[object, ...]] = []

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
        self._rows.append((place.source.sample_id, f"{FOLDER}/{path.name}", width, height, *areas))

    def skip(self, source: Source) -> None:
        """Nothing."""

    def close(self) -> None:
        """Write the manifest."""
        areas = (f"px {name}" for name in self._asked.classes)
        with table(self._asked.folder / MANIFEST, "sample_id", "file", "width", "height", *areas) as put:
            for row in self._rows:
                put(*row)

    def notes(self) -> str:
        """What the values mean."""
        return (
            f"`{FOLDER}/`: a grey PNG an image, of its size, upright as it was read. Values are classes, so it looks "
            f"black: {_numbered(self._asked)}. `{MANIFEST}` says which file is of which image, and how many pixels of "
            "each class it has."
        )


def _numbered(asked: Asked) -> str:
    return ", ".join(["0 background", *(f"{number} {name}" for number, name in enumerate(asked.classes, 1))])
