"""The table of predictions comes back to the bit, and only for the run it belongs to."""

import csv

import numpy as np
import pytest

from shared.errors import CorruptError
from stage3_finetune.labels import Example
from stage3_finetune.predictions import Predictions, read_predictions, write_predictions

CLASSES = ("a", "b, with a comma", "c")


def some() -> Predictions:
    raw = np.random.default_rng(0).random((5, 3)).astype(np.float32) ** 9
    examples = tuple(Example(f"{i}.png", CLASSES[i % 3], f"g{i // 2}", ("val", "test")[i > 1]) for i in range(5))
    return Predictions(examples, CLASSES, raw / raw.sum(axis=1, keepdims=True))


def test_comes_back_to_the_bit(tmp_path) -> None:
    made = some()
    write_predictions(tmp_path / "p.csv", made)
    back = read_predictions(tmp_path / "p.csv", made.examples, CLASSES)
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
    np.testing.assert_array_equal(Predictions.join([val, test]).probability, made.probability)


def test_the_digest_is_of_millionths() -> None:
    made = some()
    assert Predictions(made.examples, CLASSES, made.probability + np.float32(2e-6)).sha256 != made.sha256


@pytest.mark.parametrize("damage", ["rows", "classes", "text", "empty"])
def test_another_runs_table_is_refused(tmp_path, damage: str) -> None:
    made, path = some(), tmp_path / "p.csv"
    write_predictions(path, made)
    examples, classes = made.examples, CLASSES
    if damage == "rows":
        examples = examples[1:]
    elif damage == "classes":
        classes = ("a", "b", "c")
    else:
        path.write_text("" if damage == "empty" else path.read_text().replace("0.png", "9.png"))
    with pytest.raises(CorruptError, match=r"p\.csv: not the predictions of this run"):
        read_predictions(path, examples, classes)
