"""Maps of a published store, computed again from its images by what its card says made them.

What shared a model call with a row depends on the row alone (`answer`), so a row can be made again by itself: first
with blank neighbours, which is cheap, and, only if that differs, with the very neighbours that it had.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8, UInt16

from shared.config import load, read_yaml
from shared.errors import (
    ConfigError,
    CorruptError,
    DecodeError,
    IncompatibleError,
    InputMissingError,
    MwmError,
    UsageError,
)
from shared.images import Image, Source, find_sources
from shared.merkle import row_digest
from shared.region_images import read_localized
from shared.region_layout import HALF, plan_rows_per_shard
from shared.region_record import detections_digest
from shared.regions import RegionStore, SampleRow
from shared.workspace import RESOLVED
from stage1_localize.answer import Answer, Failure, answer
from stage1_localize.config import LocalizeConfig
from stage1_localize.contracts import Region
from stage1_localize.job import specify
from stage1_localize.parts import Parts, build_parts, resolve


@dataclass(frozen=True)
class Made:
    """One row, made again.

    Attributes:
        row: Its index.
        answer: Maps, boxes and scores; None where they could not be made.
        problem: Why not, or None.
        whole: Whether every neighbour that the run had was there too.
        lies: Its line says of the image what is not so.
    """

    row: int
    answer: Answer | None
    problem: str | None = None
    whole: bool = True
    lies: bool = False


class Recomputer:
    """Makes rows of one store again, in this process, on one thread as a worker does.

    Args:
        store: The store.
        images: Folder or list that the store was made from.
        overrides: ``path.to.key=value`` for settings that named files of the machine that made it, such as
            ``grounder.options.head``.

    Raises:
        IncompatibleError: This installation has other weights, versions or settings than made the store.
        UsageError: Images or overrides that do not fit.
    """

    def __init__(self, store: RegionStore, images: Path, overrides: Iterable[str] = ()) -> None:
        spec = store.card.identity.spec
        self.store = store
        self.parts, self.config = _parts_of(store, overrides)
        self.regions = self.config.asked()
        self.sources = _sources_of(store, images)
        self.micro_batch = int(spec["numeric"]["micro_batch"])
        self.rows_per_shard = plan_rows_per_shard(len(store), len(store.regions), store.grid)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)

    def make(self, row: int) -> Made:
        """Make a row again; the neighbours only where the row alone is not what was published."""
        sample = self.store.samples[row]
        image = self._image(sample)
        if not isinstance(image, Image):
            return Made(row, None, image)
        if (image.pixel_sha256, image.pixels.shape) != (sample.pixel_sha256, tuple(sample.shape or ())):
            told = f"its line tells of other pixels, or of the size {sample.shape}: its image has {image.pixels.shape}"
            return Made(row, None, told, lies=True)
        alone = self._answer({row: image}, self._places(row))
        if isinstance(alone, Answer) and same(alone, sample):
            return Made(row, alone)
        images = {row: image}
        whole = True
        for other in self._places(row):
            if other < 0 or other == row or self.store.samples[other].status != "ok":
                continue
            beside = self._image(self.store.samples[other])
            whole = whole and isinstance(beside, Image)
            if isinstance(beside, Image):
                images[other] = beside
        made = alone if images.keys() == {row} else self._answer(images, self._places(row), row)
        if isinstance(made, Failure):
            return Made(row, None, f"{made.reason} in {made.stage}", whole)
        return Made(row, made, None, whole)

    def ask(self, row: int, regions: Sequence[Region]) -> Answer | None:
        """Answer other regions about a row's image, with blank neighbours; None where the image cannot be used."""
        image = self._image(self.store.samples[row])
        if not isinstance(image, Image):
            return None
        made = self._answer({row: image}, self._places(row), regions=regions)
        return made if isinstance(made, Answer) else None

    def pixels(self, row: int) -> Float32[np.ndarray, "C H W"]:
        """The image of a row that was made, for a picture."""
        image = self._image(self.store.samples[row])
        return image.pixels if isinstance(image, Image) else np.zeros((1, *self.store.grid), np.float32)

    def _places(self, row: int) -> list[int]:
        first = row // self.rows_per_shard * self.rows_per_shard
        stop = min(first + self.rows_per_shard, len(self.store))
        begin = first + (row - first) // self.micro_batch * self.micro_batch
        batch = list(range(begin, min(begin + self.micro_batch, stop)))
        return batch + [-1] * (self.micro_batch - len(batch))

    def _answer(
        self,
        images: Mapping[int, Image],
        places: Sequence[int],
        row: int | None = None,
        regions: Sequence[Region] | None = None,
    ) -> Answer | Failure:
        ids = {place: self.store.samples[place].sample_id for place in places if place >= 0}
        grid_px = self.store.grid[0]
        wanted = next(iter(images)) if row is None else row
        return answer(images, ids, places, self.parts, regions or self.regions, grid_px)[wanted]

    def _image(self, sample: SampleRow) -> Image | str:
        """The image of a row, or why it cannot be had."""
        if sample.sample_id not in self.sources:
            return "its image is not there"
        try:
            return read_localized(sample, self.sources)
        except DecodeError as error:
            return f"its image cannot be read: {error.reason}"
        except CorruptError:
            return "its image has other bytes than were localized"
        except OSError as error:
            return f"its image cannot be read: {type(error).__name__}"


def same(made: Answer, sample: SampleRow) -> bool:
    """Whether an answer is, to the bit, what was published of a sample."""
    return (
        row_digest(made.maps).hex() == sample.maps_digest
        and detections_digest(made.boxes, made.scores, made.box_regions) == sample.detections_digest
    )


def differs_by(
    kept: tuple[UInt8[np.ndarray, "K h w"], Int32[np.ndarray, "m 4"], UInt16[np.ndarray, "m"], UInt16[np.ndarray, "m"]],
    made: Answer,
) -> tuple[float, int, float, str | None]:
    """How far two answers about one image lie apart.

    Args:
        kept: Published maps 0..254, boxes in 1/16 px, scores 0..65535 and the region of each.
        made: Computed again.

    Returns:
        Share of map pixels that differ by at most 2 of 254, the largest difference, the lowest IoU at .5 of a
        region (two empty ones: 1), and what differs among the detections by more than a pixel or .01, or None.
    """
    maps, boxes, scores, regions = kept
    apart = np.abs(maps.astype(np.int16) - made.maps.astype(np.int16))
    overlaps = []
    for one, other in zip(maps >= HALF, made.maps >= HALF, strict=True):
        union = int((one | other).sum())
        overlaps.append(int((one & other).sum()) / union if union else 1.0)
    told = None
    if len(boxes) != len(made.boxes) or not np.array_equal(regions, made.box_regions):
        told = f"{len(made.boxes)} detections, {len(boxes)} were published"
    elif len(boxes):
        shift = int(np.abs(boxes - made.boxes).max()) / 16
        score = int(np.abs(scores.astype(np.int64) - made.scores).max()) / 65535
        if shift > 1 or score > 0.01:
            told = f"boxes differ by up to {shift:.1f} px, scores by {score:.3f}"
    return float((apart <= 2).mean()), int(apart.max(initial=0)), min(overlaps, default=1.0), told


def _parts_of(store: RegionStore, overrides: Iterable[str]) -> tuple[Parts, LocalizeConfig]:
    spec: dict[str, Any] = store.card.identity.spec
    try:
        config = resolve(load(LocalizeConfig, _recipe_of(store), overrides))
        parts = build_parts(config.grounder, config.segmenter, config.asked())
    except ConfigError:
        raise
    except MwmError as error:
        raise IncompatibleError(
            f"store {store.path.name}: its parts cannot be built here: {error.message}",
            hint=error.hint or "name files of this machine with --set, e.g. --set grounder.options.head=PATH",
        ) from None
    here = specify(config, parts)
    differing = [key for key in sorted({*here, *spec}) if here.get(key) != spec.get(key)]
    if differing:
        raise IncompatibleError(
            f"store {store.path.name}: {_difference(differing[0], spec, here)}",
            hint="install the release and the weights that made it, or give options that resolved.yaml has lost with "
            "--set; 'mwm inspect STORE' names them",
        )
    return parts, config


def _recipe_of(store: RegionStore) -> dict[str, Any]:
    """The settings that the card pins; where files lay, from ``resolved.yaml`` as far as that can be read."""
    spec: dict[str, Any] = store.card.identity.spec
    try:
        told = read_yaml(store.path / RESOLVED)
    except UsageError:
        told = {}
    recipe: dict[str, Any] = {
        "regions": {region["name"]: list(region["texts"]) for region in spec["regions"]},
        "grid_px": spec["grid"][0],
        "micro_batch": spec["numeric"]["micro_batch"],
    }
    for role in ("grounder", "segmenter"):
        there = told.get(role)
        options = there.get("options") if isinstance(there, dict) else None
        kept = options if isinstance(options, dict) else {}
        recipe[role] = {"name": spec[role]["name"], "options": {**kept, **spec[role]["options"]}}
    return recipe


def _difference(key: str, spec: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first setting at or below ``key`` that differs, in words and by its whole path.

    >>> _difference("grounder", {"grounder": {"options": {"steps": 2}}}, {"grounder": {"options": {"steps": 3}}})
    'its grounder.options.steps is 2, here it would be 3'
    """
    then, now, path = spec.get(key), here.get(key), [key]
    while isinstance(then, Mapping) and isinstance(now, Mapping):
        inner = next(name for name in sorted({*then, *now}) if then.get(name) != now.get(name))
        then, now = then.get(inner), now.get(inner)
        path.append(inner)
    return f"its {'.'.join(path)} is {_short(then)}, here it would be {_short(now)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sources_of(store: RegionStore, images: Path) -> dict[str, Source]:
    wanted = {sample.sample_id for sample in store.samples}
    found = {source.sample_id: source for source in find_sources(images.absolute()) if source.sample_id in wanted}
    if not found:
        raise InputMissingError(
            f"images {images}: none of the {len(wanted)} samples of {store.path.name} is among them",
            hint="give the folder or list that was localized; the ids of DICOM files depend on its salt",
        )
    return found
