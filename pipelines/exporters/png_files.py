"""Grey PNG files of 8 or 16 bits, one an image and region: probability, at the image's size or the map's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipelines.exportable_store import (
    LEVELS,
    ExportableStore,
    Names,
    ReadBack,
    image_size,
    refuse_difference,
    resample,
    table,
)
from shared.config import Strict
from shared.errors import UsageError

MANIFEST = "manifest.csv"
_OVERLAYS = "overlays"
_QUICK = 1  # of zlib: a third larger than the default level, in a quarter of its time


class PngOptions(Strict):
    """Settings of the PNG export."""

    bits: Literal[8, 16] = Field(8, description="Bits a pixel: probability is value / 255, or value / 65535.")
    size: Literal["image", "map"] = Field("image", description="Frame of the files: the image's own, or the map's.")
    overlays: bool = Field(False, description="Also a picture of each image with its regions; needs --images.")
    overlay_px: int = Field(512, ge=16, le=8192, description="Longer side of an overlay, px.")


class PngFiles:
    """See the module."""

    Options = PngOptions
    needs_images = False

    def __init__(self, options: PngOptions) -> None:
        self.options = options

    def write(self, source: ExportableStore, folder: Path) -> list[ReadBack]:
        """Write a folder a region, and the manifest; every file is read back as soon as it is written."""
        if self.options.overlays and source.sources is None:
            raise UsageError("--set overlays=true needs --images", hint="a store holds maps, not pixels")
        names = Names(source.regions)
        places = [names.region(index) for index in range(len(source.regions))]
        for place in (*places, *([_OVERLAYS] if self.options.overlays else [])):
            (folder / place).mkdir()
        count = pictures = 0
        with table(folder / MANIFEST, "sample_id", "row", "region", "file", "width", "height") as put:
            for sample, maps in source.maps(source.samples):
                size = image_size(sample) if self.options.size == "image" else maps.shape[-2:]
                stem = names.sample(sample.row, sample.sample_id)
                for name, place, values in zip(source.regions, places, self._values(maps, size), strict=True):
                    path = folder / place / f"{stem}.png"
                    Image.fromarray(values).save(path, compress_level=_QUICK)
                    with Image.open(path) as read:
                        refuse_difference(np.array_equal(np.asarray(read), values), path)
                    put(sample.sample_id, sample.row, name, f"{place}/{path.name}", size[1], size[0])
                    count += 1
                if self.options.overlays:
                    pixels = source.read_image(sample).pixels
                    drawn = source.store.overlay(sample.sample_id, pixels, side_px=self.options.overlay_px)
                    Image.fromarray(drawn.pixels).save(folder / _OVERLAYS / f"{stem}.png", compress_level=_QUICK)
                    pictures += 1
        return [ReadBack("maps", count)]

    def notes(self, source: ExportableStore) -> str:
        """What lies where."""
        most = 2**self.options.bits - 1
        drawn = f" `{_OVERLAYS}/`: tint shows probability, the line is at 0.5." if self.options.overlays else ""
        frame = "the image's own" if self.options.size == "image" else "the map's, over the whole image"
        return (
            f"One folder a region, one grey PNG of {self.options.bits} bits an image: probability = value / {most}, "
            f"size {frame}. `{MANIFEST}` says which file is of which sample; names begin with the row in the store."
            f"{drawn}"
        )

    def _values(self, maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        most = 2**self.options.bits - 1
        levels = resample(maps, (size[0], size[1])).astype(np.float64)
        return np.floor(levels * most / LEVELS + 0.5).astype(np.uint8 if self.options.bits == 8 else np.uint16)
