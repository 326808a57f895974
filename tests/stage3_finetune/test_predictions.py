"""The table of predictions comes back to the bit, and only for the run it belongs to."""

import csv

import numpy as np
import pytest

from shared.errors import CorruptError
from stage3_finetune.contracts import Example
from stage3_finetune.predictions import ClassPredictions

CLASSES = ("a", "b, with a comma", "c")


def some() -> ClassPredictions:
    raw = np.random.default_rng(0).random((5, 3)).astype(np.float32) ** 9
    examples = tuple(Example(f"{i}.png", CLASSES[i % 3], f"g{i // 2}", ("val", "test")[i > 1]) for i in range(5))
    return ClassPredictions(examples, CLASSES, raw / raw.sum(axis=1, keepdims=True))


def test_comes_back_to_the_bit(tmp_path) -> None:
    made = some()
    made.write(tmp_path / "p.csv")
    back = ClassPredictions.load(tmp_path / "p.csv")
    assert (back.examples, back.classes) == (made.examples, made.classes)
    np.testing.assert_array_equal(back.probability, made.probability)
    assert back.sha256 == made.sha256
    line = (tmp_path / "p.csv").read_text().splitlines()
    assert line[0] == 'sample_id,group,split,label,predicted,p a,"p b, with a comma",p c'
    row = next(csv.reader(line[1:2]))
    assert row[:5] == ["0.png", "g0", "val", "a", CLASSES[int(made.probability[0].argmax())]]


def test_parts_and_joining() -> None:
    made = some()
    val, test = made.part("val"), made.part("test")
    assert (len(val.examples), len(test.examples)) == (2, 3)
    assert test.group == ["g1", "g1", "g2"]
    assert test.label.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(ClassPredictions.join([val, test]).probability, made.probability)


def test_the_digest_is_of_millionths() -> None:
    made = some()
    assert ClassPredictions(made.examples, CLASSES, made.probability + np.float32(2e-6)).sha256 != made.sha256


@pytest.mark.parametrize("damage", ["class", "text", "empty", "gone"])
def test_no_table_of_predictions_is_refused(tmp_path, damage: str) -> None:
    made, path = some(), tmp_path / "p.csv"
    made.write(path)
    text = path.read_text()
    if damage == "gone":
        path.unlink()
    else:
        other = text.replace("val,a", "val,d")
        path.write_text({"class": other, "text": text.replace("0.png", "0.png,x"), "empty": ""}[damage])
    with pytest.raises(CorruptError, match=r"p\.csv"):
        ClassPredictions.load(path)


def test_a_header_that_says_several_classes_is_another_digest(tmp_path) -> None:
    made = some()
    several = ClassPredictions(made.examples, made.classes, made.probability, multi_label=True)
    assert several.sha256 != made.sha256


def test_measures_are_the_scores() -> None:
    made = some()
    found = made.scores(seed=0, resamples=100).intervals
    weight = np.ones((1, len(made.examples)), np.int64)
    measured = {name: float(measure(weight)[0]) for name, measure in made.measures().items()}
    assert measured == {name: pytest.approx(interval.value) for name, interval in found.items()}
