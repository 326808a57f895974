"""Rows of pictures for reports: what an image is, where its regions are, what was hidden, what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from shared.figures import REGION_COLOURS, Colour, contour, map_uri, overlay, paint, picture
from shared.page import chips, select

SOFT = "the tint shows the probability"
_SIDE_PX = 320
_PANELS_MAX = 6
_TRUE: Colour = (236, 240, 246)
_FRESH = 'autocomplete="off"'  # a page that is loaded again shows all pictures; so must its controls


@dataclass(frozen=True)
class Example:
    """One image with what was made of it.

    Attributes:
        sample_id: Shown above the pictures.
        image: Float [C, H, W] in [0, 1].
        maps: Region name -> float [h, w] in [0, 1].
        hidden: Bool [gh, gw], or None.
        reconstruction: Float [C, H, W] in [0, 1], or None.
        why: Why it is shown -> the figures behind it, perhaps none; galleries can be filtered by it.
        scores: Region -> best score of its detections in [0, 1], of regions that were found; None: not known.
    """

    sample_id: str
    image: np.ndarray[Any, Any]
    maps: Mapping[str, np.ndarray[Any, Any]]
    hidden: np.ndarray[Any, Any] | None = None
    reconstruction: np.ndarray[Any, Any] | None = None
    why: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Case:
    """One image with what a model said of it.

    Attributes:
        sample_id: Shown under the picture.
        image: Float [C, H, W] in [0, 1].
        label: What it is.
        predicted: What the model said.
        probability: Of what it said, 0 to 1.
    """

    sample_id: str
    image: np.ndarray[Any, Any]
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Outlined:
    """One image with what is there and what a model found.

    Attributes:
        sample_id: Shown under the picture.
        image: Float [C, H, W] in [0, 1].
        truth: Float [H, W] in [0, 1] of each thing that is there.
        found: Likewise of each that the model found.
        told: A few words.
    """

    sample_id: str
    image: np.ndarray[Any, Any]
    truth: Sequence[np.ndarray[Any, Any]]
    found: Sequence[np.ndarray[Any, Any]]
    told: str = ""


def gallery(examples: Iterable[Example], *, controls: bool = True) -> str:
    """A row of pictures an example: image, region maps, drawn mask, reconstruction.

    Args:
        examples: In the order shown.
        controls: With a script, a slider shows what lies above a threshold, regions can be left out, and images
            filtered by score and by why they are shown; the maps travel in the page for that.
    """
    shown = list(examples)
    if not shown:
        return '<p class="muted">No image to show.</p>'
    colours = _colours(shown)
    controls = controls and bool(colours)
    panels = max(_count(item) for item in shown)
    rows = "".join(
        f'<div class="case"><h3>{escape(item.sample_id)}</h3>{_why(item)}'
        f'<div class="row">{_panels(item, colours, controls)}</div></div>'
        for item in shown
    )
    bar, kind = (_controls(shown, colours), "gallery") if controls else ("", "still")
    # On a phone, rows of two or three: the count that leaves no picture alone.
    phone = 2 if panels in (2, 4) else 3
    grid = f'<div class="cases" style="--panels:{min(panels, _PANELS_MAX)};--phone:{phone}">{rows}</div>'
    return f'<div class="{kind}">{bar}{grid}{_key(shown, colours)}</div>'


def story(example: Example, prompts: Mapping[str, Sequence[str]]) -> str:
    """One image's way through the tool, numbered: image, words, region maps, drawn mask, reconstruction.

    Args:
        example: What is None in it is left out.
        prompts: Region -> its wordings.
    """
    colours = _colours([example])
    layers = [(probability, colours[name]) for name, probability in example.maps.items()]
    said = "".join(
        f'<span class="chip">{_dot(colours.get(name))}{escape(text)}</span>'
        for name, texts in prompts.items()
        for text in texts[: max(2, 8 // max(1, len(prompts)))]
    )
    steps = [
        ("An image", picture(paint(example.image, side_px=_SIDE_PX), "image"), "as the encoder would see it"),
        ("Words", f'<div class="says">{said}</div>', "what matters, in text"),
        ("Region map", picture(paint(example.image, layers, side_px=_SIDE_PX), "region map"), "where the words are"),
    ]
    if example.hidden is not None:
        drawn = paint(example.image, layers, example.hidden, side_px=_SIDE_PX)
        steps.append(
            ("Drawn mask", picture(drawn, "drawn mask"), f"{example.hidden.mean():.0%} hidden, {_within(example)}")
        )
    if example.reconstruction is not None:
        filled = picture(paint(example.reconstruction, side_px=_SIDE_PX), "reconstruction")
        steps.append(("Reconstruction", filled, "hidden cells as the model fills them"))
    items = "".join(
        f"<li><h3>{name}</h3><figure>{body}<figcaption>{escape(told)}</figcaption></figure></li>"
        for name, body, told in steps
    )
    return f'<ol class="story">{items}</ol>'


def cases(items: Iterable[Case]) -> str:
    """Images with label and prediction, e.g. those where a model was most sure and wrong."""
    figures = "".join(
        f"<figure>{picture(paint(item.image, side_px=_SIDE_PX), f'{item.sample_id}: {item.label}')}<figcaption>"
        f"<b>{escape(item.label)}</b> taken for <b>{escape(item.predicted)}</b> at {item.probability:.0%}"
        f"<br>{escape(item.sample_id)}</figcaption></figure>"
        for item in items
    )
    return f'<div class="row few">{figures}</div>' if figures else '<p class="muted">No case to show.</p>'


def outlined(items: Iterable[Outlined]) -> str:
    """Images with the outlines of what is there, light, and of what a model found, orange."""
    figures = ""
    for item in items:
        pixels = paint(item.image, side_px=_SIDE_PX)
        for fields, colour in ((item.truth, _TRUE), (item.found, REGION_COLOURS[0])):
            for field_ in fields:
                pixels = contour(pixels, field_, colour)
        caption = f"<figcaption><b>{escape(item.told)}</b><br>{escape(item.sample_id)}</figcaption>"
        figures += f"<figure>{picture(pixels, f'{item.sample_id}: {item.told}')}{caption}</figure>"
    return f'<div class="row few">{figures}</div>' if figures else '<p class="muted">No case to show.</p>'


def wordings(prompts: Mapping[str, Sequence[str]]) -> str:
    """Regions with the colour they have in pictures, and their wordings."""
    colours = dict(zip(prompts, _palette(len(prompts)), strict=True))
    return "".join(
        f"<p>{_dot(colours[name])}<b>{escape(name)}</b> &ensp;{chips(texts)}</p>" for name, texts in prompts.items()
    )


def _palette(count: int) -> list[Colour]:
    return [REGION_COLOURS[place % len(REGION_COLOURS)] for place in range(count)]


def _colours(examples: Sequence[Example]) -> dict[str, Colour]:
    names = list(dict.fromkeys(name for item in examples for name in item.maps))
    return dict(zip(names, _palette(len(names)), strict=True))


def _panels(item: Example, colours: Mapping[str, Colour], controls: bool) -> str:
    figures = [_figure(paint(item.image, side_px=_SIDE_PX), "image", "")]
    for name, region_map in item.maps.items():
        colour = colours[name]
        drawn = overlay(item.image, region_map, colour=colour, side_px=_SIDE_PX)
        share = float((np.nan_to_num(region_map) >= 0.5).mean())
        attributes = f' data-region="{escape(name, quote=True)}"'
        if controls:
            attributes += f' data-rgb="{",".join(map(str, colour))}" data-map="{map_uri(region_map)}"'
        told = ""
        if item.scores is not None:
            score = item.scores.get(name)
            words = "no box" if score is None else f"score {score:.2f}"
            told = f' <span class="unbroken">{words}</span>'
            attributes += f' data-score="{0 if score is None else score:.4f}"'
        figures.append(
            f"<figure{attributes}>{picture(drawn, f'region map: {name}')}<figcaption>{_dot(colour)}"
            f'<b>{escape(name)}</b> <span class="share">{share:.1%}</span>'
            f"{told}</figcaption></figure>"
        )
    if item.hidden is not None:
        layers = [(region_map, colours[name]) for name, region_map in item.maps.items()]
        drawn = paint(item.image, layers, item.hidden, side_px=_SIDE_PX)
        figures.append(_figure(drawn, "drawn mask", f"{item.hidden.mean():.0%} hidden, {_within(item)}"))
    if item.reconstruction is not None:
        figures.append(_figure(paint(item.reconstruction, side_px=_SIDE_PX), "reconstruction", ""))
    return "".join(figures)


def _within(item: Example) -> str:
    """How much of the regions is hidden, by the cells whose middle lies in one."""
    if item.hidden is None or not item.maps:
        return "no region"
    high, wide = item.hidden.shape
    inside = np.zeros((high, wide), bool)
    for region_map in item.maps.values():
        rows = (np.arange(high) * 2 + 1) * region_map.shape[0] // (2 * high)
        columns = (np.arange(wide) * 2 + 1) * region_map.shape[1] // (2 * wide)
        inside |= np.nan_to_num(region_map[rows][:, columns]) >= 0.5
    return f"{item.hidden[inside].mean():.0%} of the region" if inside.any() else "no region"


def _count(item: Example) -> int:
    return 1 + len(item.maps) + (item.hidden is not None) + (item.reconstruction is not None)


def _why(item: Example) -> str:
    labels = "".join(
        f'<span class="chip" data-why="{escape(why, quote=True)}"><b>{escape(why)}</b>'
        f"{f' {escape(told)}' if told else ''}</span>"
        for why, told in item.why.items()
    )
    return f'<p class="why">{labels}</p>' if labels else ""


def _controls(examples: Sequence[Example], colours: Mapping[str, Colour]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" {_FRESH} checked value="{escape(name, quote=True)}">{_dot(colour)}'
        f"{escape(name)}</label>"
        for name, colour in colours.items()
    )
    filters = ""
    if any(item.scores is not None for item in examples):
        filters += (
            f'<label>Score <input type="range" class="least" {_FRESH} min="0" max="100" step="1" value="0" '
            'aria-label="least best score"></label><output class="least-told">any score</output>'
        )
    reasons = dict.fromkeys(why for item in examples for why in item.why)
    if len(reasons) > 1:
        filters += select("Why shown", reasons)
    if filters:
        filters += '<output class="count"></output>'
    return (
        f'<div class="controls" hidden><label>Threshold <input type="range" class="threshold" {_FRESH} min="0" '
        f'max="95" step="5" value="0" aria-label="probability threshold"></label><output>{SOFT}</output>'
        f"{boxes if len(colours) > 1 else ''}{filters}</div>"
    )


def _key(examples: Sequence[Example], colours: Mapping[str, Colour]) -> str:
    if not colours:
        return ""
    red, green, blue = next(iter(colours.values()))
    ramp = f"linear-gradient(90deg,rgba({red},{green},{blue},0),rgb({red},{green},{blue}))"
    told = (
        f'<span class="unbroken">0 <span class="ramp" style="background:{ramp}"></span> 1 probability</span>'
        "<span>Line at 0.5; percentages: share of the image at 0.5 or more."
    )
    if any(item.scores is not None for item in examples):
        told += " Score: of the region's best box."
    if any(item.hidden is not None for item in examples):
        told += " Dark hatched cells were hidden from the encoder."
    return f'<div class="key-bar">{told}</span></div>'


def _figure(pixels: np.ndarray[Any, Any], what: str, told: str) -> str:
    return f"<figure>{picture(pixels, what)}<figcaption><b>{what}</b> {escape(told)}</figcaption></figure>"


def _dot(colour: Colour | None) -> str:
    return f'<i class="dot" style="--region:rgb({",".join(map(str, colour))})"></i>' if colour else ""
