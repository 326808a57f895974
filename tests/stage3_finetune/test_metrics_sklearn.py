"""Scores equal scikit-learn's, of the samples as they are and of weighted copies of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import multiclass_calibration_error

from stage3_finetune.metrics import (
    balanced_of_several,
    calibration_error,
    macro_auprc,
    macro_auroc,
    macro_f1,
    score,
    score_several,
)

CLASSES = ("a", "b", "c")
seeds = st.integers(0, 10_000)


def one(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Coarse probabilities, so that ties are common, and every class."""
    generator = np.random.default_rng(seed)
    label = np.concatenate([np.arange(3), generator.integers(0, 3, count - 3)])
    raw = generator.integers(1, 7, (count, 3)) + 2 * np.eye(3, dtype=int)[label]
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32), label


def several(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.random((count, 3)) < (0.2, 0.5, 0.7)
    truth[:2] = [[True] * 3, [False] * 3]
    return (generator.integers(0, 8, (count, 3)) / 10 + 0.25 * truth).astype(np.float32), truth


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_one_class_an_image(seed: int) -> None:
    probability, label = one(seed)
    found = score(probability, label, list(map(str, label)), classes=CLASSES, seed=0, resamples=100).intervals
    chosen, wide = probability.argmax(axis=1), probability.astype(np.float64)
    hot = np.eye(3, dtype=int)[label]
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(label, chosen))
    assert found["balanced_accuracy"].value == pytest.approx(sk.balanced_accuracy_score(label, chosen))
    assert found["f1"].value == pytest.approx(sk.f1_score(label, chosen, average="macro"))
    auroc = np.mean([sk.roc_auc_score(hot[:, k], wide[:, k]) for k in range(3)])
    assert found["auroc"].value == pytest.approx(auroc)
    assert found["auprc"].value == pytest.approx(sk.average_precision_score(hot, wide, average="macro"))
    normed = wide / wide.sum(axis=1, keepdims=True)
    assert found["brier"].value == pytest.approx(sk.brier_score_loss(label, normed, scale_by_half=True), abs=1e-6)
    # On an edge of a bin the two round apart; shares such as 3/5 are such edges.
    moved = (wide + np.random.default_rng(seed).random((60, 3)) * 1e-3).astype(np.float32)
    moved /= moved.sum(axis=1, keepdims=True)
    expected = multiclass_calibration_error(torch.from_numpy(moved), torch.from_numpy(label), 3, n_bins=15)
    again = score(moved, label, list(map(str, label)), classes=CLASSES, seed=0, resamples=100).intervals
    assert again["ece"].value == pytest.approx(float(expected), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_several_classes_an_image(seed: int) -> None:
    probability, truth = several(seed)
    scores = score_several(probability, truth, list(map(str, truth[:, 0])), classes=CLASSES, seed=0, resamples=100)
    found, said, wide = scores.intervals, probability >= 0.5, probability.astype(np.float64)
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(truth, said))
    balanced = np.mean([sk.balanced_accuracy_score(truth[:, k], said[:, k]) for k in range(3)])
    assert found["balanced_accuracy"].value == pytest.approx(balanced)
    assert found["f1"].value == pytest.approx(sk.f1_score(truth, said, average="macro"))
    assert found["auroc"].value == pytest.approx(sk.roc_auc_score(truth, wide, average="macro"))
    assert found["auprc"].value == pytest.approx(sk.average_precision_score(truth, wide, average="macro"))
    brier = np.mean([sk.brier_score_loss(truth[:, k], wide[:, k]) for k in range(3)])
    assert found["brier"].value == pytest.approx(brier)
    for k, row in enumerate(scores.per_class):
        assert row["recall"] == pytest.approx(sk.recall_score(truth[:, k], said[:, k]))
        assert row["precision"] == pytest.approx(sk.precision_score(truth[:, k], said[:, k], zero_division=np.nan))
        assert row["auprc"] == pytest.approx(sk.average_precision_score(truth[:, k], wide[:, k]))


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_weights_are_those_of_scikit_learn(seed: int) -> None:
    probability, truth = several(seed)
    weight = np.random.default_rng(seed + 1).integers(0, 4, (2, len(truth)))
    weight[:, :2] = 1  # both sides of every class occur
    said, wide = probability >= 0.5, probability.astype(np.float64)
    for row, w in enumerate(weight):
        more = {"average": "macro", "sample_weight": w}
        assert macro_auroc(probability, truth, weight)[row] == pytest.approx(sk.roc_auc_score(truth, wide, **more))
        expected = sk.average_precision_score(truth, wide, **more)
        assert macro_auprc(probability, truth, weight)[row] == pytest.approx(expected)
        assert macro_f1(said, truth, weight)[row] == pytest.approx(sk.f1_score(truth, said, **more))
        balanced = [sk.balanced_accuracy_score(truth[:, k], said[:, k], sample_weight=w) for k in range(3)]
        assert balanced_of_several(said, truth, weight)[row] == pytest.approx(np.mean(balanced))


def test_calibration_bins_are_scikit_learns_and_a_weight_is_a_copy() -> None:
    probability, truth = several(5, 200)
    column = slice(0, 1)
    found, said = calibration_curve(truth[:, 0], probability[:, 0], n_bins=15)
    scores = score_several(probability[:, [0, 0]], truth[:, [0, 0]], list("ab") * 100, classes=("a", "b"), seed=0)
    np.testing.assert_allclose(scores.calibration.found, found)
    np.testing.assert_allclose(scores.calibration.said, said, atol=1e-6)
    assert sum(scores.calibration.count) == 400
    weight = np.random.default_rng(0).integers(0, 3, (1, 200))
    copied = np.repeat(np.arange(200), weight[0])
    once = np.ones((1, len(copied)), np.int64)
    expected = calibration_error(probability[copied][:, column], truth[copied][:, column], once)
    np.testing.assert_allclose(calibration_error(probability[:, column], truth[:, column], weight), expected)


def test_a_class_that_never_occurs_is_left_out_and_the_report_says_what_it_shows() -> None:
    probability, truth = several(1)
    truth[:, 2] = False
    scores = score_several(probability, truth, list("abc") * 20, classes=CLASSES, seed=0)
    assert scores.absent == ("c",)
    assert scores.per_class[2]["auroc"] is None
    assert scores.intervals["auroc"].value == pytest.approx(sk.roc_auc_score(truth[:, :2], probability[:, :2]))
    assert next(iter(scores.named())) == "AUROC"
    assert [section.heading for section in scores.sections()] == ["Class by class", "Is it as sure as it is right"]
    assert "undefined" in scores.sections()[0].body
    assert scores.as_dict()["classes_absent"] == ["c"]
