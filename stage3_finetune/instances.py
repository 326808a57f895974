"""Labels of detection: things with boxes, and masks where every thing is outlined; placed into what the model sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from shared.coco import read_coco
from shared.errors import ConfigError, DecodeError
from shared.images import Source
from stage3_finetune.annotations import HUNDREDTHS, Annotated, FaultyFile, from_coco, read_indices, read_voc, unpack
from stage3_finetune.contracts import Example, View
from stage3_finetune.data import image_size
from stage3_finetune.labels import listed, read_table

KEPT_MIN = 0.25
"""A thing of which a crop shows a smaller share (of its mask, else of its box) is no target there."""
ONE_CLASS = "thing"
"""What the things of index maps are called where the settings name no class."""
_READERS = {".xml": read_voc, ".png": read_indices}
_SHOWN = 8
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Things:
    """Things in one image: the truth, or a model's answers.

    Attributes:
        size_px: Height and width of the image.
        boxes: Half-open x0, y0, x1, y1 in 1/100 px of the image as it was read.
        labels: Number of each one's class, from 0.
        masks: Packed run lengths in the image's frame; None: boxes only.
        scores: How sure the model is, in millionths; None for truth.
    """

    size_px: tuple[int, int]
    boxes: Int64[np.ndarray, "n 4"]
    labels: Int64[np.ndarray, "n"]
    masks: tuple[str, ...] | None
    scores: Int64[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return len(self.labels)


class InstanceTargets:
    """Things of each image: a COCO file, or a table whose column ``target`` names a file for each image.

    A target is a path relative to the table: VOC ``.xml`` for boxes, ``.png`` for instance indices (`annotations`).
    An image without things is a negative. COCO labels bring no groups: the images' own count.

    Args:
        path: ``.json``, else the CSV.
        options: With ``masks``: true, false, or ``auto`` for where every outline is more than a box.
        sources: Where each image is; targets are held against their sizes.

    Attributes:
        options: As given; once the labels are read, ``auto`` is replaced.
    """

    def __init__(self, path: Path, *, options: Any, sources: Mapping[str, Source] | None = None) -> None:
        self.options = options
        self._path, self._sources = path, dict(sources or {})
        self._said: dict[str, Annotated] = {}
        self._images_with: Counter[str] = Counter()

    @property
    def masks(self) -> bool:
        """Whether truth has masks."""
        return self.options.masks is True

    def read(
        self, known: Mapping[str, str | None], names: Mapping[str, str] | None = None
    ) -> tuple[list[Example], bool]:
        """Every row with the digest of what its target says; all targets are read and checked."""
        if self._path.suffix.lower() == ".json":
            examples, outlined = self._read_coco(known, names or {})
            grouped = all(known.get(example.sample_id) for example in examples)
        else:
            outlined = frozenset()
            rows, grouped = read_table(self._path, known, names, column="target")
            examples = self._read_targets(rows, hide=bool(names))
        for said in self._said.values():
            self._images_with.update({thing.name for thing in said.things})
        if not self._images_with:
            raise ConfigError(f"labels {self._path}: no thing in any of {len(examples)} images")
        self._settle_masks(outlined)
        self._check_sizes(examples, hide=bool(names))
        return examples, grouped

    def classes(self, examples: Sequence[Example], asked: Sequence[str] | None) -> tuple[str, ...]:
        """Every name, sorted, or what is asked for if no other occurs; index maps have one class."""
        present = sorted(self._images_with)
        if present == [""]:
            if asked is not None and len(asked) != 1:
                raise ConfigError(f"labels {self._path}: index maps hold one class, 'classes' names {len(asked)}")
            return tuple(asked or (ONE_CLASS,))
        if unknown := [name for name in present if name not in (present if asked is None else asked)]:
            raise ConfigError(
                f"labels {self._path}: things of classes that 'classes' does not name: {listed(unknown)}",
                hint=f"classes: {', '.join(asked or ())}",
            )
        if absent := [name for name in asked or () if name not in present]:
            raise ConfigError(f"labels {self._path}: no thing of the classes {listed(absent)}")
        return tuple(present if asked is None else asked)

    def check(self, examples: Sequence[Example], classes: Sequence[str]) -> None:
        """Refuse a class of which no training image has a thing."""
        taught = {
            thing.name or classes[0]
            for example in examples
            if example.split == "train"
            for thing in self._said[example.sample_id].things
        }
        if unseen := [name for name in classes if name not in taught]:
            raise ConfigError(f"labels {self._path}: classes without a thing in a training image: {listed(unseen)}")

    def strata(self, example: Example) -> str:
        """The rarest class that the image has a thing of; without things, none."""
        names = {thing.name for thing in self._said[example.sample_id].things}
        return min(names, key=lambda name: (self._images_with[name], name), default="no thing")

    def load(self, example: Example, classes: Sequence[str], size_px: tuple[int, int]) -> Things:
        """The things of an image."""
        said = self._said[example.sample_id]
        if said.size_px != size_px:
            raise ConfigError(
                f"sample {example.sample_id!a}: its target is of {_shown(said.size_px)} px, "
                f"the image of {_shown(size_px)}"
            )
        boxes = np.array([thing.box for thing in said.things], np.int64).reshape(-1, 4)
        labels = np.array([classes.index(thing.name or classes[0]) for thing in said.things], np.int64)
        masks = tuple(str(thing.mask) for thing in said.things) if self.masks else None
        return Things(size_px, boxes, labels, masks)

    def place(self, truth: Things, view: View, side_px: int) -> dict[str, Tensor]:
        """What torchvision learns from: ``boxes`` in px of the square, ``labels`` from 1, ``masks`` of 0 and 1."""
        return place(truth, view, side_px)

    def collate(self, placed: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """One target an image."""
        return list(placed)

    def _settle_masks(self, outlined: frozenset[str]) -> None:
        """Masks where they can be; ``outlined`` names COCO's classes whose outlines are more than boxes."""
        able = all(thing.mask is not None for said in self._said.values() for thing in said.things)
        wanted = self.options.masks
        if wanted == "auto":
            wanted = able and self._images_with.keys() <= {"", *outlined}
        if wanted and not able:
            raise ConfigError(
                f"options.masks: true, but not every thing in {self._path} is outlined",
                hint="VOC has boxes only; masks: auto takes what there is",
            )
        self.options = self.options.model_copy(update={"masks": bool(wanted)})

    def _check_sizes(self, examples: Sequence[Example], *, hide: bool) -> None:
        problems = []
        for row, example in enumerate(examples, 1):
            said, source = self._said[example.sample_id].size_px, self._sources.get(example.sample_id)
            found = None if source is None else _size_px(source)
            if found is not None and found != said:
                who = f"row {row}" if hide else ascii(example.sample_id)
                problems.append(f"{who}: its target is of {_shown(said)} px, the image of {_shown(found)}")
        if problems:
            _refuse(self._path, problems)

    def _read_coco(
        self, known: Mapping[str, str | None], names: Mapping[str, str]
    ) -> tuple[list[Example], frozenset[str]]:
        called = {sample_id: name for name, sample_id in names.items()}
        sources = [Source(name, Path(name), None, group, called.get(name)) for name, group in known.items()]
        labels = read_coco(self._path, sources)
        problems, examples = [], []
        for item in labels.images:
            if item.unknown:
                problems.append(f"image {item.image_id}: crowd annotations; a detector learns single things")
                continue
            sample_id = item.source.sample_id
            try:
                self._said[sample_id] = from_coco(item)
            except FaultyFile as fault:
                problems.append(f"image {item.image_id}: {fault}")
                continue
            label = self._said[sample_id].sha256
            examples.append(Example(sample_id, label, known.get(sample_id) or sample_id))
        if problems:
            _refuse(self._path, problems)
        return examples, labels.outlined

    def _read_targets(self, rows: Sequence[Example], *, hide: bool) -> list[Example]:
        problems, examples = [], []
        kinds = {PurePosixPath(row.label).suffix.lower() for row in rows}
        if len(kinds) > 1 or not kinds <= _READERS.keys():
            raise ConfigError(
                f"labels {self._path}: targets that end in {', '.join(sorted(kind or 'nothing' for kind in kinds))}",
                hint="all .xml (VOC boxes) or all .png (instance indices); COCO: give the .json itself as --labels",
            )
        read = _READERS[kinds.pop()]
        for number, row in enumerate(rows, 1):
            target = PurePosixPath(row.label)
            try:
                if "\0" in row.label:
                    raise FaultyFile("not a path")
                said = self._said[row.sample_id] = read(self._path.parent / target)
            except FaultyFile as fault:
                problems.append(f"target of {f'row {number}' if hide else ascii(row.sample_id)}: {fault}")
                continue
            examples.append(replace(row, label=said.sha256))
        if problems:
            _refuse(self._path, problems)
        return examples


def place(truth: Things, view: View, side_px: int) -> dict[str, Tensor]:
    """Things in the model's frame; see `InstanceTargets.place`.

    A thing is dropped where the view shows less than `KEPT_MIN` of it. A box that the window cuts becomes the box of
    the part of the mask that is seen, else of itself. A mask is read at the middle of each pixel of the square; one
    too small for that keeps the pixel at the middle of its box.
    """
    height, width = truth.size_px
    top, bottom = view.top * height, view.bottom * height
    left, right = view.left * width, view.right * width
    window = np.array([left, top, right, bottom])
    origin, scale = np.array([left, top] * 2), np.array([side_px / (right - left), side_px / (bottom - top)] * 2)
    rows, columns = _middles(top, bottom, side_px, height), _middles(left, right, side_px, width)
    kept, boxes, masks = [], [], []
    for index, box in enumerate(truth.boxes / HUNDREDTHS):
        inside = None if truth.masks is None else unpack(truth.masks[index], truth.size_px)
        seen, share = _seen(box, inside, window)
        if seen is None or share < KEPT_MIN:
            continue
        placed = np.clip((seen - origin) * scale, 0, side_px)
        if inside is not None:
            mask = inside[rows][:, columns]
            if not mask.any():
                across, down = ((placed[:2] + placed[2:]) / 2).astype(int).clip(0, side_px - 1)
                mask[down, across] = True
            masks.append(np.ascontiguousarray(mask[:, ::-1]) if view.flip else mask)
        kept.append(index)
        boxes.append(placed)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    if view.flip:
        corners[:, [0, 2]] = side_px - corners[:, [2, 0]]
    target = {"boxes": torch.from_numpy(corners), "labels": torch.from_numpy(truth.labels[kept] + 1)}
    if truth.masks is not None:
        stacked = np.array(masks, np.uint8).reshape(-1, side_px, side_px)
        target["masks"] = torch.from_numpy(stacked)
    return target


def _middles(first: float, last: float, side_px: int, length: int) -> Int64[np.ndarray, "S"]:
    """Which source pixel lies at the middle of each pixel of the square."""
    at = first + (np.arange(side_px) + 0.5) * (last - first) / side_px
    return np.floor(at).astype(np.int64).clip(0, length - 1)


def _seen(
    box: Float64[np.ndarray, "4"], inside: Bool[np.ndarray, "H W"] | None, window: Float64[np.ndarray, "4"]
) -> tuple[Float64[np.ndarray, "4"] | None, float]:
    """The box of what a window shows of a thing, and how much of it that is."""
    cut = np.concatenate([np.maximum(box[:2], window[:2]), np.minimum(box[2:], window[2:])])
    if np.abs(cut - box).max() < _ROUNDING:
        return box, 1.0
    if (cut[2:] <= cut[:2]).any():
        return None, 0.0
    if inside is None:
        return cut, float(np.prod(cut[2:] - cut[:2]) / np.prod(box[2:] - box[:2]))
    x0, y0, x1, y1 = np.ceil(window - 0.5 - _ROUNDING).astype(int)  # pixels whose middle the window shows
    part = inside[y0:y1, x0:x1]
    down, across = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    if not len(down):
        return None, 0.0
    around = np.array([x0 + across[0], y0 + down[0], x0 + across[-1] + 1, y0 + down[-1] + 1], np.float64)
    around = np.concatenate([np.maximum(around[:2], window[:2]), np.minimum(around[2:], window[2:])])
    return around, float(part.sum() / inside.sum())


def _size_px(source: Source) -> tuple[int, int] | None:
    """Height and width of an image; None: it cannot be decoded, which is told where it is read, in better words."""
    try:
        return image_size(source)
    except DecodeError:
        return None


def _shown(size_px: tuple[int, int]) -> str:
    return f"{size_px[1]} x {size_px[0]}"


def _refuse(path: Path, problems: Sequence[str]) -> NoReturn:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise ConfigError(f"labels {path}: {len(problems)} faults: {'; '.join(problems[:_SHOWN])}{more}")
