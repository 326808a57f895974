"""COCO JSON: label maps as a mask an image and class; things found as boxes with scores, perhaps with masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from pipelines.answers.contract import Asked, Place
from pipelines.exportable_store import refuse_difference
from shared.artifact import NOT_FOR_DIAGNOSIS
from shared.images import Source
from shared.outlines import Outline, extent
from shared.run_lengths import pack_runs, runs_of

FILE = "annotations.json"


class CocoFile:
    """See the module."""

    kinds: ClassVar[tuple[str, ...]] = ("labels", "instances")

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def refuses(self, source: Source) -> str | None:
        """None: every image has an entry."""
        return None

    def put(self, place: Place, answer: Any) -> None:
        """Take an image and what is in it."""
        height, width = place.size_px
        self._images.append({"id": place.row, "file_name": place.source.sample_id, "width": width, "height": height})
        found = _masks(answer.label) if self._asked.kind == "labels" else _things(answer, place.size_px)
        for item in found:
            self._annotations.append({"id": len(self._annotations) + 1, "image_id": place.row, "iscrowd": 0, **item})

    def skip(self, source: Source) -> None:
        """Nothing: an image without an entry was not looked at."""

    def close(self) -> None:
        """Write the file and read it back."""
        body = {
            "info": {
                "description": f"Predictions of a model. {NOT_FOR_DIAGNOSIS}",
                "version": "1.0",
                "model": f"sha256:{self._asked.model}",
            },
            "licenses": [],
            "categories": [{"id": number, "name": name} for number, name in enumerate(self._asked.classes, 1)],
            "images": self._images,
            "annotations": self._annotations,
        }
        path = self._asked.folder / FILE
        path.write_text(json.dumps(body, ensure_ascii=False) + "\n", encoding="utf-8")
        refuse_difference(json.loads(path.read_text(encoding="utf-8")) == body, path)

    def notes(self) -> str:
        """How it is opened."""
        what = (
            "An annotation is the mask of a class in an image"
            if self._asked.kind == "labels"
            else "An annotation is a thing found; `score` says how sure the model is, [0, 1]"
        )
        return (
            f"`{FILE}`: `pycocotools.coco.COCO` opens it. {what}. Boxes are x, y, width, height in px of the image, "
            "upright as it was read; masks are packed run lengths of its size. An image without an annotation was "
            "looked at, and nothing was found."
        )


def _masks(label: np.ndarray) -> Iterator[dict[str, Any]]:
    for number in np.unique(label).tolist():
        if number:
            yield {"category_id": number, **_mask(runs_of(label == number), label.shape)}


def _things(answer: Any, size_px: tuple[int, int]) -> Iterator[dict[str, Any]]:
    runs = getattr(answer, "runs", None)
    for place, (box, score, number) in enumerate(zip(answer.box_xyxy_px, answer.score, answer.label, strict=True)):
        x0, y0, x1, y1 = (round(float(value), 3) for value in box)
        whole = {} if runs is None else _mask([*map(int, runs[place])], size_px)
        yield {
            "area": round((x1 - x0) * (y1 - y0), 3),
            **whole,
            "category_id": int(number) + 1,
            "bbox": [x0, y0, round(x1 - x0, 3), round(y1 - y0, 3)],
            "score": round(float(score), 6),
        }


def _mask(runs: list[int], size_px: tuple[int, ...]) -> dict[str, Any]:
    x0, y0, x1, y1 = map(int, extent(Outline(runs=tuple(runs)), size_px[0]) or (0, 0, 0, 0))
    return {
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": sum(runs[1::2]),
        "segmentation": {"size": list(size_px), "counts": pack_runs(runs)},
    }
