"""Wordings of a region side by side: each is asked alone, and told how far its maps agree with those of the others.

Agreement needs no labels and shows which wordings mean the same to a grounder; it does not show which are right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from shared.coco import Labelled
from shared.errors import DecodeError, PromptError, QuarantineError, UsageError
from shared.images import Image, Source, read_image
from shared.region_layout import HALF, decode_probability
from stage1_localize.answer import Answer, Failure, answer
from stage1_localize.config import LocalizeConfig, part_options
from stage1_localize.contracts import Region
from stage1_localize.evaluate import bootstrap, dice
from stage1_localize.grounders import GROUNDERS
from stage1_localize.parts import Parts, build_parts, resolve
from stage1_localize.score_labels import label_sources, true_pixels

WORDINGS_MAX = 16
"""Of a region: their pairs are compared, and their pictures stand side by side."""
PICTURED_MAX = 8


@dataclass(frozen=True)
class Pictured:
    """An image with the maps of every wording that was asked, for the page."""

    sample_id: str
    pixels: Float32[np.ndarray, "C H W"]
    maps: Mapping[tuple[str, str], Float32[np.ndarray, "s s"]]
    truth: Mapping[str, Bool[np.ndarray, "s s"]]


@dataclass
class _Tally:
    """One region: an entry an image, and what is compared with the truth apart, for not every image has one."""

    groups: list[str] = field(default_factory=list)
    found: list[list[float]] = field(default_factory=list)
    mass: list[Float[np.ndarray, "w"]] = field(default_factory=list)
    pair_dice: list[Float[np.ndarray, "w w"]] = field(default_factory=list)
    pair_any: list[Bool[np.ndarray, "w w"]] = field(default_factory=list)
    products: list[Float[np.ndarray, "w w"]] = field(default_factory=list)
    truth_groups: list[str] = field(default_factory=list)
    truth_dice: list[list[float]] = field(default_factory=list)


def compare_wordings(
    config: LocalizeConfig,
    sources: Sequence[Source],
    *,
    count: int = 32,
    labels: Path | None = None,
    mapping: Sequence[str] = (),
    seed: int = 0,
) -> tuple[dict[str, Any], list[Pictured]]:
    """Ask every wording of every region alone, on some of the images.

    Args:
        config: Regions with the wordings to compare; grounder, segmenter, grid and micro-batch as `localize` has them.
        sources: Images to choose from; with labels, only those are chosen on which a region is annotated.
        count: Images, at most: one from each of so many equal parts of the corpus.
        labels: COCO JSON with outlines.
        mapping: ``region=category`` of the labels, as `join_labels` has it.
        seed: Of the choice and of the bootstrap.

    Returns:
        What is said as JSON: by region ``wordings`` (each with ``refused``, or ``found_share`` of the images,
        ``mass``, the mean of its maps, and with labels ``dice``) and ``pairs`` (``dice`` of maps cut at .5 over the
        images where either finds something, with the number of those, and ``correlation`` of the soft maps over
        all pixels); scores as ``[value, low, high]`` with 95 % intervals from resampled groups. Then some images for
        pictures.

    Raises:
        PromptError: The grounder refuses every wording.
        QuarantineError: None of the images can be used.
        UsageError: No region with two wordings, or too many; labels of other images.
    """
    most = max(len(texts) for texts in config.regions.values())
    if most < 2:
        name, (text,) = next(iter(config.regions.items()))
        raise UsageError(
            f"region '{name}': one wording, expected several to compare",
            hint=f"--set 'regions.{name}=[{text}, another wording]'",
        )
    if most > WORDINGS_MAX:
        raise UsageError(f"a region of {most} wordings: at most {WORDINGS_MAX} are compared at once")
    config = resolve(config)
    parts, asked, refused = _accepted(config)
    truths: Mapping[str, Labelled] = {}
    categories: Mapping[str, tuple[str, ...]] = {}
    warnings: list[str] = []
    if labels is not None:
        known = label_sources(labels, sources, list(config.regions), mapping)
        truths, categories = known.by_sample, known.categories
        warnings += known.warnings
        sources = [source for source in sources if source.sample_id in truths]
    chosen = choose(sources, count, seed)
    tallies: dict[str, _Tally] = {region.name: _Tally() for region in asked}
    pictured: list[Pictured] = []
    failed: dict[str, int] = {}
    used = 0
    for start in range(0, len(chosen), config.micro_batch):
        for source, image, result in _answers(chosen[start : start + config.micro_batch], parts, asked, config.grid_px):
            if isinstance(result, Failure) or image is None:
                reason = result.reason if isinstance(result, Failure) else "unreadable"
                failed[reason] = failed.get(reason, 0) + 1
                continue
            used += 1
            item = truths.get(source.sample_id)
            truth = {} if item is None else _truth(item, categories, config.grid_px)
            for name, tally in tallies.items():
                places = [place for place, region in enumerate(asked) if region.name == name]
                found = [bool((result.box_regions == place).any()) for place in places]
                _count(tally, source.group or source.sample_id, result.maps[places], found, truth.get(name))
            if len(pictured) < PICTURED_MAX:
                maps = decode_probability(result.maps)
                shown = {(region.name, region.texts[0]): maps[place] for place, region in enumerate(asked)}
                pictured.append(Pictured(source.sample_id, image.pixels, shown, truth))
    if not used:
        told = ", ".join(f"{number} {reason}" for reason, number in sorted(failed.items()))
        raise QuarantineError(f"none of the {len(chosen)} images tried can be used: {told}")
    warnings += [f"{number} of {len(chosen)} images were left out: {reason}" for reason, number in failed.items()]
    return {
        "images": used,
        "seed": seed,
        "threshold": 0.5,
        "grounder": parts.described["grounder"],
        "segmenter": parts.described["segmenter"],
        "regions": {
            name: _told(name, texts, asked, refused, tallies.get(name), seed) for name, texts in config.regions.items()
        },
        "warnings": warnings,
    }, pictured


def choose(sources: Sequence[Source], count: int, seed: int) -> list[Source]:
    """One source, by chance, of each of ``count`` equal parts: neighbours in a corpus look alike."""
    edges = np.linspace(0, len(sources), min(count, len(sources)) + 1).round().astype(int)
    rng = np.random.default_rng(seed)
    return [sources[rng.integers(low, high)] for low, high in pairwise(edges)]


def _accepted(config: LocalizeConfig) -> tuple[Parts, list[Region], dict[tuple[str, str], PromptError]]:
    """The parts, a region for each wording that the grounder serves, and why it does not serve the others."""
    every = [Region(region.name, (text,)) for region in config.asked() for text in region.texts]
    refused: dict[tuple[str, str], PromptError] = {}
    try:
        return build_parts(config.grounder, config.segmenter, every), every, refused
    except PromptError:
        cls = GROUNDERS.load(config.grounder.name)
        grounder = cls(part_options("grounder", config.grounder, cls))
    for region in every:
        try:
            grounder.check([region])
        except PromptError as error:
            refused[region.name, region.texts[0]] = error
    asked = [region for region in every if (region.name, region.texts[0]) not in refused]
    if not asked:
        raise next(iter(refused.values()))
    return build_parts(config.grounder, config.segmenter, asked), asked, refused


def _answers(
    sources: Sequence[Source], parts: Parts, asked: Sequence[Region], grid_px: int
) -> list[tuple[Source, Image | None, Answer | Failure]]:
    """All wordings in one call: what a grounder computes of an image alone is computed once."""
    images: dict[int, Image] = {}
    results: dict[int, Answer | Failure] = {}
    for row, source in enumerate(sources):
        try:
            images[row] = read_image(source)
        except DecodeError as error:
            results[row] = Failure(error.reason, "read", str(error))
    ids = {row: source.sample_id for row, source in enumerate(sources)}
    results |= answer(images, ids, list(range(len(sources))), parts, asked, grid_px)
    return [(source, images.get(row), results[row]) for row, source in enumerate(sources)]


def _truth(
    item: Labelled, categories: Mapping[str, tuple[str, ...]], grid_px: int
) -> dict[str, Bool[np.ndarray, "s s"]]:
    """Of the regions that are annotated on an image and no crowd makes unknown."""
    found = {}
    for name, of in categories.items():
        things = [thing for thing in item.things if thing.region in of]
        if things and not item.unknown & set(of):
            pixels = true_pixels(things, item, (grid_px, grid_px))
            if pixels.any():
                found[name] = pixels
    return found


def _count(
    tally: _Tally,
    group: str,
    maps: UInt8[np.ndarray, "w s s"],
    found: list[bool],
    truth: Bool[np.ndarray, "s s"] | None,
) -> None:
    cut = (maps >= HALF).reshape(len(maps), -1)
    both = cut.astype(np.float32) @ cut.astype(np.float32).T
    areas = cut.sum(axis=1)
    total = areas[:, None] + areas[None]
    soft = maps.reshape(len(maps), -1).astype(np.float64) / 254
    tally.groups.append(group)
    tally.found.append([float(each) for each in found])
    tally.mass.append(soft.mean(axis=1))
    tally.pair_any.append(total > 0)
    tally.pair_dice.append(2 * both / np.maximum(total, 1))
    tally.products.append(soft @ soft.T / soft.shape[1])
    if truth is not None:
        tally.truth_groups.append(group)
        tally.truth_dice.append([dice(each.reshape(truth.shape), truth) for each in cut])


def _told(
    name: str,
    texts: Sequence[str],
    asked: Sequence[Region],
    refused: Mapping[tuple[str, str], PromptError],
    tally: _Tally | None,
    seed: int,
) -> dict[str, Any]:
    wordings: dict[str, dict[str, Any]] = {}
    order = [region.texts[0] for region in asked if region.name == name]
    for text in texts:
        if (name, text) in refused:
            error = refused[name, text]
            wordings[text] = {"refused": error.message, "hint": error.hint}
            continue
        assert tally is not None
        at = order.index(text)
        wordings[text] = {
            "found_share": _mean([row[at] for row in tally.found], tally.groups, seed),
            "mass": _mean([float(row[at]) for row in tally.mass], tally.groups, seed),
        }
        if tally.truth_dice:
            wordings[text]["dice"] = _mean([row[at] for row in tally.truth_dice], tally.truth_groups, seed)
            wordings[text]["images_labelled"] = len(tally.truth_dice)
    pairs = []
    for a in range(len(order)):
        for b in range(a + 1, len(order)):
            assert tally is not None
            kept = [image for image, either in enumerate(tally.pair_any) if either[a, b]]
            pair: dict[str, Any] = {"wordings": [order[a], order[b]], "images": len(kept)}
            pair["correlation"] = _correlation(tally, a, b)
            if kept:
                values = [float(tally.pair_dice[image][a, b]) for image in kept]
                pair["dice"] = _mean(values, [tally.groups[image] for image in kept], seed)
            pairs.append(pair)
    groups = 0 if tally is None else len(set(tally.groups))
    return {"groups": groups, "wordings": wordings, "pairs": pairs}


def _correlation(tally: _Tally, a: int, b: int) -> float | None:
    """Pearson's, over the pixels of all images; None where a wording's maps are constant."""
    mean = np.mean(tally.mass, axis=0)
    covariance = np.mean(tally.products, axis=0) - mean[:, None] * mean[None]
    spread = covariance[a, a] * covariance[b, b]
    return round(float(covariance[a, b] / np.sqrt(spread)), 4) if spread > 1e-18 else None


def _mean(values: Sequence[float], groups: Sequence[str], seed: int) -> list[float]:
    columns = np.array([values, np.ones(len(values))]).T
    return bootstrap(columns, groups, lambda sums: sums[:, :1] / np.maximum(sums[:, 1:], 1e-9), seed)[0]
