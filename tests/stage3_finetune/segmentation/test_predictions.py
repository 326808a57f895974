"""A file of segmentations: scored by itself, and refused where truth and label part."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.errors import CorruptError
from stage3_finetune.contracts import Example
from stage3_finetune.segmentation.drawn import IGNORE, draw
from stage3_finetune.segmentation.predictions import Row, SegmentPredictions

CLASSES = ("a", "b")


def some() -> SegmentPredictions:
    noise = np.random.default_rng(0)
    examples, rows = [], []
    for number in range(5):
        truth, answer = noise.integers(0, 3, (2, 9, 7)).astype(np.uint8)
        answer = np.where(noise.random((9, 7)) < 0.2 * number, answer, truth)
        truth[0, :2] = IGNORE
        row = Row(draw(truth, CLASSES), draw(answer, CLASSES), (0.1 + number, 0.7) if number else None)
        examples.append(Example(f"{number}.png", row.truth.sha256, f"g{number // 2}", ("val", "test")[number > 1]))
        rows.append(row)
    return SegmentPredictions(tuple(examples), CLASSES, tuple(rows))


def test_comes_back_to_the_bit_and_equal_ones_are_equal_files(tmp_path: Path) -> None:
    made = some()
    for name in ("a", "b"):
        made.write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    back = SegmentPredictions.load(tmp_path / "a")
    assert back == made
    assert (back.sha256, back.truth_sha256) == (made.sha256, made.truth_sha256)
    assert back.scores(seed=0, resamples=100) == made.scores(seed=0, resamples=100)


def test_measures_are_the_scores_and_weights_are_copies() -> None:
    made = some()
    named = made.scores(seed=0, resamples=100).named()
    weight = np.ones((1, len(made.examples)), np.int64)
    for name, measure in made.measures().items():
        assert float(measure(weight)[0]) == pytest.approx(named[name].value)
    weight[0, 1] = 0
    kept = [0, 2, 3, 4]
    without = replace(made, examples=tuple(made.examples[i] for i in kept), rows=tuple(made.rows[i] for i in kept))
    named = without.scores(seed=0, resamples=100).named()
    for name, measure in made.measures().items():
        assert float(measure(weight)[0]) == pytest.approx(named[name].value)


def test_digests_are_of_answers_and_of_truth_apart() -> None:
    made = some()
    first = made.rows[0]
    other = replace(made, rows=(replace(first, answer=made.rows[1].answer), *made.rows[1:]))
    assert (other.sha256 == made.sha256, other.truth_sha256 == made.truth_sha256) == (False, True)
    for changed in (
        replace(made, rows=(replace(first, spacing_mm=(1.0, 1.0)), *made.rows[1:])),
        replace(made, examples=(replace(made.examples[0], group="other"), *made.examples[1:])),
    ):
        assert (changed.sha256 == made.sha256, changed.truth_sha256 == made.truth_sha256) == (True, False)


def test_parts_and_joining() -> None:
    made = some()
    val, test = made.part("val"), made.part("test")
    assert (len(val.rows), len(test.rows)) == (2, 3)
    assert SegmentPredictions.join([val, test]) == made


def test_a_glance_is_the_score_without_intervals() -> None:
    made = some()
    (best,), scalars = made.glance()
    assert best == scalars["dice"] == pytest.approx(made.scores(seed=0, resamples=100).mean.dice.value)
    empty = draw(np.zeros((3, 3), np.uint8), CLASSES)
    nothing = SegmentPredictions((made.examples[0],), CLASSES, (Row(empty, empty),))
    assert nothing.glance() == ((0.0,), {"dice": 0.0})
    assert nothing.pictures(lambda name: np.zeros((1, 3, 3), np.float32)) == []


def test_the_report_shows_the_worst_first() -> None:
    asked: list[str] = []

    def pixels(name: str) -> np.ndarray:
        asked.append(name)
        return np.zeros((1, 9, 7), np.float32)

    (section,) = some().pictures(pixels)
    assert section.body.count("<img") == 5
    dice = [float(part[:5]) for part in section.body.split("<b>Dice ")[1:]]
    assert dice == sorted(dice)
    assert sorted(asked) == [f"{number}.png" for number in range(5)]
    assert asked[-1] == "0.png"  # whose answer is its truth


@pytest.mark.parametrize("damage", ["truth", "answer", "format", "frame", "text", "cut", "gone", "ignored"])
def test_what_does_not_hold_together_is_refused(tmp_path: Path, damage: str) -> None:
    made, path = some(), tmp_path / "p.jsonl.gz"
    made.write(path)
    head, first, *rest = (json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines())
    if damage == "truth":
        first["truth"] = rest[0]["truth"]  # which is whole
    elif damage == "answer":
        first["answer"]["runs"]["a"] = "0"
    elif damage == "format":
        head["format"] = "other"
    elif damage == "frame":
        first["answer"]["size"] = [7, 9]
    elif damage == "ignored":
        first["answer"]["ignore"] = first["truth"]["ignore"]
        first["answer"]["runs"] = {}
    lines = "".join(json.dumps(line) + "\n" for line in (head, first, *rest)).encode()
    raw = gzip.compress(b"[1" if damage == "text" else lines)
    path.write_bytes(raw[:-9] if damage == "cut" else raw)
    if damage == "gone":
        path.unlink()
    with pytest.raises(CorruptError, match=r"p\.jsonl\.gz: not a file of segmentations"):
        SegmentPredictions.load(path)
