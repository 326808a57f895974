"""A little COCO: noisy images with bright squares and, in some, a dim disc; truth known by construction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 80, 96


def write_corpus(folder: Path, count: int = 6) -> tuple[Path, Path]:
    """Images and labels: a square in every image but the last."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    body: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "square"}]}
    for number in range(count):
        pixels = rng.integers(0, 60, (HEIGHT, WIDTH)).astype(np.uint8)
        body["images"].append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        if number < count - 1:
            x, y, size = 10 + 9 * number, 8 + 6 * number, 24
            pixels[y : y + size, x : x + size] = 230
            corners = [x, y, x + size, y, x + size, y + size, x + size / 2, y + size - 4, x, y + size]
            body["annotations"].append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": 7,
                    "bbox": [x, y, size, size],
                    "segmentation": [corners],
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    (folder / "coco.json").write_text(json.dumps(body))
    return folder / "images", folder / "coco.json"


def change(labels: Path, **changes: Any) -> dict[str, Any]:
    """Rewrite keys of a COCO file, and return what it holds."""
    body: dict[str, Any] = json.loads(labels.read_text()) | changes
    labels.write_text(json.dumps(body))
    return body
