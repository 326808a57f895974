"""COCO JSON: masks as packed run lengths at each image's own size, and the detections' boxes as results.

``annotations.json`` has an annotation for each region that an image shows: the map, resampled to the image and cut;
``detections.json`` has the grounder's boxes with their scores, in the form of COCO results.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Bool

from pipelines.exportable_store import (
    LEVELS,
    THRESHOLD,
    ExportableStore,
    ReadBack,
    cut,
    image_size,
    refuse_difference,
    resample,
)
from shared.artifact import NOT_FOR_DIAGNOSIS
from shared.config import Strict
from shared.outlines import Outline, draw, unpack_runs
from shared.regions import decode_boxes
from shared.run_lengths import pack_runs, runs_of

ANNOTATIONS = "annotations.json"
DETECTIONS = "detections.json"


class CocoOptions(Strict):
    """Settings of the COCO export."""

    threshold: float = THRESHOLD


class CocoFiles:
    """See the module."""

    Options = CocoOptions
    needs_images = False

    def __init__(self, options: CocoOptions) -> None:
        self.options = options

    def write(self, source: ExportableStore, folder: Path) -> list[ReadBack]:
        """Write both files, then read the finished ones and compare every mask and box."""
        masks, boxes = hashlib.sha256(), hashlib.sha256()
        counts = [0, 0]
        with (folder / ANNOTATIONS).open("w", encoding="utf-8") as file:
            _head(file, source)
            for sample, maps in source.maps(source.samples):
                levels = resample(maps, image_size(sample))
                for region, (field, inside) in enumerate(
                    zip(levels, cut(levels, self.options.threshold), strict=True), 1
                ):
                    if inside.any():
                        counts[0] += 1
                        _put(file, _annotation(counts[0], sample.row, region, field, inside), counts[0] == 1)
                        _digest_mask(masks, sample.row, region, inside)
            file.write("\n]}\n")
        with (folder / DETECTIONS).open("w", encoding="utf-8") as file:
            file.write("[")
            for result in _results(source):
                counts[1] += 1
                _put(file, result, counts[1] == 1)
                boxes.update(json.dumps(result).encode())
            file.write("\n]\n")
        read_masks, read_boxes = hashlib.sha256(), hashlib.sha256()
        for item in _lines(folder / ANNOTATIONS, '"annotations": ['):
            runs = unpack_runs(item["segmentation"]["counts"])
            inside = draw(Outline(runs=tuple(runs)), *item["segmentation"]["size"]) > 0
            _digest_mask(read_masks, item["image_id"], item["category_id"], inside)
        for item in _lines(folder / DETECTIONS, "["):
            read_boxes.update(json.dumps(item).encode())
        refuse_difference(read_masks.digest() == masks.digest(), folder / ANNOTATIONS)
        refuse_difference(read_boxes.digest() == boxes.digest(), folder / DETECTIONS)
        return [ReadBack("masks", counts[0]), ReadBack("boxes", counts[1])]

    def notes(self, source: ExportableStore) -> str:
        """What lies where."""
        return (
            f"`{ANNOTATIONS}`: `pycocotools.coco.COCO` opens it. One annotation an image and region; `score` is the "
            "largest probability within it. `file_name` is the sample's id: the path below the images' folder, unless "
            f"a list named it otherwise. `image.id` is the row in the store. `{DETECTIONS}`: the grounder's boxes, for "
            "`COCO.loadRes`. Images of which a region is not seen have no annotation of it; they are listed all the "
            "same."
        )


def _head(file: IO[str], source: ExportableStore) -> None:
    info = {
        "description": f"Region maps of a store, cut. {NOT_FOR_DIAGNOSIS}",
        "version": "1.0",
        "region_store": f"sha256:{source.store.card.artifact_id}",
    }
    categories = [{"id": number, "name": name} for number, name in enumerate(source.regions, 1)]
    file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n"categories": {_json(categories)},\n"images": [')
    for place, sample in enumerate(source.samples):
        height, width = image_size(sample)
        _put(file, {"id": sample.row, "file_name": sample.sample_id, "width": width, "height": height}, place == 0)
    file.write('\n],\n"annotations": [')


def _annotation(number: int, row: int, region: int, field: np.ndarray, inside: Bool[np.ndarray, "H W"]) -> Any:
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": row,
        "category_id": region,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(inside.sum()),
        "score": round(float(field.max()) / LEVELS, 4),
        "iscrowd": 0,
        "segmentation": {"size": list(inside.shape), "counts": pack_runs(runs_of(inside))},
    }


def _results(source: ExportableStore) -> Iterator[dict[str, Any]]:
    for sample in source.samples:
        boxes, scores, regions = source.store.boxes(sample.row)
        for (x0, y0, x1, y1), score, region in zip(decode_boxes(boxes).tolist(), scores, regions, strict=True):
            yield {
                "image_id": sample.row,
                "category_id": int(region) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": round(int(score) / 65535, 6),
            }


def _put(file: IO[str], item: Any, first: bool) -> None:
    file.write(f"{'' if first else ','}\n{_json(item)}")


def _json(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)


def _lines(path: Path, opening: str) -> Iterator[Any]:
    """The entries of a list that stand one a line, behind the line that opens it."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith(opening + "\n"):
                break
        for line in file:
            if line.startswith("]"):
                return
            yield json.loads(line.rstrip().removesuffix(","))


def _digest_mask(digest: Any, row: int, region: int, inside: Bool[np.ndarray, "H W"]) -> None:
    digest.update(f"{row} {region} {inside.shape}".encode() + np.packbits(inside).tobytes())
