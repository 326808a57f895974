"""Scores against torchmetrics and by hand; intervals that resample groups."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc

from stage3_finetune.metrics import balanced_accuracy, macro_auroc, score

CLASSES = ("a", "b", "c")


def fake(seed: int, count: int, levels: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Coarse probabilities, so that ties are common, that lean towards the label."""
    generator = np.random.default_rng(seed)
    label = np.concatenate([np.arange(3), generator.integers(0, 3, count - 3)])
    raw = generator.integers(1, levels, (count, 3)) + 2 * np.eye(3, dtype=int)[label]
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32), label


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 60))
def test_equals_torchmetrics(seed: int, count: int) -> None:
    probability, label = fake(seed, count)
    scores = score(probability, label, [str(i) for i in range(count)], classes=CLASSES, seed=0, resamples=100)
    given_, true = torch.from_numpy(probability), torch.from_numpy(label)
    assert scores.accuracy.value == pytest.approx(float(multiclass_accuracy(given_, true, 3, average="micro")))
    assert scores.balanced_accuracy.value == pytest.approx(float(multiclass_accuracy(given_, true, 3)), abs=1e-6)
    assert scores.auroc.value == pytest.approx(float(multiclass_auroc(given_, true, 3)), abs=1e-5)
    assert scores.confusion.sum() == count
    assert np.trace(scores.confusion) == round(scores.accuracy.value * count)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_a_weight_is_as_good_as_a_copy(seed: int, weight: list[int]) -> None:
    probability, label = fake(seed, 9)
    one_hot = label[:, None] == np.arange(3)
    hit = probability.argmax(axis=1) == label
    copied = np.repeat(np.arange(9), weight)
    if len(copied) == 0:
        return
    once = np.ones((1, len(copied)), np.int64)
    weights = np.array([weight], np.int64)
    expected = balanced_accuracy(hit[copied], one_hot[copied], once)
    np.testing.assert_allclose(balanced_accuracy(hit, one_hot, weights), expected)
    expected = macro_auroc(probability[copied], one_hot[copied], once)
    np.testing.assert_allclose(macro_auroc(probability, one_hot, weights), expected)


def test_auroc_by_hand() -> None:
    probability = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.2, 0.8]], np.float32)
    one_hot = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    assert macro_auroc(probability, one_hot, np.ones((1, 4), np.int64)) == pytest.approx([3.5 / 4])


def test_the_bootstrap_is_by_group_equals_a_plain_loop_and_is_wider_than_by_file() -> None:
    generator = np.random.default_rng(1)
    group = np.repeat([f"patient{i:02d}" for i in range(20)], 10)
    # Whole patients are right or wrong: ten images of one say no more than one of them.
    right = np.repeat(generator.random(20) < 0.7, 10)
    label = np.tile([0, 1], 100)
    predicted = np.where(right, label, 1 - label)
    probability = (np.eye(2)[predicted] * 0.8 + 0.1).astype(np.float32)
    by_group = score(probability, label, list(group), classes=("a", "b"), seed=0)
    by_file = score(probability, label, [str(i) for i in range(200)], classes=("a", "b"), seed=0)
    assert by_group.groups == 20
    assert by_group.accuracy.value == by_file.accuracy.value == right.mean()
    plain = [right.reshape(20, 10)[generator.integers(0, 20, 20)].mean() for _ in range(4000)]
    low, high = np.percentile(plain, (2.5, 97.5))
    assert by_group.accuracy.low == pytest.approx(low, abs=0.051)
    assert by_group.accuracy.high == pytest.approx(high, abs=0.051)
    assert by_group.accuracy.high - by_group.accuracy.low > 2 * (by_file.accuracy.high - by_file.accuracy.low)


def test_resamples_are_a_function_of_the_seed() -> None:
    probability, label = fake(3, 40)
    group = [str(i // 4) for i in range(40)]
    first, again, other = (score(probability, label, group, classes=CLASSES, seed=s).as_dict() for s in (5, 5, 6))
    assert first == again
    assert first["auroc"]["low"] != other["auroc"]["low"]


def test_one_group_has_no_interval_and_says_so() -> None:
    probability, label = fake(0, 12)
    scores = score(probability, label, ["only"] * 12, classes=CLASSES, seed=0)
    assert scores.accuracy.value is not None
    assert (scores.accuracy.low, scores.auroc.high) == (None, None)
    assert scores.lines()[1] == "no intervals: 12 samples in 1 group"


def test_a_class_absent_from_the_part_or_from_resamples() -> None:
    probability, label = fake(0, 12)
    keep = label != 2
    scores = score(probability[keep], label[keep], [str(c) for c in label[keep]], classes=CLASSES, seed=0)
    assert scores.absent == ("c",)
    assert "without a sample: c" in scores.lines()[1]
    # Two groups of one class each: half of the resamples hold one class, and those have no AUROC.
    assert 0.4 < scores.resamples_one_class / scores.resamples < 0.6
    assert scores.auroc.low == scores.auroc.high == scores.auroc.value
    alone = score(probability[label == 0], label[label == 0], list("abcdefghijkl")[: (label == 0).sum()],
                  classes=CLASSES, seed=0)  # fmt: skip
    assert alone.auroc.value is None
    assert str(alone.auroc) == "undefined"


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="no sample"):
        score(np.empty((0, 2), np.float32), np.empty(0, np.int64), [], classes=("a", "b"), seed=0)
