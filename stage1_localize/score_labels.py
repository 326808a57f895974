"""Which labels speak of which rows of a store: names matched, regions mapped to categories, truth in the map frame."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch.nn.functional import interpolate

from shared.coco import CocoLabels, Labelled, Thing, read_coco
from shared.errors import UsageError
from shared.images import Source
from shared.outlines import Outline, draw
from shared.regions import RegionStore


@dataclass(frozen=True)
class Truth:
    """Labels joined with a store.

    Attributes:
        labels: As read.
        rows: Row of the store -> its image in the labels; rows without maps are left out.
        categories: Region -> its categories; regions without any are not scored.
        ignored: Categories whose places count neither for nor against a region.
        quarantined: Labelled images that the store has without maps.
        elsewhere: Labelled images that the store does not have.
        warnings: What a reader should know.
    """

    labels: CocoLabels
    rows: Mapping[int, Labelled]
    categories: Mapping[str, tuple[str, ...]]
    ignored: frozenset[str]
    quarantined: int
    elsewhere: int
    warnings: tuple[str, ...]

    def outlined(self, region: str) -> bool:
        """Whether the region's truth has pixels; else its boxes alone are scored."""
        return set(self.categories[region]) <= self.labels.outlined


def join_labels(
    store: RegionStore,
    labels: Path,
    *,
    sources: Sequence[Source] = (),
    mapping: Sequence[str] = (),
    ignore: Sequence[str] = (),
    exhaustive: bool = False,
) -> Truth:
    """Read labels and find out what they say of a store.

    Args:
        store: With 2D maps.
        labels: COCO JSON; ``file_name`` is a sample id of the store, or what the user calls it (see ``sources``).
        sources: The store's images, where the labels name files that the store knows by pseudonym.
        mapping: ``region=category``, several for one region unite; without any, names that are alike belong together.
        ignore: Categories whose places are left out of every score.
        exhaustive: Whether an image without an annotation of a region does not hold it; else it says nothing.

    Raises:
        InputMissingError: No such file.
        UsageError: Labels that do not hold together, of other images or other sizes; names that are not known.
    """
    if len(store.grid) != 2:
        raise UsageError(f"{store.path.name}: its maps are of volumes; scores are for images")
    read = read_coco(labels, None)
    rows, quarantined, elsewhere = _rows(store, read, sources)
    if not rows:
        raise UsageError(
            f"labels {labels.name}: none of their {len(read.images)} images is a sample with maps in {store.path.name}",
            hint="file_name must be a sample id of the store, see its samples.jsonl; or give the --images it was "
            "made from",
        )
    for row, item in rows.items():
        shape = store.samples[row].shape
        if shape is not None and tuple(shape[-2:]) != (item.height, item.width):
            raise UsageError(
                f"labels {labels.name}: image {item.image_id} is {item.width}x{item.height} px there, "
                f"{shape[-1]}x{shape[-2]} px in the store",
                hint="outlines must be drawn on the upright image as it was localised",
            )
    categories, left = _categories(store.regions, read.regions, mapping)
    ignored = frozenset(_known(name, read.regions, f"--ignore '{name}'") for name in ignore)
    used = {name for names in categories.values() for name in names}
    if used & ignored:
        raise UsageError(f"category '{min(used & ignored)}' is both scored and ignored")
    if not exhaustive and not any(thing.region in used for item in rows.values() for thing in item.things):
        raise UsageError(
            f"labels {labels.name}: no annotation of {', '.join(sorted(used))} on an image of the store",
            hint="where no annotation means not there, say --exhaustive; else see --map",
        )
    warnings = list(read.warnings)
    if left:
        warnings.append(f"not scored, for no category of the labels has their name: {', '.join(left)}")
    unused = [name for name in read.regions if name not in used | ignored]
    if unused:
        warnings.append(f"categories that no region is compared with: {', '.join(unused)}")
    if elsewhere:
        warnings.append(f"{elsewhere} of {len(read.images)} labelled images are not in the store")
    if quarantined:
        warnings.append(f"{quarantined} labelled images were quarantined and have no maps: they are not scored")
    return Truth(read, rows, categories, ignored, quarantined, elsewhere, tuple(warnings))


@dataclass(frozen=True)
class Annotated:
    """Labels joined with images that no store holds yet: by sample id, of those on which a region is annotated."""

    by_sample: Mapping[str, Labelled]
    categories: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...]


def label_sources(
    labels: Path, sources: Sequence[Source], regions: Sequence[str], mapping: Sequence[str] = ()
) -> Annotated:
    """Read labels and find the images of which they say something, with outlines.

    Args:
        labels: COCO JSON; ``file_name`` is a sample id, or what the user calls the file.
        sources: The images.
        regions: Names asked for.
        mapping: As `join_labels`.

    Raises:
        InputMissingError: No such file.
        UsageError: Labels that do not hold together, have no outlines, or speak of none of these images or regions.
    """
    read = read_coco(labels, None)
    categories, left = _categories(regions, read.regions, mapping)
    boxes = [region for region, names in categories.items() if not set(names) <= read.outlined]
    categories = {region: names for region, names in categories.items() if region not in boxes}
    if not categories:
        raise UsageError(
            f"labels {labels.name}: no outlines of {', '.join(boxes)}",
            hint="maps are compared with outlines, not boxes",
        )
    used = {name for names in categories.values() for name in names}
    ids = {unicodedata.normalize("NFC", s.known_as): s.sample_id for s in sources if s.known_as}
    ids |= {source.sample_id: source.sample_id for source in sources}
    named = {ids[item.source.sample_id]: item for item in read.images if item.source.sample_id in ids}
    by_sample = {name: item for name, item in named.items() if any(thing.region in used for thing in item.things)}
    if not by_sample:
        raise UsageError(
            f"labels {labels.name}: no annotation of {', '.join(sorted(used))} on any of the images "
            f"({len(named)} of {len(read.images)} labelled images are among them)",
            hint="file_name is a path relative to the folder of --images, or a sample id of its list",
        )
    told = [f"no category of the labels has its name: {name}" for name in left]
    told += [f"region '{name}': not compared with the labels, which have no outlines of it" for name in boxes]
    return Annotated(by_sample, categories, tuple(told))


def truth_map(things: Sequence[Thing], item: Labelled, grid: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """Share of each map pixel that the union of some things covers, [0, 1]."""
    union = np.zeros((item.height, item.width), np.float32)
    for thing in things:
        x0, y0, x1, y1 = thing.box_xyxy_px
        outline = thing.outline or Outline(polygons=((x0, y0, x1, y0, x1, y1, x0, y1),))
        np.maximum(union, draw(outline, item.height, item.width), out=union)
    sized = interpolate(torch.from_numpy(union)[None, None], grid, mode="bilinear", antialias=True)
    return np.asarray(sized[0, 0].clamp_(0, 1).numpy())


def true_pixels(things: Sequence[Thing], item: Labelled, grid: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Map pixels that things cover by half or more."""
    return truth_map(things, item, grid) >= 0.5 if things else np.zeros(grid, bool)


def _rows(store: RegionStore, labels: CocoLabels, sources: Sequence[Source]) -> tuple[dict[int, Labelled], int, int]:
    places = {name: row for row, name in enumerate(store.sample_ids)}
    called = {unicodedata.normalize("NFC", s.known_as): s.sample_id for s in sources if s.known_as}
    rows: dict[int, Labelled] = {}
    quarantined = elsewhere = 0
    for item in labels.images:
        name = item.source.sample_id
        row = places.get(name, places.get(called.get(name, "")))
        if row is None:
            elsewhere += 1
        elif store.samples[row].status != "ok":
            quarantined += 1
        else:
            rows[row] = item
    return dict(sorted(rows.items())), quarantined, elsewhere


def _categories(
    regions: Sequence[str], categories: Sequence[str], mapping: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Region -> categories, and the regions that have none."""
    given: dict[str, list[str]] = {}
    for entry in mapping:
        region, mark, category = (part.strip() for part in entry.partition("="))
        if not (mark and region and category):
            raise UsageError(
                f"--map '{entry}': expected region=category",
                hint=f"regions: {', '.join(regions)}; categories: {', '.join(categories)}",
            )
        region = _known(region, regions, f"--map '{entry}': region '{region}'", "no such region")
        category = _known(category, categories, f"--map '{entry}': category '{category}'")
        if category not in given.setdefault(region, []):
            given[region].append(category)
    alike = {_plain(name): name for name in categories}
    found: dict[str, tuple[str, ...]] = {}
    for region in regions:
        if region in given:
            found[region] = tuple(given[region])
        elif _plain(region) in alike:
            found[region] = (alike[_plain(region)],)
    left = [region for region in regions if region not in found]
    if not found:
        near = [close for region in regions for close in difflib.get_close_matches(region, categories, n=1)]
        raise UsageError(
            f"no region ({', '.join(regions)}) is a category of the labels ({', '.join(categories)})",
            hint=f"say which is which: --map '{regions[0]}={near[0] if near else categories[0]}'",
        )
    return found, left


def _known(name: str, names: Sequence[str], what: str, where: str = "not in the labels") -> str:
    for known in names:
        if known == name or _plain(known) == _plain(name):
            return known
    folded = {_plain(known): known for known in names}
    near = [folded[close] for close in difflib.get_close_matches(_plain(name), folded, n=1)]
    raise UsageError(
        f"{what}: {where}",
        hint=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}",
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()
