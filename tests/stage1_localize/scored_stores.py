"""Small region stores with labels whose scores can be counted by hand: 64 px images, maps of the same 64 px."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.artifact import publish
from shared.region_writer import (
    Sample,
    ShardJournal,
    assemble_shard,
    create_store,
    drop_journal,
    finalise,
    pending_shards,
)
from shared.regions import RegionStore, encode_boxes, encode_probability, encode_scores, open_region_store

SIDE = 64


def disc(x: float, y: float, radius: float) -> np.ndarray:
    """True where a pixel's centre lies in a disc."""
    rows, columns = np.indices((SIDE, SIDE)) + 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


@dataclass
class Planted:
    """One image of a store: maps by region, boxes with score and region, its group; None for maps: quarantined."""

    maps: dict[str, np.ndarray] | None = field(default_factory=dict)
    boxes: Sequence[tuple[Sequence[float], float, str]] = ()
    group: str | None = None


def write_store(
    folder: Path, images: Sequence[Planted], regions: Sequence[str] = ("spot",), grid: Sequence[int] = (SIDE, SIDE)
) -> RegionStore:
    """Image i is sample ``0i.png``."""
    names = [f"{number:02d}.png" for number in range(len(images))]
    create_store(folder, sample_ids=names, regions=tuple(regions), grid=tuple(grid))
    for shard in pending_shards(folder):
        with ShardJournal(folder, shard) as journal:
            for row in journal.missing:
                one = images[row]
                if one.maps is None:
                    journal.append_quarantined(
                        row, Sample(names[row]), reason="decode_failed", stage="read", message="truncated file"
                    )
                    continue
                shape = (1, *(SIDE for _ in grid))
                known = Sample(names[row], "0" * 64, "1" * 64, shape, (1.0,) * len(grid), None, one.group)
                maps = np.stack([np.asarray(one.maps.get(region, np.zeros(grid)), np.float32) for region in regions])
                corners = np.array([box for box, _, _ in one.boxes], np.float32).reshape(-1, 4)
                scores = np.array([score for _, score, _ in one.boxes], np.float32)
                owners = np.array([list(regions).index(region) for _, _, region in one.boxes], np.uint16)
                journal.append_maps(
                    row, known, encode_probability(maps), encode_boxes(corners), encode_scores(scores), owners
                )
            assemble_shard(journal)
    outputs = finalise(folder)
    drop_journal(folder)
    publish(folder, kind="region-store", inputs=[], spec={"purpose": "test"}, outputs=outputs)
    return open_region_store(str(folder))


Annotated = tuple[int, str, Any]
"""Image, category, and a mask or a box x0, y0, x1, y1."""


def write_labels(
    path: Path,
    count: int,
    things: Sequence[Annotated],
    categories: Sequence[str] = ("spot",),
    crowds: Sequence[tuple[int, str]] = (),
) -> Path:
    """COCO of images ``00.png`` to the one of ``count - 1``; masks as run lengths, boxes without outline."""
    body: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n:02d}.png", "width": SIDE, "height": SIDE} for n in range(count)],
        "categories": [{"id": place, "name": name} for place, name in enumerate(categories)],
        "annotations": [],
    }
    for image, name, what in things:
        row = {"id": len(body["annotations"]), "image_id": image, "category_id": list(categories).index(name)}
        if isinstance(what, np.ndarray):
            row["segmentation"] = {"size": [SIDE, SIDE], "counts": runs(what)}
        else:
            x0, y0, x1, y1 = what
            row["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        body["annotations"].append(row)
    for image, name in crowds:
        row = {"id": len(body["annotations"]), "image_id": image, "category_id": list(categories).index(name)}
        body["annotations"].append({**row, "iscrowd": 1, "bbox": [0, 0, SIDE, SIDE]})
    path.write_text(json.dumps(body))
    return path


def runs(mask: np.ndarray) -> list[int]:
    """COCO's plain run lengths: down the columns, zeros first."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if bool(pixel) != value:
            counts.append(0)
            value = not value
        counts[-1] += 1
    return counts
