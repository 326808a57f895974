"""Small images with bright squares and their labels in every form: what detection's tests read."""

import csv
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64


def squares(number: int) -> list[tuple[int, int, int, int]]:
    """Things of image ``number`` as x0, y0, x1, y1; every fourth image has none."""
    draw = np.random.default_rng(number)
    if number % 4 == 3:
        return []
    found = []
    for corner in range(1 + number % 2):
        side = int(draw.integers(14, 24))
        x, y = (int(draw.integers(2, 30 - side // 2)) + 30 * corner for _ in range(2))
        found.append((x, y, min(SIDE, x + side), min(SIDE, y + side)))
    return found


def write_images(folder: Path, count: int = 16) -> Path:
    """Grey noise with squares that shine; the second of an image is half as bright."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 40, (SIDE, SIDE))
        for place, (x0, y0, x1, y1) in enumerate(squares(number)):
            pixels[y0:y1, x0:x1] += 200 if place == 0 else 100
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"i{number:02d}.png")
    return folder


def write_table(path: Path, suffix: str, count: int = 16) -> Path:
    """A table of these images, targets beside it: groups of two, the last ones val and test."""
    targets = path.parent / "targets"
    targets.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "target", "group", "split"])
        for number in range(count):
            target = targets / f"t{number:02d}{suffix}"
            if suffix == ".xml":
                target.write_text(voc(squares(number)))
            else:
                index = np.zeros((SIDE, SIDE), np.uint8)
                for place, (x0, y0, x1, y1) in enumerate(squares(number), 1):
                    index[y0:y1, x0:x1] = place
                Image.fromarray(index).save(target)
            split = "test" if number >= count - 4 else "val" if number >= count - 8 else "train"
            writer.writerow([f"i{number:02d}.png", f"targets/{target.name}", f"g{number // 2}", split])
    return path


def voc(boxes: list[tuple[float, float, float, float]], names: tuple[str, ...] = ("bright", "dim")) -> str:
    """VOC XML: 1-based pixels, the last one included."""
    things = "".join(
        f"<object><name>{names[place % len(names)]}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for place, (x0, y0, x1, y1) in enumerate(boxes)
    )
    return f"<annotation><size><width>{SIDE}</width><height>{SIDE}</height><depth>1</depth></size>{things}</annotation>"


def write_coco(path: Path, count: int = 16, *, outlines: bool = True) -> Path:
    """COCO labels of the same; each square without its corner pixel, so that the outline is more than the box."""
    body: dict[str, list[dict[str, object]]] = {
        "images": [{"id": n, "file_name": f"i{n:02d}.png", "width": SIDE, "height": SIDE} for n in range(count)],
        "categories": [{"id": 7, "name": "bright"}, {"id": 3, "name": "dim"}],
        "annotations": [],
    }
    for number in range(count):
        for place, (x0, y0, x1, y1) in enumerate(squares(number)):
            row: dict[str, object] = {
                "id": len(body["annotations"]) + 1,
                "image_id": number,
                "category_id": (7, 3)[place],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            if outlines:
                row["segmentation"] = [[x0 + 4, y0, x1, y0, x1, y1, x0, y1, x0, y0 + 4]]
            body["annotations"].append(row)
    path.write_text(json.dumps(body))
    return path
