"""How the contract test gets each grounder and segmenter: the one line to add with a registration.

A builder takes an empty folder and returns the part's options; it imports what it needs itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

Builder = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class GrounderEntry:
    """One grounder.

    Attributes:
        build: Folder -> options.
        words: Two wordings it knows.
        absent: A wording that it knows and must not find; None: it has no notion of one.
        finds: Whether a box must lie over the bright blob of each image.
        by_name: Whether region names choose the answer, and words do not.
        by_sample: Whether an image is known by its id.
        quick: Whether a fresh process may try it too.
    """

    build: Builder
    words: tuple[str, str] = ("brain", "tumour")
    absent: str | None = None
    finds: bool = False
    by_name: bool = False
    by_sample: bool = False
    quick: bool = False


@dataclass(frozen=True)
class SegmenterEntry:
    """One segmenter.

    Attributes:
        build: Folder -> options.
        takes_boxes: False: it refuses boxes.
        finds: Whether a box around a bright blob must hold more inside than outside.
    """

    build: Builder
    takes_boxes: bool = True
    finds: bool = False


def nothing(folder: Path) -> dict[str, Any]:
    """Defaults."""
    return {}


def labels(folder: Path) -> dict[str, Any]:
    """Outlines of the blobs, as an oracle reads them."""
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return {"labels": str(folder / "labels.json")}


def tiny(module: str, build: str) -> Builder:
    """A tiny random model, by the builder beside the part's own test; imported when it is asked for."""

    def built(folder: Path) -> dict[str, Any]:
        options: dict[str, Any] = getattr(import_module(f"tests.stage1_localize.{module}"), build)(folder / "model")
        return options

    return built


GROUNDER_TABLE: dict[str, GrounderEntry] = {
    "biomedclip": GrounderEntry(tiny("grounders.tiny_clip", "build_clip"), quick=True),
    "contrast": GrounderEntry(nothing, finds=True, quick=True),
    "grounding_dino": GrounderEntry(tiny("grounders.tiny_grounding_dino", "build_native")),
    "groundingdino_py": GrounderEntry(tiny("grounders.tiny_grounding_dino", "build_legacy")),
    "lite": GrounderEntry(nothing, ("brain", "white blood cell")),
    "oracle": GrounderEntry(labels, ("blob", "Other Blob"), absent="nowhere", finds=True, by_sample=True),
    "planted": GrounderEntry(nothing, ("disc", "box"), absent="nothing", finds=True, quick=True),
    "sam3": GrounderEntry(tiny("grounders.tiny_sam3", "build_sam3")),
    "supervoxels": GrounderEntry(nothing, by_name=True, quick=True),
}
SEGMENTER_TABLE: dict[str, SegmenterEntry] = {
    "boxfill": SegmenterEntry(nothing, finds=True),
    "lite_medsam": SegmenterEntry(nothing, finds=True),
    "none": SegmenterEntry(nothing, takes_boxes=False),
    "sam": SegmenterEntry(tiny("segmenters.tiny_sam", "build_sam")),
    "sam2": SegmenterEntry(tiny("segmenters.tiny_sam", "build_sam2")),
    "segment_anything": SegmenterEntry(tiny("segmenters.tiny_sam", "build_segment_anything")),
}


def blob(height: int, width: int, x: int, y: int, channels: int = 1) -> np.ndarray:
    """A bright Gaussian blob around pixel x, y."""
    rows, columns = np.mgrid[:height, :width]
    image = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 300)
    return np.tile(image.astype(np.float32), (channels, 1, 1))


IMAGES = (blob(120, 90, 40, 70), blob(64, 200, 150, 30, channels=3), np.full((1, 40, 40), 0.5, np.float32))
"""Higher than wide, wider than high in colour, and constant: no two of a size, and nothing in the last."""
BLOBS_XY = ((40, 70), (150, 30))
IDS = ("x", "y", "z")
LABELS = {
    "images": [
        {"id": i, "file_name": name, "width": image.shape[2], "height": image.shape[1]}
        for i, (name, image) in enumerate(zip(IDS, IMAGES, strict=True))
    ],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 0, "bbox": [25, 55, 30, 30]},
        {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[30, 60, 60, 60, 45, 90]]},
        {"id": 2, "image_id": 1, "category_id": 0, "bbox": [135, 15, 30.5, 30]},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [130, 10, 40, 54]},
        {"id": 4, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5.5, 64]},
    ],
    "categories": [{"id": 0, "name": "blob"}, {"id": 1, "name": "other blob"}, {"id": 2, "name": "nowhere"}],
}
