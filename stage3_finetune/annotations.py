"""Files that say where things are in an image: VOC boxes, maps of instance indices, COCO entries -> one form.

Boxes are half-open, x0 y0 x1 y1, in hundredths of a px of the upright image: whole numbers, so that what is digested is
what is learnt from. A box may reach one px over the border (tools round differently) and is cut there.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from faster_coco_eval.core import mask as coco_masks
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from shared.coco import Labelled
from shared.config import digest
from shared.decode import PIXELS_MAX
from shared.outlines import Outline

HUNDREDTHS = 100
_SLACK_PX = 1.0
_XML_BYTES_MAX = 16 << 20
_FAULTS_MAX = 5
_FULL = 255

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Thing:
    """One thing: its class (empty: the file names none), box in 1/100 px, and packed run lengths where outlined."""

    name: str
    box: Box
    mask: str | None = None


@dataclass(frozen=True)
class Annotated:
    """What a file says of an image of this height and width; things in an order that depends on them alone."""

    size_px: tuple[int, int]
    things: tuple[Thing, ...]

    @property
    def sha256(self) -> str:
        """Digest of all that is said; a file that says the same in another way has the same."""
        rows = [[thing.name, list(thing.box), thing.mask] for thing in self.things]
        return digest({"size_px": list(self.size_px), "things": rows})


class FaultyFile(ValueError):
    """Everything that is wrong with one file, in a line without its name."""


def read_voc(path: Path) -> Annotated:
    """Boxes of Pascal VOC: 1-based pixels, the last one included. ``difficult`` things count like all others.

    Raises:
        FaultyFile: Not such a file, or faults of it.
    """
    data = _bytes(path, _XML_BYTES_MAX)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise FaultyFile("XML with a document type or entities; VOC has none")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise FaultyFile(f"not XML: {error}") from None
    width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
    if width is None or height is None or min(width, height) < 1 or width % 1 or height % 1:
        raise FaultyFile("no size with the image's width and height")
    size_px, faults, things = (int(height), int(width)), [], []
    for number, entry in enumerate(root.findall("object"), 1):
        name = (entry.findtext("name") or "").strip()
        corners = [_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        x0, y0, x1, y1 = corners
        if not name:
            faults.append(f"object {number} has no name")
        elif x0 is None or y0 is None or x1 is None or y1 is None:
            faults.append(f"object {number}: bndbox needs the numbers xmin, ymin, xmax, ymax")
        elif isinstance(found := fit_box((x0 - 1, y0 - 1, x1, y1), size_px), str):
            faults.append(f"object {number}: {found}")
        else:
            things.append(Thing(name, found))
    return _checked(size_px, things, faults)


def read_indices(path: Path) -> Annotated:
    """A PNG of one channel: 0 is background, every other value a thing (1 to n; one that others hide may lack).

    255 among few others is taken for a mask of classes and refused.

    Raises:
        FaultyFile: Not such a file.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise FaultyFile(f"a PNG of mode {image.mode}; expected one channel of instance indices")
            if image.width * image.height > PIXELS_MAX:
                raise FaultyFile(f"{image.width} x {image.height} px, at most {PIXELS_MAX} in all")
            index = np.asarray(image).astype(np.int64)
    except FileNotFoundError:
        raise FaultyFile("no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, FaultyFile):
            raise
        raise FaultyFile(f"not a PNG that can be read: {type(error).__name__}") from None
    found = [int(value) for value in np.unique(index) if value]
    if found and (found[0] < 0 or (_FULL in found and len(found) < _FULL // 2)):
        shown = ", ".join(map(str, found[:_FAULTS_MAX]))
        raise FaultyFile(
            f"values {shown} look like a mask of classes; expected 0 for background, 1, 2, 3 ... for things"
        )
    things = []
    for value in found:
        inside = index == value
        things.append(Thing("", _around(inside), pack(inside)))
    return _checked((index.shape[0], index.shape[1]), things, [])


def from_coco(item: Labelled) -> Annotated:
    """An image of COCO labels; polygons are rasterised by COCO's own rule.

    Raises:
        FaultyFile: A box or outline that is nothing on the grid of hundredths or pixels, or a thing given twice.
    """
    size_px, faults, things = (item.height, item.width), [], []
    for thing in item.things:
        box = fit_box(thing.box_xyxy_px, size_px)
        mask = None if thing.outline is None else _packed(thing.outline, size_px)
        if isinstance(box, str):
            faults.append(f"'{thing.region}': {box}")
        elif mask is not None and not coco_masks.area({"size": list(size_px), "counts": mask.encode()}):
            faults.append(f"'{thing.region}': its outline holds no pixel")
        else:
            things.append(Thing(thing.region, box, mask))
    return _checked(size_px, things, faults)


def fit_box(corners: Sequence[float], size_px: tuple[int, int]) -> Box | str:
    """A box in hundredths, cut at the image's border; text says what is wrong with it.

    >>> fit_box((-0.5, 2, 10, 4.004), (8, 10))
    (0, 200, 1000, 400)
    """
    height, width = size_px
    x0, y0, x1, y1 = corners
    shown = "[" + ", ".join(f"{value:g}" for value in corners) + "]"
    if min(x0, y0) < -_SLACK_PX or x1 > width + _SLACK_PX or y1 > height + _SLACK_PX:
        return f"box {shown} (x0, y0, x1, y1) lies outside the image of {width} x {height} px"
    cut = (max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1))
    whole = [math.floor(value * HUNDREDTHS + 0.5) for value in cut]
    if whole[2] <= whole[0] or whole[3] <= whole[1]:
        return f"box {shown} (x0, y0, x1, y1) of zero area"
    return whole[0], whole[1], whole[2], whole[3]


def pack(inside: Bool[np.ndarray, "H W"]) -> str:
    """Run lengths of a mask as COCO's packed text.

    >>> pack(np.array([[False, True], [False, True]]))
    '22'
    """
    packed: bytes = coco_masks.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"]
    return packed.decode("ascii")


def unpack(mask: str, size_px: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The mask of packed run lengths that `pack` made or `annotations` checked."""
    decoded = coco_masks.decode({"size": list(size_px), "counts": mask.encode("ascii")})
    return np.asarray(decoded).astype(bool)


def _checked(size_px: tuple[int, int], things: list[Thing], faults: list[str]) -> Annotated:
    things.sort(key=lambda thing: (thing.name, thing.box, thing.mask or ""))
    faults += [
        f"'{one.name}' is given twice at {[side / HUNDREDTHS for side in one.box]}"
        for one, other in pairwise(things)
        if one == other
    ]
    if faults:
        more = f", and {len(faults) - _FAULTS_MAX} more" if len(faults) > _FAULTS_MAX else ""
        raise FaultyFile(", ".join(faults[:_FAULTS_MAX]) + more)
    return Annotated(size_px, tuple(things))


def _packed(outline: Outline, size_px: tuple[int, int]) -> str:
    height, width = size_px
    if outline.runs:
        given = {"size": [height, width], "counts": list(outline.runs)}
        packed: bytes = coco_masks.frPyObjects(given, height, width)["counts"]
    else:
        parts = coco_masks.frPyObjects([list(polygon) for polygon in outline.polygons], height, width)
        packed = coco_masks.merge(parts)["counts"]
    return packed.decode("ascii")


def _around(inside: Bool[np.ndarray, "H W"]) -> Box:
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x0, y0, x1, y1 = (int(side) * HUNDREDTHS for side in corners)
    return x0, y0, x1, y1


def _bytes(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise FaultyFile("no such file") from None
    except OSError as error:
        raise FaultyFile(f"cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise FaultyFile(f"more than {most} bytes")
    return data


def _number(root: ElementTree.Element, path: str) -> float | None:
    try:
        value = float(root.findtext(path) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
