"""COCO labels: read and checked as a whole, then matched to images; every fault of a file is told at once.

Boxes are ``[x, y, width, height]`` in px of the upright image; ``segmentation`` (polygons, run lengths plain or
packed) is optional. An annotation with ``iscrowd`` is a place, not a thing: what it says of its category is "unknown".
Messages name ids of the file, never file names: those may be patients'.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from shared.config import digest
from shared.errors import InputMissingError, UsageError
from shared.images import Source
from shared.outlines import Outline, area, extent, unpack_runs

LABELS_BYTES_MAX = 256 << 20
_SHOWN = 100
_ROUNDING_PX = 1.0
"""A box or outline may reach this far over the image's border: tools round differently."""
_AGREE_MIN = 0.5
"""Intersection over union of an annotation's box and its outline's own, at least."""
_RECTANGLE_MIN = 0.995
"""An outline that fills this share of its box is the box again."""


@dataclass(frozen=True)
class Thing:
    """One annotation: its region, half-open box in px inside the image, and outline where there is one."""

    region: str
    box_xyxy_px: tuple[float, float, float, float]
    outline: Outline | None = None


@dataclass(frozen=True)
class Labelled:
    """One image of the labels.

    Attributes:
        image_id: In the labels.
        source: The image.
        width: In px, as the labels say.
        height: Likewise.
        things: Its annotations.
        unknown: Regions of which this image says nothing, for a crowd annotation.
        source_sha256: Of the file as the run's corpus lists it; empty before that is known.
    """

    image_id: int
    source: Source
    width: int
    height: int
    things: tuple[Thing, ...] = ()
    unknown: frozenset[str] = frozenset()
    source_sha256: str = ""


@dataclass(frozen=True)
class CocoLabels:
    """Labels that hold together.

    Attributes:
        regions: Category names in the order of their ids.
        images: One entry an image of the labels, by sample id.
        outlined: Regions whose every annotation has an outline that is more than its box.
        warnings: What a user should know.
    """

    regions: tuple[str, ...]
    images: tuple[Labelled, ...]
    outlined: frozenset[str]
    warnings: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Digest of what is said of each sample; ids, order and layout of the file do not matter."""
        rows = [
            [
                item.source.sample_id,
                [item.width, item.height],
                sorted(item.unknown),
                sorted(digest(asdict(thing)) for thing in item.things),
            ]
            for item in self.images
        ]
        return digest({"regions": sorted(self.regions), "rows": rows})


def read_coco(path: Path, sources: Sequence[Source] | None) -> CocoLabels:
    """Read, check and match COCO labels.

    Args:
        path: The JSON file.
        sources: The images; ``file_name`` is a sample id of theirs, or what the user calls it. None: whatever the
            labels name is taken for a sample.

    Raises:
        InputMissingError: No such file.
        UsageError: Not COCO JSON; or everything that is wrong with it, with ids.
    """
    body = _parse(path)
    reader = _Reader(body, sources)
    labels = reader.read()
    if reader.problems:
        shown = "; ".join(reader.problems[:_SHOWN])
        more = f"; and {len(reader.problems) - _SHOWN} more" if len(reader.problems) > _SHOWN else ""
        raise UsageError(
            f"labels {path.name}: {len(reader.problems)} problems: {shown}{more}",
            hint=reader.hint or "mend the file; ids are its own",
        )
    return labels


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputMissingError(f"labels {path}: no such file", hint="--labels takes a COCO JSON file")
    size = path.stat().st_size
    if size > LABELS_BYTES_MAX:
        raise UsageError(f"labels {path.name}: {size} bytes, at most {LABELS_BYTES_MAX}")
    try:
        body = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UsageError(f"labels {path.name}: not JSON", hint="--labels takes a COCO JSON file") from None
    if not isinstance(body, dict):
        raise UsageError(f"labels {path.name}: expected a JSON object, found {type(body).__name__}")
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(body.get(key), list)]
    if missing:
        raise UsageError(
            f"labels {path.name}: no list '{missing[0]}'; found {', '.join(map(ascii, sorted(body)[:8])) or 'nothing'}",
            hint="COCO instances have images, annotations and categories",
        )
    return body


@dataclass
class _Reader:
    body: Mapping[str, Any]
    sources: Sequence[Source] | None
    problems: list[str] = field(default_factory=list)
    hint: str | None = None

    def read(self) -> CocoLabels:
        """Check everything; the result holds only where `problems` stays empty."""
        names = self._categories()
        images = self._images()
        things: dict[int, list[Thing]] = defaultdict(list)
        crowds: dict[int, set[str]] = defaultdict(set)
        counts = {name: [0, 0, 0] for name in names.values()}  # annotations, with an outline, with more than a box
        seen: set[Any] = set()
        for where, row in self._rows("annotations", "annotation"):
            self._refuse_twice(seen, row.get("id"), where)
            image, name = images.get(_key(row.get("image_id"))), names.get(_key(row.get("category_id")))
            if image is None:
                self.problems.append(f"{where}: image_id {_shown(row.get('image_id'))} is no image of these labels")
            if name is None:
                self.problems.append(f"{where}: category_id {_shown(row.get('category_id'))} is no category")
            if image is None or name is None:
                continue
            if row.get("iscrowd"):
                crowds[image.image_id].add(name)
                continue
            thing = self._thing(where, row, image, name)
            if thing is None:
                continue
            if thing in things[image.image_id]:
                self.problems.append(f"{where}: the same as another annotation of image {image.image_id}")
            things[image.image_id].append(thing)
            counts[name][0] += 1
            counts[name][1] += thing.outline is not None
            counts[name][2] += thing.outline is not None and not _rectangle(thing)
        outlined = frozenset(name for name, (all_, _, shaped) in counts.items() if all_ == shaped > 0)
        found = [
            Labelled(
                item.image_id, item.source, item.width, item.height, tuple(things[item.image_id]),
                frozenset(crowds[item.image_id]),
            )
            for item in images.values()
        ]  # fmt: skip
        return CocoLabels(
            tuple(names.values()),
            tuple(sorted(found, key=lambda item: item.source.sample_id)),
            outlined,
            tuple(_remarks(counts, crowds)),
        )

    def _rows(self, key: str, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(self.body[key]):
            if isinstance(row, dict):
                yield f"{what} {_shown(row['id'])}" if "id" in row else f"{what} at place {number}", row
            else:
                self.problems.append(f"{what} at place {number}: expected an object")

    def _categories(self) -> dict[int, str]:
        found: dict[int, str] = {}
        folded: set[str] = set()
        for where, row in self._rows("categories", "category"):
            name = row.get("name")
            if not _whole(row.get("id")):
                self.problems.append(f"{where}: expected a whole number as id")
            elif row["id"] in found:
                self.problems.append(f"{where}: given twice")
            elif not isinstance(name, str) or not name.strip():
                self.problems.append(f"{where}: no name")
            elif name.strip().casefold() in folded:
                self.problems.append(f"{where}: a name that another category has")
            else:
                found[row["id"]] = name.strip()
                folded.add(name.strip().casefold())
        if not self.body["categories"]:
            self.problems.append("no category")
        return dict(sorted(found.items()))

    def _images(self) -> dict[int, Labelled]:
        sources = self.sources or ()
        by_name = {unicodedata.normalize("NFC", s.known_as or s.sample_id): s for s in sources}
        by_name |= {source.sample_id: source for source in sources}
        found: dict[int, Labelled] = {}
        taken: dict[str, int] = {}
        for where, row in self._rows("images", "image"):
            number, name, width, height = (row.get(key) for key in ("id", "file_name", "width", "height"))
            if not _whole(number):
                self.problems.append(f"{where}: expected a whole number as id")
                continue
            if number in found:
                self.problems.append(f"{where}: given twice")
                continue
            if not isinstance(name, str) or not name:
                self.problems.append(f"{where}: no file_name")
                continue
            if not (_whole(width) and _whole(height) and width > 0 and height > 0):
                self.problems.append(f"{where}: width and height {_shown(width)} x {_shown(height)}")
                continue
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
                self.problems.append(f"{where}: file_name is not a path inside the images' folder")
                continue
            name = unicodedata.normalize("NFC", PurePosixPath(name).as_posix())
            source = Source(name, Path(name)) if self.sources is None else by_name.get(name)
            if source is None:
                self.problems.append(f"{where}: its file_name is not among the images")
                self.hint = "file_name is a path relative to the folder of --images, or a sample id of its list"
                continue
            first = taken.setdefault(source.sample_id, number)
            if first != number:
                self.problems.append(f"{where}: the same file_name as image {first}")
                continue
            found[number] = Labelled(number, source, width, height)
        if not self.body["images"]:
            self.problems.append("no image")
        return found

    def _thing(self, where: str, row: Mapping[str, Any], image: Labelled, name: str) -> Thing | None:
        before = len(self.problems)
        outline = self._outline(where, row.get("segmentation"), image)
        around = None if outline is None else extent(outline, image.height)
        if outline is not None and around is None:
            self.problems.append(f"{where}: its segmentation holds no pixel")
        box = row.get("bbox")
        if box is None and around is not None:
            corners = around
        elif isinstance(box, list) and len(box) == 4 and all(map(_finite, box)):
            corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        else:
            if len(self.problems) == before:
                self.problems.append(f"{where}: bbox: expected four finite numbers x, y, width, height")
            return None
        for what, found in (("box", corners), ("segmentation", around)):
            if found is None:
                continue
            if not (found[2] > found[0] and found[3] > found[1]):
                self.problems.append(f"{where}: {what} of zero area: width and height must be above 0")
            elif not _inside(found, image):
                self.problems.append(
                    f"{where}: {what} {_pretty(found)} (x0, y0, x1, y1) lies outside image {image.image_id} of "
                    f"{image.width} x {image.height} px"
                )
        if len(self.problems) == before and around is not None and _iou(corners, around) < _AGREE_MIN:
            self.problems.append(f"{where}: box {_pretty(corners)} and segmentation {_pretty(around)} do not agree")
        if len(self.problems) > before:
            return None
        x0, y0, x1, y1 = corners
        limit = (max(0.0, x0), max(0.0, y0), min(float(image.width), x1), min(float(image.height), y1))
        return Thing(name, (float(limit[0]), float(limit[1]), float(limit[2]), float(limit[3])), outline)

    def _outline(self, where: str, given: Any, image: Labelled) -> Outline | None:
        if given in (None, [], {}):
            return None
        if isinstance(given, list):
            if all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_finite, p)) for p in given):
                return Outline(polygons=tuple(tuple(map(float, polygon)) for polygon in given))
            self.problems.append(f"{where}: segmentation: expected polygons of three or more points x, y")
            return None
        counts, size = (given.get("counts"), given.get("size")) if isinstance(given, dict) else (None, None)
        if size != [image.height, image.width]:
            self.problems.append(f"{where}: segmentation size {_shown(size)}, expected [height, width] of its image")
            return None
        try:
            runs = unpack_runs(counts) if isinstance(counts, str) else counts
        except ValueError:
            runs = None
        if not isinstance(runs, list) or not all(_whole(run) and run >= 0 for run in runs):
            self.problems.append(f"{where}: segmentation counts are no run lengths")
            return None
        if sum(runs) != image.width * image.height:
            self.problems.append(f"{where}: run lengths cover {sum(runs)} px of {image.width * image.height}")
            return None
        return Outline(runs=tuple(runs))

    def _refuse_twice(self, seen: set[Any], number: Any, where: str) -> None:
        if _whole(number) and number in seen:
            self.problems.append(f"{where}: id given twice")
        elif _whole(number):
            seen.add(number)


def _remarks(counts: Mapping[str, Sequence[int]], crowds: Mapping[int, set[str]]) -> Iterator[str]:
    for name, (all_, outlined, shaped) in counts.items():
        if 0 < outlined < all_:
            yield f"region '{name}': {all_ - outlined} of {all_} annotations have no outline; boxes alone are used"
        elif all_ == outlined > 0 and shaped < all_:
            yield f"region '{name}': {all_ - shaped} of {all_} outlines are only their boxes; boxes alone are used"
    number = sum(bool(names) for names in crowds.values())
    if number:
        yield f"{number} images have crowd annotations: they say nothing of those regions and are not asked for them"


def _rectangle(thing: Thing) -> bool:
    x0, y0, x1, y1 = thing.box_xyxy_px
    return thing.outline is not None and area(thing.outline) >= _RECTANGLE_MIN * (x1 - x0) * (y1 - y0)


def _inside(corners: Sequence[float], image: Labelled) -> bool:
    x0, y0, x1, y1 = corners
    slack = _ROUNDING_PX
    return x0 >= -slack and y0 >= -slack and x1 <= image.width + slack and y1 <= image.height + slack


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _key(value: Any) -> int:
    return value if _whole(value) else -(2**63)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _pretty(corners: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in corners) + "]"
