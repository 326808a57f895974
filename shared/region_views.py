"""What a notebook shows of a region store: one sample painted, and the store at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from shared.artifact import NOT_FOR_DIAGNOSIS, write_atomic
from shared.errors import UsageError
from shared.figures import REGION_COLOURS, Colour, paint, picture, png
from shared.region_images import find_images, read_localized
from shared.regions import RegionStore

_GROUND = 0.35
"""Grey of the picture where the image is not at hand."""
_GALLERY = 4
_GALLERY_PX = 160


@dataclass(frozen=True)
class Picture:
    """A painted sample; notebooks show it where it is a cell's last value.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        sample_id: Whose.
        colours: Region -> its colour in the picture, RGB 0..255.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    sample_id: str
    colours: Mapping[str, Colour]

    def _repr_png_(self) -> bytes:
        return png(self.pixels)

    def __repr__(self) -> str:
        height, width = self.pixels.shape[:2]
        inks = ", ".join(f"{name} #{r:02x}{g:02x}{b:02x}" for name, (r, g, b) in self.colours.items())
        return f"Picture({self.sample_id!r}, {width} x {height} px: {inks})"

    def save(self, path: str | Path) -> None:
        """Write it as PNG."""
        write_atomic(Path(path), self._repr_png_())


def paint_sample(
    store: RegionStore,
    sample_id: str,
    images: Path | str | Float[np.ndarray, "*C H W"] | None = None,
    *,
    regions: Sequence[str] | None = None,
    side_px: int = 512,
) -> Picture:
    """Paint region maps over their image, tinted by probability and outlined at 0.5.

    Args:
        store: Of 2D images.
        sample_id: One with maps.
        images: Folder or list that the store was made from; or the pixels in [0, 1]; None: on grey.
        regions: Names of those painted; None: all.
        side_px: Longer side of the picture.

    Raises:
        UsageError: No such sample or region, or one without maps; a size that is none.
        InputMissingError, CorruptError: The image is not there, or is not the one that was localized.
    """
    unknown = [name for name in regions or () if name not in store.regions]
    if unknown:
        raise UsageError(f"region {unknown[0]!r}: not in the store", hint=f"it has {', '.join(store.regions)}")
    if side_px < 1:
        raise UsageError(f"side_px {side_px}: expected 1 or more")
    if len(store.grid) != 2:
        raise UsageError(f"region store: maps of {len(store.grid)} axes, expected 2")
    maps = store.maps(sample_id)
    sample = store.samples[store.row(sample_id)]
    if images is None:
        pixels = np.full((sample.shape or (1, *store.grid))[-2:], _GROUND, np.float32)
    elif isinstance(images, np.ndarray):
        pixels = images
    else:
        pixels = read_localized(sample, find_images([sample], Path(images))).pixels
    colours = region_colours(store.regions)
    shown = store.regions if regions is None else tuple(regions)
    layers = [(maps[store.regions.index(name)], colours[name]) for name in shown]
    return Picture(paint(pixels, layers, side_px=side_px), sample_id, {name: colours[name] for name in shown})


def region_colours(regions: Sequence[str]) -> dict[str, Colour]:
    """The colour that each region has in pictures; they repeat after the last."""
    return {name: REGION_COLOURS[place % len(REGION_COLOURS)] for place, name in enumerate(regions)}


def describe_html(store: RegionStore) -> str:
    """A store as HTML: regions, prompts and counts, and some maps; nothing of its images."""
    outputs, spec = store.card.identity.outputs, store.card.identity.spec
    colours = region_colours(store.regions)
    prompts = {item["name"]: item.get("texts", ()) for item in spec.get("regions", ()) if isinstance(item, Mapping)}
    rows = "".join(
        f"<tr><td>{_dot(colours[item['name']])} <b>{escape(item['name'])}</b></td>"
        f"<td>{escape(', '.join(map(str, prompts.get(item['name'], ()))))}</td>"
        f"<td>{outputs['ok'] - item['empty']:,} of {outputs['ok']:,}</td></tr>"
        for item in outputs["regions"]
    )
    told = f"{outputs['samples']:,} images, {outputs['quarantined']:,} of them quarantined; maps of "
    told += " x ".join(map(str, store.grid))
    if store.grounder is not None:
        told += f"; found by {store.grounder}"
    return (
        f"<div><p><b>Region store</b> {escape(store.path.name)} "
        f"<code>sha256:{store.card.artifact_id[:12]}</code><br>{escape(told)}</p>"
        f"<table><tr><th>region</th><th>words</th><th>images with a map that is not 0</th></tr>{rows}</table>"
        f"{_gallery(store)}<p><i>{escape(NOT_FOR_DIAGNOSIS)}</i></p></div>"
    )


def _gallery(store: RegionStore) -> str:
    """Some samples' maps, spread over the store."""
    places = np.linspace(0, len(store) - 1, min(4 * _GALLERY, len(store))).round().astype(int)
    tried = (store.samples[place] for place in places.tolist() if len(store.grid) == 2)  # not all: it may be a million
    usable = [sample for sample in tried if sample.status == "ok"]
    chosen = [
        usable[place] for place in np.linspace(0, len(usable) - 1, min(_GALLERY, len(usable))).round().astype(int)
    ]
    figures = "".join(
        '<figure style="display:inline-block;margin:4px">'
        f"{picture(paint_sample(store, sample.sample_id, side_px=_GALLERY_PX).pixels, sample.sample_id)}"
        f'<figcaption style="font-size:smaller">{escape(sample.sample_id)}</figcaption></figure>'
        for sample in chosen
    )
    return f"<div>{figures}</div>"


def _dot(colour: Colour) -> str:
    ink: Any = ",".join(map(str, colour))
    return f'<span style="color:rgb({ink})">&#9679;</span>'
