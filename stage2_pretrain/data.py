"""Images with their region maps: what a pretraining step is made from.

An item is a function of (seed, sample id, epoch): the window is drawn by names, resizing is fixed float32
arithmetic, and neither the order of access nor the number of loading processes matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from shared.artifact import file_sha256
from shared.errors import CorruptError, DecodeError, InputMissingError
from shared.images import Source, find_sources, read_image
from shared.rng import sample_keys
from stage2_pretrain.masking.coverage import orient
from stage2_pretrain.pixel_cache import PixelCache
from stage2_pretrain.samples import image_sizes_px, usable_samples
from stage2_pretrain.window import WindowOptions, draw_windows

if TYPE_CHECKING:
    from shared.regions import RegionStore

MEMORY_BYTES = 1 << 30
_RESTORE = "restore the image, or localize again"
_GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601)."""


class SourceChangedError(CorruptError):
    """An image file is not the one that its region map was made from (exit 4)."""

    kind = "source-changed"


class RegionDataset:
    """The samples of a region store that have maps, in the store's order.

    Args:
        store: A `shared.regions.RegionStore`.
        images: Folder or list that the store was made from.
        size_px: Side of the square that a window is resized to; like the maps, it does not keep the aspect.
        channels: 1: colour is reduced to grey. 3: grey is repeated.
        window: How to crop, flip and turn.
        seed: Of the run.
        maps_of: For so many samples, whose maps each is masked by; its own if not given.
        memory_bytes: Decoded images and maps are kept up to this size in all; 8-bit images stay 8-bit. Past it
            they are read again. Never changes what an item is.
        pixel_cache: Of the samples with maps: decoded images are kept there too, and read from there. Whether the
            file of one is still the one localized is then looked at once by each process.
        some: Rows of the store that are taken, as `samples.tell_rows` tells them; all if not given.

    Attributes:
        sample_ids: Ids of the items.
        rows: Their rows in the store.
        sample_keys: Their keys.
        maps_of: Index of the sample whose maps each is masked by.
        sizes_px: Height and width of each image.
        absent: Samples of the store without maps (quarantined by stage 1), which are left out; 0 where some are taken.
        extra: Images that the store does not know, which are left out.

    Raises:
        InputMissingError: The images lack a sample of the store.
        UsageError: No sample has maps, two have equal keys, or the store is not of 2D images.
    """

    def __init__(
        self,
        store: RegionStore,
        images: Path,
        *,
        size_px: int,
        channels: Literal[1, 3],
        window: WindowOptions,
        seed: int,
        maps_of: Callable[[int], Int64[np.ndarray, "N"]] = np.arange,
        memory_bytes: int = MEMORY_BYTES,
        pixel_cache: PixelCache | None = None,
        some: str | None = None,
    ) -> None:
        used = usable_samples(store, some)
        found = {source.sample_id: source for source in find_sources(images)}
        ids: list[str] = []
        rows: list[int] = []
        self._sha256: list[str | None] = []
        for sample in used:  # once: each is parsed anew
            ids.append(sample.sample_id)
            rows.append(sample.row)
            self._sha256.append(sample.source_sha256)
        missing = [name for name in ids if name not in found]
        if missing:
            raise InputMissingError(
                f"images {images}: {len(missing)} of {len(used)} samples of the region store are not there, "
                f"first {missing[0]!r}",
                hint="give the images that the store was made from; DICOM ids also need the salt that they were made "
                "with (MWM_SALT_FILE)"
                if missing[0].startswith("dicom-")
                else "give the images that the store was made from",
            )
        self.store = store
        self.size_px = size_px
        self.channels = channels
        self.window = window
        self.seed = seed
        self.sample_ids = tuple(ids)
        self.rows = tuple(rows)
        self.sample_keys = sample_keys(self.sample_ids)
        self.maps_of = maps_of(len(used))
        self.sizes_px = image_sizes_px(used)
        self.absent = 0 if some is not None else len(store.samples) - len(used)
        self.extra = len(set(found) - {sample.sample_id for sample in store.samples})
        self._sources: list[Source] = [found[name] for name in self.sample_ids]
        self._pixel_cache = pixel_cache
        self._found_sha256: dict[Path, str] = {}
        self._free_bytes = memory_bytes
        self._images: dict[int, UInt8[np.ndarray, "C H W"] | Float32[np.ndarray, "C H W"]] = {}
        self._maps: dict[int, UInt8[np.ndarray, "K h w"]] = {}

    def __len__(self) -> int:
        return len(self.sample_ids)

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """One sample as it is seen in an epoch, 0 .. 2^24 - 1.

        Returns:
            ``image`` float32 [C, S, S] in [0, 1]; ``maps`` uint8 [K, h, w], of the whole image of the sample in
            `maps_of`; ``window`` int32 [8]; ``sample_key`` int64, the bits of the unsigned key; ``row`` in
            the store; ``index``.

        Raises:
            SourceChangedError: The image file is not the one that the store knows.
            CorruptError: Its maps are not those that the store lists.
        """
        key = self.sample_keys[index : index + 1]
        size = self.sizes_px[index : index + 1]
        window = draw_windows(size, key, seed=self.seed, epoch=epoch, options=self.window)[0]
        return {
            "image": view_image(self._pixels(index), window, self.size_px, self.channels),
            "maps": torch.from_numpy(self._region_maps([index])[0]),
            "window": torch.from_numpy(window),
            "sample_key": int(key.view(np.int64)[0]),
            "row": self.rows[index],
            "index": index,
        }

    def batch(self, indices: Sequence[int], epoch: int) -> dict[str, Any]:
        """The samples of a batch as they are seen in an epoch: the values of `item`, stacked."""
        chosen = list(indices)
        keys = self.sample_keys[chosen]
        windows = draw_windows(self.sizes_px[chosen], keys, seed=self.seed, epoch=epoch, options=self.window)
        image = torch.empty(len(chosen), self.channels, self.size_px, self.size_px)
        for place, index in enumerate(chosen):
            image[place] = view_image(self._pixels(index), windows[place], self.size_px, self.channels)
        return {
            "image": image,
            "maps": torch.from_numpy(self._region_maps(chosen)),
            "window": torch.from_numpy(windows),
            "sample_key": torch.from_numpy(keys.view(np.int64)),
            "row": torch.tensor([self.rows[index] for index in chosen]),
            "index": torch.tensor(chosen),
        }

    def _pixels(self, index: int) -> UInt8[np.ndarray, "C H W"] | Float32[np.ndarray, "C H W"]:
        kept = self._images.get(index)
        if kept is not None:
            return kept
        stored = None if self._pixel_cache is None else self._pixel_cache.read(index)
        if stored is None:
            stored = self._decode(index)
        else:
            self._check_file(index)
        return self._keep(self._images, index, stored)

    def _decode(self, index: int) -> UInt8[np.ndarray, "C H W"] | Float32[np.ndarray, "C H W"]:
        name = self.sample_ids[index]
        try:
            image = read_image(self._sources[index])
        except DecodeError as error:
            raise SourceChangedError(f"{name}: readable when localized, now {error.reason}", hint=_RESTORE) from None
        self._compare(index, image.source_sha256)
        if image.pixels.shape[1:] != tuple(self.sizes_px[index]):
            raise SourceChangedError(
                f"{name}: decodes to {image.pixels.shape[1:]} px, not the size localized", hint=_RESTORE
            )
        stored = as_stored(image.pixels)
        if self._pixel_cache is not None:
            self._pixel_cache.write(index, stored, image.pixel_sha256)
            self._found_sha256[self._sources[index].path] = image.source_sha256
        return stored

    def _check_file(self, index: int) -> None:
        """Compare the file of an image that is not decoded with the one localized; each file is read once."""
        path = self._sources[index].path
        if path not in self._found_sha256:
            try:
                self._found_sha256[path] = file_sha256(path.resolve())
            except OSError:
                name = self.sample_ids[index]
                raise SourceChangedError(f"{name}: readable when localized, now missing", hint=_RESTORE) from None
        self._compare(index, self._found_sha256[path])

    def _compare(self, index: int, found: str) -> None:
        wanted = str(self._sha256[index])
        if found != wanted:
            raise SourceChangedError(
                f"{self.sample_ids[index]}: sha256 {found[:16]}..., localized {wanted[:16]}...", hint=_RESTORE
            )

    def _region_maps(self, indices: Sequence[int]) -> UInt8[np.ndarray, "n K h w"]:
        """Maps that some samples are masked by; those not kept are read together."""
        whose = self.maps_of[list(indices)].tolist()
        fresh = [place for place, index in enumerate(whose) if index not in self._maps]
        read = self.store.maps([self.rows[whose[place]] for place in fresh])
        if len(fresh) == len(whose):
            out = read
        else:
            out = np.empty((len(whose), *read.shape[1:]), np.uint8)
            for place, index in enumerate(whose):
                if index in self._maps:
                    out[place] = self._maps[index]
            out[fresh] = read
        for place, maps in zip(fresh, read, strict=True):
            if whose[place] not in self._maps and maps.nbytes <= self._free_bytes:
                self._keep(self._maps, whose[place], maps.copy())  # a view would keep the whole batch
        return out

    def _keep(self, cache: dict[int, np.ndarray[Any, Any]], index: int, value: np.ndarray[Any, Any]) -> Any:
        if value.nbytes <= self._free_bytes:
            self._free_bytes -= value.nbytes
            cache[index] = value
        return value


def as_stored(pixels: Float32[np.ndarray, "C H W"]) -> UInt8[np.ndarray, "C H W"] | Float32[np.ndarray, "C H W"]:
    """Pixels as uint8 if they are 8-bit values over 255, exactly; else as they are."""
    small = np.rint(pixels * 255).astype(np.uint8)
    return small if np.array_equal(_as_float(small), pixels) else pixels


def view_image(
    pixels: UInt8[np.ndarray, "c H W"] | Float32[np.ndarray, "c H W"],
    window: Int32[np.ndarray, "8"],
    size_px: int,
    channels: int,
) -> Float32[Tensor, "C S S"]:
    """Cut the window out, resize it, flip and turn it.

    Args:
        pixels: uint8, or float32 in [0, 1].
        window: From `draw_windows`.
        size_px: Side of the result; bilinear, antialiased, half-pixel centres.
        channels: 1 or 3.

    Returns:
        In [0, 1].
    """
    top, left, height, width, _, _, flip, turns = window.tolist()
    part = _as_float(pixels[:, top : top + height, left : left + width])
    if channels == 1 and len(part) == 3:
        part = (part * np.array(_GREY, np.float32)[:, None, None]).sum(axis=0, keepdims=True)
    sized = interpolate(
        torch.from_numpy(np.ascontiguousarray(part))[None], size=(size_px, size_px), mode="bilinear", antialias=True
    )[0].clamp_(0, 1)
    turned = torch.from_numpy(np.ascontiguousarray(orient(sized.numpy(), flip, turns)))
    return turned.expand(channels, -1, -1)


def _as_float(pixels: UInt8[np.ndarray, "*S"] | Float32[np.ndarray, "*S"]) -> Float32[np.ndarray, "*S"]:
    return pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels
