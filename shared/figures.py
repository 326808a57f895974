"""Pictures of region maps and masks, and small charts as SVG: plain arrays in, bytes or text out."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

Rgb = UInt8[np.ndarray, "H W 3"]

REGION_COLOURS = ((255, 176, 32), (64, 200, 190), (236, 96, 150), (140, 150, 255), (150, 205, 70))
"""Tints of overlays, in the order of the regions; told apart with the common colour-vision deficiencies."""
_HIDDEN = np.array((26, 32, 44), np.float32)
_LINES = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)")


def overlay(
    image: Float[np.ndarray, "C H W"],
    probability: Float[np.ndarray, "h w"] | None = None,
    hidden: Bool[np.ndarray, "gh gw"] | None = None,
    *,
    colour: tuple[int, int, int] = REGION_COLOURS[0],
    side_px: int = 256,
) -> Rgb:
    """Draw an image, tinted where a region is probable, outlined at 0.5, dark where it is hidden.

    Args:
        image: In [0, 1], C 1 or 3.
        probability: Region map in [0, 1]; resampled to the picture.
        hidden: True where the encoder does not see the cell.
        colour: Tint, RGB 0..255.
        side_px: Longer side of the picture.

    Returns:
        The picture; its sides keep the image's proportions.
    """
    _, height, width = image.shape
    scale = side_px / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    grey = np.clip(np.nan_to_num(image), 0, 1)
    rgb = np.repeat(grey, 3, 0) if len(grey) == 1 else grey[:3]
    base = Image.fromarray((rgb.transpose(1, 2, 0) * 255).astype(np.uint8))
    pixels = np.asarray(base.resize(size, Image.Resampling.BICUBIC), np.float32)
    if probability is not None:
        chance = Image.fromarray(np.clip(probability, 0, 1).astype(np.float32))
        field = np.asarray(chance.resize(size, Image.Resampling.BILINEAR))
        pixels += (0.5 * field)[..., None] * (np.array(colour, np.float32) - pixels)
        pixels[_outline(field >= 0.5)] = colour
    if hidden is not None:
        rows = np.arange(size[1]) * hidden.shape[0] // size[1]
        columns = np.arange(size[0]) * hidden.shape[1] // size[0]
        dark = hidden[rows][:, columns]
        pixels[dark] = 0.12 * pixels[dark] + 0.88 * _HIDDEN
        edges = (np.diff(rows, prepend=rows[0]) > 0)[:, None] | (np.diff(columns, prepend=columns[0]) > 0)[None]
        pixels[edges] = 0.8 * pixels[edges] + 0.2 * 128
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _outline(inside: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels of a shape that have a neighbour outside of it."""
    padded = np.pad(inside, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~inner


def png(pixels: Rgb) -> bytes:
    """Encode as PNG; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def picture(pixels: Rgb, caption: str = "") -> str:
    """An ``img`` element that carries its pixels."""
    uri = "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
    height, width = pixels.shape[:2]
    return f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(caption, quote=True)}">'


def strip(panels: Sequence[tuple[str, Rgb]], *, title: str = "", gap_px: int = 14) -> bytes:
    """Pictures of equal height side by side, a caption under each: the picture that opens a README.

    Args:
        panels: Caption and picture.
        title: A line above them.
        gap_px: Space around each.

    Returns:
        PNG bytes on a dark ground.
    """
    font, head = ImageFont.load_default(size=17), ImageFont.load_default(size=20)
    height = max(pixels.shape[0] for _, pixels in panels)
    top = 44 if title else gap_px
    width = gap_px + sum(pixels.shape[1] + gap_px for _, pixels in panels)
    canvas = Image.new("RGB", (width, top + height + 44), (17, 21, 28))
    draw = ImageDraw.Draw(canvas)
    draw.text((gap_px, 11), title, (236, 240, 246), font=head)
    x = gap_px
    for caption, pixels in panels:
        canvas.paste(Image.fromarray(pixels), (x, top))
        draw.text((x, top + height + 10), caption, (172, 182, 196), font=font)
        x += pixels.shape[1] + gap_px
    return png(np.asarray(canvas))


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, y_label: str, zero: bool = False
) -> str:
    """Lines over a common axis, as SVG.

    Args:
        series: Name -> x and y; points that are not finite are left out.
        x_label: With unit.
        y_label: With unit.
        zero: Let the y axis begin at 0.

    Returns:
        An ``svg`` element, or a sentence where nothing can be drawn.
    """
    lines = {
        name: [(float(a), float(b)) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
        for name, (x, y) in series.items()
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return '<p class="muted">Nothing was recorded.</p>'
    width, height, left, right, top, bottom = 520, 250, 58, 12, 12, 42
    x0, x1 = _span([point[0] for point in points])
    y0, y1 = _span([point[1] for point in points] + ([0.0] if zero else []))
    ticks_y, ticks_x = _ticks(y0, y1), _ticks(x0, x1)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return (
            left + (point[0] - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (point[1] - y0) / (y1 - y0) * (height - top - bottom),
        )

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label, quote=True)}">'
    ]
    for tick in ticks_y:
        _, y = at((x0, tick))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in ticks_x:
        x, _ = at((tick, y0))
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 17}" text-anchor="middle">{_number(tick)}</text>')
    for colour, (name, line) in zip(_LINES * (1 + len(lines) // 5), lines.items(), strict=False):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, line))
        if len(line) == 1:
            x, y = at(line[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>')
        parts.append(f'<polyline points="{path}" style="stroke:{colour}"><title>{escape(name)}</title></polyline>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 7}" text-anchor="middle">{escape(x_label)}</text></svg>')
    return "".join(parts) + _legend(list(lines), y_label)


def interval_chart(rows: Sequence[tuple[str, float, float, float]], *, low: float = 0.0, high: float = 1.0) -> str:
    """Values with intervals, one line each, as SVG.

    Args:
        rows: Label, value, lower and upper end.
        low: Left end of the axis.
        high: Right end.
    """
    left, width, row_px = 190, 520, 30
    height = row_px * len(rows) + 26

    def at(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (width - left - 20)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="values with intervals">']
    for tick in _ticks(low, high):
        x = at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{_number(tick)}</text>')
    for index, (label, value, lower, upper) in enumerate(rows):
        y = row_px * index + 18
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        parts.append(f'<line class="bar" x1="{at(lower):.1f}" x2="{at(upper):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{at(value):.1f}" cy="{y}" r="5"><title>{value:.3f}</title></circle>')
    return "".join(parts) + "</svg>"


def histogram(values: Sequence[float], *, x_label: str, bins: int = 20) -> str:
    """How often values between 0 and 1 occur, as SVG bars."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if len(finite) == 0:
        return '<p class="muted">Nothing was recorded.</p>'
    counts, _ = np.histogram(np.clip(finite, 0, 1), bins=bins, range=(0, 1))
    width, height, bottom = 340, 130, 36
    parts = [f'<svg class="chart small" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(x_label)}">']
    for index, count in enumerate(counts):
        tall = (height - bottom - 8) * count / counts.max()
        x, wide = 10 + index * (width - 20) / bins, (width - 20) / bins - 1.5
        parts.append(
            f'<rect class="column" x="{x:.1f}" y="{height - bottom - tall:.1f}" width="{wide:.1f}" '
            f'height="{tall:.1f}"><title>{count}</title></rect>'
        )
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = 10 + share * (width - 20)
        parts.append(f'<text x="{x:.1f}" y="{height - 20}" text-anchor="{anchor}">{share:.0%}</text>')
    parts.append(f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text></svg>')
    return "".join(parts)


def _legend(names: Sequence[str], y_label: str) -> str:
    items = "".join(
        f'<span><i style="background:{_LINES[index % 5]}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    return f'<p class="legend"><b>{escape(y_label)}</b>{items}</p>'


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers between two ends."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [first_step * step for first_step in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}" if value else "0"
