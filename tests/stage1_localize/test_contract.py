"""What every grounder and every segmenter promises, whatever it finds, and which of them go together.

A part that is registered but not in `contract_table` fails here: its builder is one line there.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rfc8785

from shared.config import spec
from shared.errors import ConfigError
from stage1_localize.config import PartConfig
from stage1_localize.contracts import MAP_SIZE_PX, Batch, Detections, Region
from stage1_localize.fuse import fuse
from stage1_localize.grounders import GROUNDERS
from stage1_localize.parts import build_parts
from stage1_localize.segmenters import SEGMENTERS
from tests.stage1_localize.contract_table import BLOBS_XY, GROUNDER_TABLE, IDS, IMAGES, SEGMENTER_TABLE

ROOT = Path(__file__).parents[2]
TABLES = {"grounder": (GROUNDERS, GROUNDER_TABLE), "segmenter": (SEGMENTERS, SEGMENTER_TABLE)}
PARTS = [(kind, name) for kind, (registry, _) in TABLES.items() for name in sorted(registry)]


class Built:
    """Parts, built once a session each, with their options."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._options: dict[tuple[str, str], Any] = {}
        self._parts: dict[tuple[str, str], Any] = {}
        self._answers: dict[str, list[Detections]] = {}

    def options(self, kind: str, name: str) -> Any:
        registry, table = TABLES[kind]
        if (kind, name) not in self._options:
            assert name in table, (
                f"{kind} '{name}' is registered: give it a line in tests/stage1_localize/contract_table"
            )
            given = table[name].build(self._folder(f"{kind}-{name}"))
            self._options[kind, name] = registry.load(name).Options.model_validate(given)
        return self._options[kind, name]

    def part(self, kind: str, name: str) -> Any:
        if (kind, name) not in self._parts:
            self._parts[kind, name] = TABLES[kind][0].load(name)(self.options(kind, name))
        return self._parts[kind, name]

    def config(self, kind: str, name: str) -> PartConfig:
        return PartConfig(name=name, options=self.options(kind, name).model_dump(mode="json"))

    def answers(self, name: str) -> list[Detections]:
        """What a grounder says of all images together."""
        if name not in self._answers:
            grounder, asked = self.part("grounder", name), regions_for(name)
            grounder.check(asked)
            self._answers[name] = grounder.locate(Batch(IMAGES, IDS), asked)
        return self._answers[name]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(lambda name: tmp_path_factory.mktemp(name))


def regions_for(name: str) -> list[Region]:
    first, second = GROUNDER_TABLE[name].words
    return [Region("a", (first,)), Region("b", (second, first))]


def same(one: Detections, other: Detections) -> bool:
    """Whether two answers are equal to the bit."""
    return fingerprint(one) == fingerprint(other)


def fingerprint(found: Detections) -> str:
    total = hashlib.sha256()
    for array in (found.box_xyxy_px, found.score, found.region, found.text):
        total.update(repr((array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
    for own in found.probability:
        total.update(b"-" if own is None else np.ascontiguousarray(own).tobytes())
    return total.hexdigest()


def only(found: Detections, region: int, text: int | None = None) -> Detections:
    """The detections of one region as if it had been asked alone, or of one wording as if it were the only one."""
    kept = np.flatnonzero((found.region == region) & ((found.text == text) | (text is None)))
    texts = found.text[kept] if text is None else np.zeros(len(kept), np.int64)
    own = [found.probability[i] for i in kept]
    return Detections(found.box_xyxy_px[kept], found.score[kept], np.zeros(len(kept), np.int64), texts, own)


def bare(found: Detections) -> Detections:
    """The detections that a segmenter must fill."""
    kept = [i for i, own in enumerate(found.probability) if own is None]
    return Detections(
        found.box_xyxy_px[kept], found.score[kept], found.region[kept], found.text[kept], [None] * len(kept)
    )


@pytest.mark.parametrize("kind", TABLES)
def test_the_table_holds_what_is_registered(kind: str) -> None:
    registry, table = TABLES[kind]
    assert sorted(registry) == sorted(table)


@pytest.mark.parametrize("name", sorted(GROUNDERS))
def test_a_grounder_answers_in_the_frames_it_promises(name: str, built: Built) -> None:
    for image, each in zip(IMAGES, built.answers(name), strict=True):
        n = len(each)
        assert each.box_xyxy_px.shape == (n, 4)
        assert each.box_xyxy_px.dtype == each.score.dtype == np.float32
        assert each.region.dtype == each.text.dtype == np.int64
        assert len(each.region) == len(each.text) == len(each.probability) == n
        assert ((each.score >= 0) & (each.score <= 1)).all()
        low, high = each.box_xyxy_px[:, :2], each.box_xyxy_px[:, 2:]
        assert (low >= 0).all()
        assert (low < high).all()
        assert (high <= [image.shape[2], image.shape[1]]).all()
        asked = regions_for(name)
        assert all(text < len(asked[region].texts) for region, text in zip(each.region, each.text, strict=True))
        for own in each.probability:
            assert own is None or (own.shape == (MAP_SIZE_PX, MAP_SIZE_PX) and own.dtype == np.float32)
            assert own is None or (own.min() >= 0 and own.max() <= 1)


@pytest.mark.parametrize("name", sorted(name for name, entry in GROUNDER_TABLE.items() if entry.finds))
def test_a_blob_is_found_where_it_is(name: str, built: Built) -> None:
    for image, (x, y), found in zip(IMAGES, BLOBS_XY, built.answers(name), strict=False):
        x0, y0, x1, y1 = found.box_xyxy_px[found.region == 0].T
        over = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        assert over.any()
        for own, here in zip(found.probability, found.region == 0, strict=True):
            if own is not None and here:
                row, column = (y * MAP_SIZE_PX // image.shape[1], x * MAP_SIZE_PX // image.shape[2])
                assert own[row, column] > 0.5


@pytest.mark.parametrize("name", sorted(GROUNDERS))
def test_nothing_is_found_in_a_constant_image_or_by_a_wording_that_is_absent(name: str, built: Built) -> None:
    assert not built.answers(name)[2].score.any()
    absent = GROUNDER_TABLE[name].absent
    if absent is not None:
        found = built.part("grounder", name).locate(Batch(IMAGES, IDS), [Region("a", (absent,))])
        assert not any(each.score.any() for each in found)


@pytest.mark.parametrize("name", sorted(GROUNDERS))
def test_an_answer_depends_on_its_own_image_and_region_only(name: str, built: Built) -> None:
    grounder, (first, second), together = built.part("grounder", name), regions_for(name), built.answers(name)
    ids = IDS if GROUNDER_TABLE[name].by_sample else ("", "elsewhere", "")
    turned = grounder.locate(Batch([IMAGES[1], IMAGES[0]], [ids[1], ids[0]]), [first, second])
    assert same(turned[0], together[1])  # first instead of second
    assert same(turned[1], together[0])  # last, without its old neighbours
    joint = grounder.identity().get("joint", False)
    (alone,) = grounder.locate(Batch([IMAGES[0]], [ids[0]]), [second])
    assert joint or same(alone, only(together[0], 1))


@pytest.mark.parametrize("name", sorted(GROUNDERS))
def test_wordings_of_a_region_are_answered_each_for_itself(name: str, built: Built) -> None:
    entry, (found, *_) = GROUNDER_TABLE[name], built.answers(name)
    assert set(found.text[found.region == 0].tolist()) <= {0}
    if entry.by_name:
        assert same(only(found, 1, 0), only(found, 1, 1))
    else:
        assert same(only(found, 1, 1), only(found, 0))  # the same words in another region, as its second wording
    segments = [np.ones((MAP_SIZE_PX, MAP_SIZE_PX), np.float32) if own is None else own for own in found.probability]
    merged = fuse(found, segments, 2)[1]
    each = [
        fuse(only(found, 1, text), [segments[i] for i in np.flatnonzero((found.region == 1) & (found.text == text))], 1)
        for text in (0, 1)
    ]
    assert np.array_equal(merged, np.maximum(*each)[0])


def test_a_fresh_process_gives_the_same_bits(built: Built) -> None:
    quick = [name for name, entry in GROUNDER_TABLE.items() if entry.quick]
    given = {name: built.config("grounder", name).options for name in quick}
    code = (
        "import json, sys\n"
        "from tests.stage1_localize import test_contract as c\n"
        "for name, options in json.loads(sys.argv[1]).items():\n"
        "    part = c.GROUNDERS.load(name)\n"
        "    found = part(part.Options.model_validate(options)).locate(c.Batch(c.IMAGES, c.IDS), c.regions_for(name))\n"
        "    print(json.dumps([name, [c.fingerprint(each) for each in found]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(given)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert told == {name: [fingerprint(each) for each in built.answers(name)] for name in quick}


@pytest.mark.parametrize("name", sorted(SEGMENTERS))
def test_a_segmenter_answers_each_box_by_itself(name: str, built: Built) -> None:
    segmenter, entry = built.part("segmenter", name), SEGMENTER_TABLE[name]
    boxes = np.array([[20, 50, 60, 90], [0, 0, 90, 120], [39, 69, 42, 72]], np.float32)

    def found(chosen: list[int]) -> Detections:
        n = len(chosen)
        zeros = np.zeros(n, np.int64)
        return Detections(boxes[chosen], np.ones(n, np.float32), zeros, zeros, [None] * n)

    chosen = [0, 1, 2] if entry.takes_boxes else []
    if not entry.takes_boxes:
        with pytest.raises(ConfigError):
            segmenter.segment(Batch(IMAGES[:1], IDS[:1]), [found([0])])
    whole, nothing = segmenter.segment(Batch(IMAGES[:2], IDS[:2]), [found(chosen), Detections.none()])
    assert whole.shape == (len(chosen), MAP_SIZE_PX, MAP_SIZE_PX)
    assert nothing.shape == (0, MAP_SIZE_PX, MAP_SIZE_PX)
    assert whole.dtype == nothing.dtype == np.float32
    assert not chosen or (whole.min() >= 0 and whole.max() <= 1)
    # Reversed, in another place, beside a constant image, and named otherwise.
    turned = segmenter.segment(Batch([IMAGES[2], IMAGES[0]], ["", "elsewhere"]), [found([]), found(chosen[::-1])])[1]
    assert np.array_equal(turned[::-1], whole)
    if entry.finds:
        inside = np.zeros((MAP_SIZE_PX, MAP_SIZE_PX), np.bool_)
        x0, y0, x1, y1 = (boxes[0] * MAP_SIZE_PX / [90, 120, 90, 120]).round().astype(int)
        inside[y0:y1, x0:x1] = True
        assert whole[0][inside].mean() > 5 * whole[0][~inside].mean()


@pytest.mark.parametrize("name", sorted(SEGMENTERS))
def test_a_segmenter_leaves_the_pixels_of_a_constant_image_finite(name: str, built: Built) -> None:
    n = int(SEGMENTER_TABLE[name].takes_boxes)
    boxes, zeros = np.array([[3, 4, 30, 20]], np.float32)[:n], np.zeros(n, np.int64)
    asked = Detections(boxes, np.ones(n, np.float32), zeros, zeros, [None] * n)
    (segments,) = built.part("segmenter", name).segment(Batch([IMAGES[2]], [""]), [asked])
    assert ((segments >= 0) & (segments <= 1)).all()


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_an_identity_is_canonical_json_without_floats(kind: str, name: str, built: Built) -> None:
    def floats(value: Any) -> bool:
        if isinstance(value, dict):
            return any(map(floats, value.values()))
        return any(map(floats, value)) if isinstance(value, list) else isinstance(value, float)

    part = built.part(kind, name)
    for what in (part.identity(), spec(built.options(kind, name))):
        plain = json.loads(json.dumps(what))
        assert not floats(plain)
        assert json.loads(rfc8785.dumps(what)) == plain
    assert json.loads(json.dumps(part.identity())) == part.identity() == part.identity()
    assert isinstance(part.version, int)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_options_travel_to_a_worker(kind: str, name: str, built: Built) -> None:
    options = built.options(kind, name)
    assert pickle.loads(pickle.dumps(options)) == options
    assert type(options).model_validate(options.model_dump(mode="json")) == options


def test_every_grounder_goes_with_every_segmenter_or_says_why_not(built: Built) -> None:
    batch = Batch(IMAGES, IDS)  # one for all: parts that share an encoder run it once
    lines, told = [], {}
    for grounder in sorted(GROUNDERS):
        for segmenter in sorted(SEGMENTERS):
            asked = regions_for(grounder)
            try:
                parts = build_parts(built.config("grounder", grounder), built.config("segmenter", segmenter), asked)
            except ConfigError:
                told[grounder, segmenter] = "not legal"
                continue
            found = built.answers(grounder)
            left = [bare(each) for each in found]
            for each, made in zip(found, parts.segmenter.segment(batch, left), strict=True):
                rest = iter(made)
                segments = [next(rest) if own is None else own for own in each.probability]
                maps = fuse(each, segments, len(asked))
                assert maps.shape == (2, MAP_SIZE_PX, MAP_SIZE_PX)
                assert next(rest, None) is None
            told[grounder, segmenter] = "ok"
        lines.append(f"{grounder:18}" + "".join(f"{told[grounder, s]:>18}" for s in sorted(SEGMENTERS)))
    print("\n" + " " * 18 + "".join(f"{s:>18}" for s in sorted(SEGMENTERS)), *lines, sep="\n")
    for grounder in GROUNDERS:
        boxes = getattr(built.part("grounder", grounder), "needs_segmenter", lambda _: False)(regions_for(grounder))
        for segmenter in SEGMENTERS:
            legal = SEGMENTER_TABLE[segmenter].takes_boxes or not boxes
            assert told[grounder, segmenter] == ("ok" if legal else "not legal")
