"""COCO's scores: equal to pycocotools, and resampled without new matching."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from stage3_finetune.annotations import pack
from stage3_finetune.average_precision import (
    _MEASURED,
    Pair,
    _measure,
    _rows,
    at_a_glance,
    average_precision,
    coco_scores,
    evaluate,
    match,
    score,
)
from stage3_finetune.instances import Things

CLASSES = ("a", "b", "c")


def scene(seed: int, images: int = 12, *, answers: bool = True, ties: bool = True) -> list[Pair]:
    """Discs, and answers near them and elsewhere; some images have no thing, some no answer; scores tie often or never.

    Answers near a thing are mostly of its class.
    """
    draw = np.random.default_rng(seed)
    pairs = []
    for image in range(images):
        size = (int(draw.integers(80, 260)), int(draw.integers(80, 260)))
        there = [] if image % 5 == 0 else [disc(draw, size) for _ in range(draw.integers(1, 6))]
        said, called = [], []
        truth_label = draw.integers(0, 3, len(there))
        for label, thing in zip(truth_label, there, strict=True) if answers and image % 4 else []:
            for _ in range(draw.integers(0, 3)):
                y, x, radius = thing
                called.append(label if draw.random() < 0.8 else draw.integers(3))
                said.append((y + draw.normal(0, 3), x + draw.normal(0, 3), max(3.0, radius * draw.uniform(0.7, 1.3))))
        said += [disc(draw, size) for _ in range(draw.integers(0, 4))] if answers else []
        called += list(draw.integers(0, 3, len(said) - len(called)))
        scores = draw.integers(1, 12, len(said)) * 80_000 if ties else draw.permutation(50)[: len(said)] * 20_000 + 1
        pairs.append((things(size, there, truth_label), things(size, said, called, scores)))
    return pairs


def disc(draw: np.random.Generator, size: tuple[int, int]) -> tuple[float, float, float]:
    return draw.uniform(20, size[0] - 20), draw.uniform(20, size[1] - 20), draw.choice([6.0, 20.0, 60.0])


def things(size, discs, labels, scores=None) -> Things:
    boxes, masks = [], []
    for y, x, radius in discs:
        rows, columns = np.ogrid[: size[0], : size[1]]
        inside = (rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 <= radius**2
        boxes.append([max(0, x - radius), max(0, y - radius), min(size[1], x + radius), min(size[0], y + radius)])
        masks.append(pack(inside))
    hundredths = np.floor(np.array(boxes).reshape(-1, 4) * 100 + 0.5).astype(np.int64)
    return Things(
        size, hundredths, np.asarray(labels, np.int64), tuple(masks), None if scores is None else np.asarray(scores)
    )


def reference(pairs: list[Pair], kind: str) -> COCOeval:
    """What pycocotools makes of them."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": n, "height": t.size_px[0], "width": t.size_px[1]} for n, (t, _) in enumerate(pairs, 1)],
            "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES, 1)],
            "annotations": _rows([t for t, _ in pairs], kind),
        }
        truth.createIndex()
        evaluation = COCOeval(
            truth, truth.loadRes(_rows([f for _, f in pairs], kind)), "bbox" if kind == "box" else "segm"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools_and_to_faster_coco_eval(seed: int, kind: str) -> None:
    pairs = scene(seed)
    expected, other = reference(pairs, kind), evaluate(pairs, CLASSES, kind)
    assert 0.05 < expected.stats[0] < 0.95
    np.testing.assert_allclose(other.stats[:12], expected.stats, atol=1e-6)
    found = _measure([match(pairs, label, kind) for label in range(3)])(np.ones((1, len(pairs)), np.int64))[0]
    np.testing.assert_allclose(found, expected.stats[[0, 1, 2, 8]], atol=1e-9)
    sizes, by_class = coco_scores(pairs, CLASSES, kind)
    for value, stat in zip(sizes.values(), expected.stats[3:6], strict=True):
        assert (value if value is not None else -1) == pytest.approx(stat, abs=1e-6)
    precision = expected.eval["precision"][:, :, :, 0, 2]
    assert [by_class[name] for name in CLASSES] == pytest.approx([precision[:, :, k].mean() for k in range(3)])


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_an_image_that_is_drawn_twice_counts_as_its_copies_would(kind: str) -> None:
    pairs = scene(3, 8, ties=False)
    weight = np.array([[2, 0, 1, 3, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 4, 4]])
    measure = _measure([match(pairs, label, kind) for label in range(3)])
    for row, found in zip(weight, measure(weight), strict=True):
        copies = [pair for pair, times in zip(pairs, row, strict=True) for _ in range(times)]
        np.testing.assert_allclose(found, reference(copies, kind).stats[[0, 1, 2, 8]], atol=1e-9)


def test_few_rows_at_once_give_what_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    matches = match(scene(1), 0, "box")
    weight = np.random.default_rng(0).integers(0, 3, (50, 12))
    expected = average_precision(matches, weight)
    monkeypatch.setattr("stage3_finetune.average_precision._CHUNK", 1)
    np.testing.assert_array_equal(average_precision(matches, weight), expected)


def test_perfect_answers_score_one_and_none_score_zero() -> None:
    perfect = [
        (truth, Things(truth.size_px, truth.boxes, truth.labels, truth.masks, np.full(len(truth), 900_000)))
        for truth, _ in scene(0)
    ]
    group = [str(place // 2) for place in range(12)]
    made = score(perfect, group, classes=CLASSES, masks=True, seed=0, resamples=100)
    assert made.mask is not None
    for kind in (made.box, made.mask):
        assert [getattr(kind, name).value for name in _MEASURED] == pytest.approx([1] * 4)
        assert (kind.ap.low, kind.ap.high) == pytest.approx((1, 1))
        assert kind.by_class == pytest.approx(dict.fromkeys(CLASSES, 1.0))
    assert (made.samples, made.groups, made.resamples) == (12, 6, 100)
    assert made.things == {name: sum((t.labels == k).sum() for t, _ in perfect) for k, name in enumerate(CLASSES)}
    none = score(scene(0, answers=False), group, classes=CLASSES, masks=False, seed=0, resamples=100)
    assert none.mask is None
    assert (none.box.ap.value, none.box.ar.value) == (0.0, 0.0)
    assert next(iter(made.named())) == "MaskAP"
    assert list(none.named()) == ["BoxAP", "BoxAP50", "BoxAP75", "BoxAR"]


def test_intervals_hold_the_value_and_depend_on_groups() -> None:
    pairs = scene(2, 40)
    single = score(pairs, list(map(str, range(40))), classes=CLASSES, masks=False, seed=0, resamples=300).box.ap
    grouped = score(pairs, [str(n // 10) for n in range(40)], classes=CLASSES, masks=False, seed=0, resamples=300).box
    assert single.low < single.value < single.high
    assert single.value == grouped.ap.value
    assert (single.low, single.high) != (grouped.ap.low, grouped.ap.high)
    alone = score(pairs, ["one"] * 40, classes=CLASSES, masks=False, seed=0, resamples=300)
    assert (alone.box.ap.value, alone.box.ap.low) == (single.value, None)
    assert "no intervals: 40 samples in 1 group" in alone.lines()[-1]


def test_without_a_thing_nothing_is_defined() -> None:
    empty = [(things((50, 50), [], []), things((50, 50), [(20, 20, 6.0)], [0], [500_000]))] * 4
    made = score(empty, list("aabb"), classes=CLASSES, masks=False, seed=0, resamples=100)
    assert made.box.ap.value is None
    assert made.box.by_class == dict.fromkeys(CLASSES)
    assert made.box.by_size == dict.fromkeys(("small", "medium", "large"))
    assert made.resamples_undefined == 100
    assert "without a thing: a, b, c" in made.lines()[-1]
    assert all(math.isnan(value) for value in at_a_glance(empty, 3, masks=False).values())
    with pytest.raises(ValueError, match="no sample"):
        score([], [], classes=CLASSES, masks=False, seed=0)


def test_resamples_without_a_thing_are_counted() -> None:
    pairs = scene(0, 5)[:2]  # the first image has no thing
    made = score(pairs, ["a", "b"], classes=CLASSES, masks=False, seed=0, resamples=400)
    assert 50 < made.resamples_undefined < 150


def test_only_the_hundred_most_sure_answers_of_an_image_count() -> None:
    truth = things((100, 100), [(50, 50, 20.0)], [0])
    for place, right in ((100, 1), (101, 0)):
        discs = [(20, 20, 6.0)] * (place - 1) + [(50, 50, 20.0)]
        found = things((100, 100), discs, [0] * place, [900_000 - n for n in range(place)])
        assert match([(truth, found)], 0, "box").hit[0].sum() == right
