"""Pictures of region maps and drawn masks: plain arrays in, pixels, ``img`` elements or PNG bytes out."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from shared.artifact import NOT_FOR_DIAGNOSIS

Rgb = UInt8[np.ndarray, "H W 3"]
Colour = tuple[int, int, int]
Field = np.ndarray[Any, Any]

REGION_COLOURS: tuple[Colour, ...] = (
    (255, 176, 32),
    (64, 208, 196),
    (244, 104, 160),
    (146, 156, 255),
    (158, 212, 76),
)
"""Tints of overlays, in the order of the regions; told apart with the common colour-vision deficiencies."""
_TINT = 0.7
_HIDDEN, _HATCH = np.array((27, 34, 46), np.float32), np.array((84, 98, 120), np.float32)
_LUMA = np.array((0.299, 0.587, 0.114), np.float32)
_WEBP_QUALITY = 88


def overlay(
    image: Float[np.ndarray, "*C H W"],
    probability: Float[np.ndarray, "h w"] | None = None,
    hidden: Bool[np.ndarray, "gh gw"] | None = None,
    *,
    colour: Colour = REGION_COLOURS[0],
    side_px: int = 384,
) -> Rgb:
    """Draw an image, tinted where a region is probable, outlined at 0.5, dark and hatched where it is hidden.

    Args:
        image: In [0, 1]; [H, W], or [C, H, W] with C 1 or 3. What is not finite is black.
        probability: Region map in [0, 1]; resampled to the picture. What is not finite is 0.
        hidden: True where the encoder does not see the cell. With it the map is outlined, not tinted.
        colour: Tint, RGB 0..255.
        side_px: Longer side of the picture.

    Returns:
        The picture; its sides keep the image's proportions.
    """
    return paint(image, [] if probability is None else [(probability, colour)], hidden, side_px=side_px)


def paint(
    image: Float[np.ndarray, "*C H W"],
    maps: Sequence[tuple[Field, Colour]] = (),
    hidden: Bool[np.ndarray, "gh gw"] | None = None,
    *,
    side_px: int = 384,
) -> Rgb:
    """`overlay` with any number of region maps, each in its colour, the later above the earlier."""
    height, width = image.shape[-2:]
    scale = side_px / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = _resized(image, size)
    fields = [(_field(probability, size), np.array(colour, np.float32)) for probability, colour in maps]
    if hidden is None:
        for field, colour in fields:
            # The colour keeps the picture's light and dark, so that what lies under a region can still be read.
            ink = colour * (0.4 + 0.6 * (pixels @ _LUMA) / 255)[..., None]
            pixels += (_TINT * field)[..., None] * (ink - pixels)
    else:
        _hide(pixels, hidden)
    line_px = max(1.5, max(size) / 200)
    for field, _ in fields:
        pixels *= 1 - 0.6 * _outline(field, 2.5 * line_px)[..., None]  # a dark casing: lines show on bright tissue too
    for field, colour in fields:
        pixels += _outline(field, line_px)[..., None] * (colour - pixels)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def contour(pixels: Rgb, field: Field, colour: Colour) -> Rgb:
    """A picture with the line at 0.5 of a map drawn on it in a colour, cased in dark so that it shows anywhere.

    Args:
        pixels: The picture.
        field: Probability or truth in [0, 1], any size.
        colour: RGB 0..255.
    """
    size = pixels.shape[1], pixels.shape[0]
    line_px = max(1.5, max(size) / 200)
    drawn, sized = pixels.astype(np.float32), _field(field, size)
    drawn *= 1 - 0.6 * _outline(sized, 2.5 * line_px)[..., None]
    drawn += _outline(sized, line_px)[..., None] * (np.array(colour, np.float32) - drawn)
    return np.asarray(np.clip(drawn + 0.5, 0, 255).astype(np.uint8))


def _resized(image: Field, size: tuple[int, int]) -> Field:
    shown = np.clip(np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0), 0, 1)
    planes = shown[None] if shown.ndim == 2 else shown
    planes = np.repeat(planes[:1], 3, 0) if len(planes) < 3 else planes[:3]
    base = Image.fromarray((planes.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8))
    return np.array(base.resize(size, Image.Resampling.BICUBIC), np.float32)


def _field(probability: Field, size: tuple[int, int]) -> Field:
    known = np.clip(np.nan_to_num(probability.astype(np.float32), posinf=0, neginf=0), 0, 1)
    return np.asarray(Image.fromarray(known).resize(size, Image.Resampling.BILINEAR))


def _outline(field: Field, width_px: float) -> Field:
    """Share of each pixel that the line at 0.5 covers: its distance to the line is difference over slope."""
    if min(field.shape) < 2:
        return np.zeros_like(field)
    slope = np.hypot(*np.gradient(field))
    distance = np.abs(field - 0.5) / np.maximum(slope, 1e-3)
    return np.clip(width_px / 2 + 0.5 - distance, 0, 1) * (slope > 1e-3)


def _hide(pixels: Field, hidden: Field) -> None:
    """Darken and hatch hidden cells in place, and rule their borders."""
    height, width = pixels.shape[:2]
    rows = np.arange(height) * hidden.shape[0] // height
    columns = np.arange(width) * hidden.shape[1] // width
    dark = hidden[rows][:, columns]
    stride = max(height, width) / 48
    phase = (np.arange(height)[:, None] + np.arange(width)[None]) % stride
    hatch = np.clip(stride / 5 - np.abs(phase - stride / 2), 0, 1) * 0.5
    ground = _HIDDEN + hatch[..., None] * (_HATCH - _HIDDEN)
    edges = (np.diff(rows, prepend=rows[0]) > 0)[:, None] | (np.diff(columns, prepend=columns[0]) > 0)[None]
    pixels[dark] = 0.15 * pixels[dark] + 0.85 * ground[dark]
    pixels[edges & dark] *= 0.55
    pixels[edges & ~dark] = 0.88 * pixels[edges & ~dark] + 0.12 * 128


def png(pixels: Rgb) -> bytes:
    """Encode as PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def webp(pixels: Rgb) -> bytes:
    """Encode as WebP, a quarter of a PNG's size and a little lossy: for pages that hold many pictures."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="WEBP", quality=_WEBP_QUALITY, method=4)
    return buffer.getvalue()


def data_uri(raw: bytes, kind: str) -> str:
    """Bytes of a picture as a URI that carries them.

    Args:
        raw: Encoded picture.
        kind: ``png`` or ``webp``.
    """
    return f"data:image/{kind};base64," + base64.b64encode(raw).decode()


def picture(pixels: Rgb, caption: str = "") -> str:
    """An ``img`` element that carries its pixels; the caption is its alternative text."""
    height, width = pixels.shape[:2]
    alt = escape(caption, quote=True)
    return f'<img src="{data_uri(webp(pixels), "webp")}" width="{width}" height="{height}" alt="{alt}">'


def map_uri(probability: Float[np.ndarray, "h w"], *, side_px: int = 128) -> str:
    """A region map as a small grey PNG, 0..254 for 0..1: what the page's threshold reads."""
    height, width = probability.shape
    scale = min(1.0, side_px / max(height, width))
    field = _field(probability, (max(1, round(width * scale)), max(1, round(height * scale))))
    return data_uri(png((field * 254 + 0.5).astype(np.uint8)), "png")


def hero(
    image: Float[np.ndarray, "*C H W"],
    prompts: Mapping[str, Sequence[str]],
    maps: Mapping[str, Field],
    hidden: Bool[np.ndarray, "gh gw"],
    reconstruction: Float[np.ndarray, "*C H W"],
    *,
    side_px: int = 340,
) -> bytes:
    """The picture that opens the README: image, words, region map, drawn mask, reconstruction.

    Args:
        image: In [0, 1].
        prompts: Region -> its wordings; its first ones are written out.
        maps: Region -> probability in [0, 1]; each region has the colour of its place.
        hidden: True where the encoder does not see the cell.
        reconstruction: In [0, 1].
        side_px: Of a picture.

    Returns:
        PNG bytes, about 5 pictures wide, on a dark ground with round corners (transparent outside).
    """
    colours = dict(zip(maps, REGION_COLOURS * (1 + len(maps) // len(REGION_COLOURS)), strict=False))
    layers = [(probability, colours[name]) for name, probability in maps.items()]
    share = f"{hidden.mean():.0%} hidden from the encoder"
    panels = [
        ("An image", "nothing but pixels", paint(image, side_px=side_px)),
        ("Words", "what matters, said in text", None),
        ("Region map", "where the words are", paint(image, layers, side_px=side_px)),
        ("Drawn mask", share, paint(image, layers, hidden, side_px=side_px)),
        ("Reconstruction", "what the model fills in", paint(reconstruction, side_px=side_px)),
    ]
    gap, top, foot = 34, 34, 132
    tall = max(pixels.shape[0] for _, _, pixels in panels if pixels is not None)
    width = gap + sum((pixels.shape[1] if pixels is not None else side_px * 3 // 4) + gap for *_, pixels in panels)
    canvas = Image.new("RGBA", (width, top + tall + foot))
    draw = ImageDraw.Draw(canvas)
    draw.rounded_rectangle((0, 0, width - 1, top + tall + foot - 1), 28, (15, 19, 26, 255))
    x = gap
    for index, (name, told, pixels) in enumerate(panels):
        wide = side_px * 3 // 4 if pixels is None else pixels.shape[1]
        if pixels is None:
            _words(draw, prompts, colours, (x, top, wide, tall))
        else:
            high = pixels.shape[0]
            mask = Image.new("L", (wide, high))
            ImageDraw.Draw(mask).rounded_rectangle((0, 0, wide - 1, high - 1), 14, 255)
            canvas.paste(Image.fromarray(pixels), (x, top + (tall - high) // 2), mask)
        if index:
            _arrow(draw, x - gap / 2, top + tall / 2)
        draw.text((x + 2, top + tall + 16), name, (240, 243, 248), font=ImageFont.load_default(size=27))
        draw.text((x + 2, top + tall + 52), told, (163, 174, 190), font=_fitting(draw, told, 20, wide))
        x += wide + gap
    font = ImageFont.load_default(size=17)
    draw.text((width - gap, top + tall + foot - 22), NOT_FOR_DIAGNOSIS, (120, 132, 150), font=font, anchor="rm")
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def sheet(panels: Sequence[tuple[str, str, Rgb]], foot: str = "") -> bytes:
    """Pictures side by side, each with a name and a line about it.

    Args:
        panels: Name, line, picture.
        foot: A line below all of them.

    Returns:
        PNG bytes on a dark ground.
    """
    gap = 24
    tall = max(pixels.shape[0] for _, _, pixels in panels)
    width = gap + sum(pixels.shape[1] + gap for *_, pixels in panels)
    canvas = Image.new("RGB", (width, tall + 132), (15, 19, 26))
    draw = ImageDraw.Draw(canvas)
    x = gap
    for name, told, pixels in panels:
        high, wide = pixels.shape[:2]
        canvas.paste(Image.fromarray(pixels), (x, gap + (tall - high) // 2))
        draw.text((x, gap + tall + 12), name, (240, 243, 248), font=_fitting(draw, name, 22, wide))
        draw.text((x, gap + tall + 42), told, (163, 174, 190), font=_fitting(draw, told, 17, wide))
        x += wide + gap
    font = ImageFont.load_default(size=15)
    draw.text((gap, tall + 110), foot, (120, 132, 150), font=_fitting(draw, foot, 15, width // 2), anchor="lm")
    draw.text((width - gap, tall + 110), NOT_FOR_DIAGNOSIS, (120, 132, 150), font=font, anchor="rm")
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _words(
    draw: ImageDraw.ImageDraw,
    prompts: Mapping[str, Sequence[str]],
    colours: Mapping[str, Colour],
    place: tuple[int, int, int, int],
) -> None:
    """Up to four wordings a region in its colour, in the middle of a place (x, y, width, height)."""
    x, y, wide, tall = place
    lines: list[tuple[str, Colour, int]] = []
    for name, texts in prompts.items():
        colour = colours.get(name, REGION_COLOURS[0])
        for index, text in enumerate(texts[: max(1, 4 // len(prompts))]):
            lines.append((f"“{text}”", colour if index == 0 else (150, 160, 176), 27 if index == 0 else 22))
    step = min(46, tall // max(1, len(lines)))
    y += (tall - step * len(lines)) // 2
    for text, colour, size in lines:
        font = _fitting(draw, text, size, wide)
        draw.text((x + wide / 2, y + step / 2), text, colour, font=font, anchor="mm")
        y += step


def _arrow(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.polygon([(x - 5, y - 9), (x + 6, y), (x - 5, y + 9)], fill=(110, 122, 140))


def _fitting(draw: ImageDraw.ImageDraw, text: str, size: int, width_px: int) -> Any:
    """The default font, as large as wanted, smaller where the text would not fit."""
    while size > 11 and draw.textlength(text, font=ImageFont.load_default(size=size)) > width_px:
        size -= 1
    return ImageFont.load_default(size=size)
