"""Images with their targets: working copies, deterministic light augmentation, batches in a deterministic order.

What an item looks like depends on (seed, sample id, epoch) alone: not on the batch, the number of workers, nor
on whether the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image as Pillow
from torch.nn.functional import interpolate

from shared.artifact import file_sha256
from shared.config import digest
from shared.errors import CorruptError, DecodeError, InputMissingError
from shared.images import Image, Source, read_image
from shared.loader import load_ahead
from shared.rng import below, uniform_u32
from stage3_finetune.config import AugmentConfig
from stage3_finetune.contracts import WHOLE, Batch, Example, Targets, View

_RASTER = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_TURNED = (5, 6, 7, 8)
"""Orientations of EXIF that change height for width."""
WORKING_SIDES = 2
"""A working copy's longer side is at most this many times ``size_px``: enough for any crop, bounded in memory."""


def digest_images(sources: Mapping[str, Source], examples: Sequence[Example]) -> tuple[dict[str, str], str]:
    """Digest every file that the table names, each once.

    Returns:
        sha256 by sample id, and the digest of all (sample id, sha256) pairs.

    Raises:
        InputMissingError: A file vanished since the images were listed.
    """
    names = {sources[example.sample_id].path: example.sample_id for example in examples}
    by_path = {path: _digest(path, sample_id) for path, sample_id in names.items()}
    by_id = {example.sample_id: by_path[sources[example.sample_id].path] for example in examples}
    return by_id, digest(sorted(by_id.items()))


def _digest(path: Path, sample_id: str) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        raise InputMissingError(f"sample {sample_id!a}: its file vanished") from None


def also_in_train(examples: Sequence[Example], sha256: Mapping[str, str]) -> list[str]:
    """Warnings about val and test samples whose file, byte for byte, train has too: groups do not tell.

    Args:
        examples: Every row, split.
        sha256: Of each sample's file.

    Returns:
        At most one line a part.
    """
    first: dict[str, str] = {}
    for example in examples:
        if example.split == "train":
            first.setdefault(sha256[example.sample_id], example.sample_id)
    lines = []
    for split in ("val", "test"):
        part = [example.sample_id for example in examples if example.split == split]
        twins = [name for name in part if sha256[name] in first]
        if twins:
            lines.append(
                f"{len(twins)} of {len(part)} {split} samples are, byte for byte, files that train has too "
                f"({twins[0]!a} = {first[sha256[twins[0]]]!a}): {split} scores come out too high"
            )
    return lines


@dataclass(frozen=True)
class Working:
    """A copy of an image that may be smaller; its size and the spacing of its rows and columns as it was read."""

    pixels: Float32[np.ndarray, "C h w"]
    size_px: tuple[int, int]
    spacing_mm: tuple[float, float] | None


class Part:
    """One part of the table with its images; batches of it, epoch after epoch.

    Args:
        examples: The rows.
        classes: Class names.
        targets: The task's labels.
        sources: Where each sample is.
        sha256: Digest of each sample's file, taken when the run started.
        size_px: Side of the images handed out.
        channels: 1 (colour becomes Rec. 601 luma) or 3 (grey is repeated).
        augment: None for images as they are.
        seed: Run seed.
        cache_bytes: Memory for working copies.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        classes: Sequence[str],
        targets: Targets,
        *,
        sources: Mapping[str, Source],
        sha256: Mapping[str, str],
        size_px: int,
        channels: int,
        augment: AugmentConfig | None,
        seed: int,
        cache_bytes: int,
    ) -> None:
        self.examples = tuple(examples)
        self._classes, self.targets = tuple(classes), targets
        self._sources, self._sha256 = sources, sha256
        self._size_px, self._channels, self._augment, self._seed = size_px, channels, augment, seed
        self._cache: dict[int, Working] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def bytes_an_image(self) -> float:
        """Mean size of the working copies that are kept so far; 0 before any."""
        return sum(copy.pixels.nbytes for copy in self._cache.values()) / max(1, len(self._cache))

    def item(self, index: int, epoch: int) -> tuple[Float32[torch.Tensor, "C S S"], Any, Any, Working]:
        """One image, augmented for this epoch if the part is; its placed target, its truth, and its working copy.

        Raises:
            DecodeError: It cannot be decoded; names the sample.
            CorruptError: The file changed since the run started.
        """
        example, view = self.examples[index], WHOLE
        copy = self._working_copy(index)
        pixels = copy.pixels
        if self._augment is not None:
            words = uniform_u32("finetune/augment", self._seed, example.sample_id, epoch, 6)
            pixels, view = augment_image(pixels, self._augment, words)
        truth = self.targets.load(example, self._classes, copy.size_px)
        placed = self.targets.place(truth, view, self._size_px)
        return squash(pixels, self._size_px), placed, truth, copy

    def batches(self, order: Iterable[tuple[int, list[int]]], *, workers: int = 0) -> Generator[Batch, None, None]:
        """Hand out batches, made ahead of the caller.

        Args:
            order: Epoch and indices of each batch; may be endless.
            workers: Loader processes; 0: a thread of this one.

        Raises:
            DecodeError, CorruptError: As `item`.
            LoaderDiedError: A loader process was killed.
        """
        return load_ahead(self.make, order, workers=workers)

    def make(self, task: tuple[int, list[int]]) -> Batch:
        """Load a batch given as ``(epoch, indices)``."""
        epoch, indices = task
        images, placed, truth, copies = zip(*(self.item(index, epoch) for index in indices), strict=True)
        sample_ids = tuple(self.examples[index].sample_id for index in indices)
        sizes, spacing = tuple(copy.size_px for copy in copies), tuple(copy.spacing_mm for copy in copies)
        target = self.targets.collate(placed)
        return Batch(torch.stack(images), target, sample_ids, truth, sizes, spacing_mm=spacing, epoch=epoch)

    def _working_copy(self, index: int) -> Working:
        if index in self._cache:
            return self._cache[index]
        sample_id = self.examples[index].sample_id
        try:
            image = read_image(self._sources[sample_id])
        except DecodeError as error:
            hint = "mend the file, or take its row out of the labels"
            raise DecodeError(f"sample {sample_id!a}: {error.message}", reason=error.reason, hint=hint) from None
        if image.source_sha256 != self._sha256[sample_id]:
            raise CorruptError(f"sample {sample_id!a}: its file changed while the run was going on")
        copy = work_on(image, self._channels, self._size_px)
        if copy.pixels.nbytes <= self._room:
            self._room -= copy.pixels.nbytes
            self._cache[index] = copy
        return copy


def image_size(source: Source) -> tuple[int, int]:
    """Height and width of an image as it is read; only the head of a PNG, JPEG or TIFF is looked at.

    Raises:
        DecodeError: It cannot be read.
    """
    if source.path.suffix.lower() in _RASTER:
        try:
            with Pillow.open(source.path, formats=("PNG", "JPEG", "TIFF")) as image:
                turned = image.getexif().get(0x0112) in _TURNED
                return (image.width, image.height) if turned else (image.height, image.width)
        except Exception:
            pass  # what Pillow cannot open, the reader may, or it says why not
    height, width = read_image(source).pixels.shape[1:]
    return height, width


def work_on(image: Image, channels: int, size_px: int) -> Working:
    """The copy of an image that windows are cut from: of these channels, and no larger than they can use."""
    pixels = convert_channels(image.pixels, channels)
    height, width = pixels.shape[1:]
    most = WORKING_SIDES * size_px
    if max(height, width) > most:
        scaled = (max(1, height * most // max(height, width)), max(1, width * most // max(height, width)))
        pixels = _resize(pixels, scaled).numpy()
    return Working(pixels, (height, width), image.spacing_mm)


def squash(pixels: Float32[np.ndarray, "C h w"], size_px: int) -> Float32[torch.Tensor, "C S S"]:
    """An image, or a window of it, as the model sees it."""
    return _resize(pixels, (size_px, size_px))


def plain_order(count: int, batch_size: int) -> list[tuple[int, list[int]]]:
    """Batches in the order of the table, for evaluation."""
    return [(0, list(range(first, min(first + batch_size, count)))) for first in range(0, count, batch_size)]


def augment_image(
    pixels: Float32[np.ndarray, "C H W"], augment: AugmentConfig, words: np.ndarray
) -> tuple[Float32[np.ndarray, "C h w"], View]:
    """Crop, mirror, and shift contrast and brightness, as six uniform 32-bit words say.

    The crop is an integer window of the image's own aspect; values are clipped to [0, 1] again.

    Returns:
        The image, and the window that it shows.
    """
    full = np.array(pixels.shape[1:])
    smallest, largest = augment.crop_scale
    milli = smallest + int(below(words[0], largest - smallest + 1))
    crop = np.array([max(1, isqrt(side * side * milli // 1000)) for side in full.tolist()])
    (top, left), (height, width) = below(words[1:3], full - crop + 1), crop
    out = pixels[:, top : top + height, left : left + width]
    flip = augment.flip and bool(int(words[3]) >> 31)
    if flip:
        out = out[:, :, ::-1]
    contrast = 1000 + int(below(words[4], 2 * augment.contrast_milli + 1)) - augment.contrast_milli
    brightness = int(below(words[5], 2 * augment.brightness_milli + 1)) - augment.brightness_milli
    if contrast != 1000 or brightness:
        mean = np.float32(out.mean())
        out = np.clip((out - mean) * np.float32(contrast / 1000) + mean + np.float32(brightness / 1000), 0, 1)
    edges = np.array([top, left, top + height, left + width]) / np.tile(full, 2)
    above, before, under, after = edges.tolist()
    return np.ascontiguousarray(out, dtype=np.float32), View(above, before, under, after, flip)


def convert_channels(pixels: Float32[np.ndarray, "c H W"], channels: int) -> Float32[np.ndarray, "C H W"]:
    """Grey from colour by Rec. 601 luma, colour from grey by repetition."""
    if pixels.shape[0] == channels:
        return pixels
    if channels == 1:
        red, green, blue = pixels
        grey = np.float32(0.299) * red + np.float32(0.587) * green + np.float32(0.114) * blue
        return np.ascontiguousarray(grey[None])
    return np.repeat(pixels, channels, axis=0)


def _resize(pixels: Float32[np.ndarray, "C H W"], size: tuple[int, int]) -> Float32[torch.Tensor, "C h w"]:
    """Bilinear with half-pixel centres, antialiased when it shrinks; no copy where the size is right already."""
    image = torch.from_numpy(pixels)
    if tuple(image.shape[1:]) == size:
        return image
    return interpolate(image[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
