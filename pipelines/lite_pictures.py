"""Labelled pictures for the head of `lite`: three public sets and the template, in their own frames."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float32
from scipy import ndimage

from pipelines.lite_words import CONCEPTS
from pipelines.template import TemplateSlice, template_slices
from stage1_localize.pictures import Picture

SETS = ("br35h", "cxrlung", "bccd")
BLOOD = {"WBC": "white blood cell", "RBC": "red blood cell", "Platelets": "platelet"}
CHEST = frozenset({"lungs", "left lung", "right lung"})
SIDES = frozenset({"left lung", "right lung"})
TISSUE = frozenset({"brain", "grey matter", "white matter"})
BLOCK = 8
"""Template slices of a block; every second block is held out, with `GAP` slices dropped between two blocks."""
GAP = 2
TISSUE_MIN_PX = 30
"""A slice with fewer pixels (mm2) of a tissue neither has nor lacks it."""


def pictures(
    data: Path, split: str, keeps: Callable[[str, str], bool] = lambda source, group: True
) -> Iterator[Picture]:
    """The labelled images of one split of the three sets.

    Args:
        data: Folder with ``manifest.csv``.
        split: ``train`` or ``val``.
        keeps: Whether an image of this set and group is wanted; others are not even read.
    """
    readers = {"br35h": _tumour, "cxrlung": _chest, "bccd": _blood}
    with (data / "manifest.csv").open(newline="", encoding="utf-8") as table:
        for row in csv.DictReader(table):
            if row["set"] in SETS and row["split"] == split and keeps(row["set"], row["group"]):
                yield readers[row["set"]](data / row["image"], data / row["target"], row["group"])


def template_pictures(part: str) -> Iterator[Picture]:
    """Template slices in blocks of `BLOCK`, alternately ``train`` and ``held-out``; ``all`` gives every slice.

    Skull-stripped, so silent on tumours: a template without one would teach "skull-stripped means no tumour".
    """
    for piece in template_slices():
        block, place = divmod(piece.index, BLOCK + GAP)
        if part == "all" or (place < BLOCK and part == ("train", "held-out")[block % 2]):
            yield template_picture(piece, f"block{block:02d}")


def template_picture(piece: TemplateSlice, group: str) -> Picture:
    """One slice with its tissue maps as truth."""
    masks = {"brain": piece.brain, "grey matter": piece.grey, "white matter": piece.white}
    return Picture(
        source="template",
        group=group,
        image=piece.pixels[None].astype(np.float32) / np.float32(255),
        masks={name: mask for name, mask in masks.items() if (mask > 0.5).sum() >= TISSUE_MIN_PX},
        absent=frozenset(CONCEPTS) - TISSUE - {"tumour"},
    )


def mirrored(picture: Picture) -> Picture:
    """The picture seen in a mirror, for sets without lateral concepts."""
    width = picture.image.shape[2]
    return Picture(
        source=picture.source,
        group=picture.group,
        image=np.ascontiguousarray(picture.image[:, :, ::-1]),
        masks={name: np.ascontiguousarray(mask[:, ::-1]) for name, mask in picture.masks.items()},
        boxes={
            name: np.stack([width - b[:, 2], b[:, 1], width - b[:, 0], b[:, 3]], 1) for name, b in picture.boxes.items()
        },
        absent=picture.absent,
        ignore=None if picture.ignore is None else np.ascontiguousarray(picture.ignore[:, ::-1]),
    )


def _tumour(image: Path, target: Path, group: str) -> Picture:
    instances = _pixels(target)
    parts = [np.nonzero(instances == number) for number in range(1, int(instances.max()) + 1)]
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in parts if len(x)]
    return Picture(
        source="br35h",
        group=group,
        image=_image(image),
        masks={"tumour": (instances > 0).astype(np.float32)},
        boxes={"tumour": np.array(boxes, np.float32).reshape(-1, 4)},
        absent=frozenset(CONCEPTS) - TISSUE - {"tumour"},
    )


def _chest(image: Path, target: Path, group: str) -> Picture:
    pixels = _pixels(target)
    lungs = (pixels == 255).astype(np.float32)
    masks = {"lungs": lungs}
    labels, count = ndimage.label(pixels >= 127)
    areas = ndimage.sum_labels(np.ones_like(lungs), labels, range(1, count + 1))
    large = [number for number in np.argsort(-areas)[:2] + 1 if areas[number - 1] > 0.02 * lungs.size]
    if len(large) == 2:  # else the lungs touch, or one is missing: the sides are unknown
        # Radiographs face the viewer: the patient's right lung is on the image's left.
        first, second = sorted(large, key=lambda number: float(np.nonzero(labels == number)[1].mean()))
        masks |= {"right lung": lungs * (labels == first), "left lung": lungs * (labels == second)}
    return Picture(
        source="cxrlung",
        group=group,
        image=_image(image),
        masks=masks,
        absent=frozenset(CONCEPTS) - CHEST,
        ignore=(pixels == 127).astype(np.float32),
    )


def _blood(image: Path, target: Path, group: str) -> Picture:
    boxes: dict[str, list[list[float]]] = {}
    for thing in ElementTree.parse(target).iter("object"):
        corners = [float(thing.findtext(f"bndbox/{side}") or 0) for side in ("xmin", "ymin", "xmax", "ymax")]
        boxes.setdefault(BLOOD[thing.findtext("name") or ""], []).append(corners)
    return Picture(
        source="bccd",
        group=group,
        image=_image(image),
        boxes={name: np.array(rows, np.float32) for name, rows in boxes.items()},
        absent=frozenset(CONCEPTS) - frozenset(boxes),
    )


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as opened:
        return np.asarray(opened)


def _image(path: Path) -> Float32[np.ndarray, "C H W"]:
    pixels = _pixels(path).astype(np.float32) / np.float32(255)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
