"""A detector's predictions: kept to the bit, refused where broken, drawn where wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.errors import CorruptError
from shared.outlines import unpack_runs
from stage3_finetune.contracts import Example
from stage3_finetune.detections import Answer, DetectPredictions
from stage3_finetune.instances import Things
from stage3_finetune.misses import worst_images

from .test_average_precision import CLASSES, scene, things


def predictions(seed: int = 0, masks: bool = True) -> DetectPredictions:
    pairs = scene(seed, ties=False)
    if not masks:
        pairs = [(replace(truth, masks=None), replace(found, masks=None)) for truth, found in pairs]
    examples = tuple(
        Example(f"i{n}", f"digest{n}", f"g{n // 2}", "val" if n < 6 else "test") for n in range(len(pairs))
    )
    answers = tuple(Answer(found, truth) for truth, found in pairs)
    return DetectPredictions(examples, CLASSES, answers, masks)


@pytest.mark.parametrize("masks", [True, False])
def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path, masks: bool) -> None:
    made = predictions(masks=masks)
    made.write(tmp_path / "p.jsonl")
    found = DetectPredictions.load(tmp_path / "p.jsonl")
    assert (found.examples, found.classes, found.masks) == (made.examples, made.classes, masks)
    for one, other in zip(found.answers, made.answers, strict=True):
        for a, b in ((one.truth, other.truth), (one.found, other.found)):
            assert (a.size_px, a.masks) == (b.size_px, b.masks)
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(a.labels, b.labels)
    assert (found.sha256, found.truth_sha256) == (made.sha256, made.truth_sha256)
    assert found.scores(seed=0, resamples=100) == made.scores(seed=0, resamples=100)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 1 + len(made.examples)
    parts = [made.part("val"), made.part("test")]
    assert DetectPredictions.join(parts).sha256 == made.sha256
    assert [len(part.examples) for part in parts] == [6, 6]


@pytest.mark.parametrize("masks", [True, False])
def test_measures_are_the_scores_and_weights_are_copies(masks: bool) -> None:
    made = predictions(masks=masks)
    named = made.scores(seed=0, resamples=100).named()
    measured = made.measures()
    assert set(measured) == set(named)
    weight = np.ones((1, len(made.examples)), np.int64)
    assert {name: float(measure(weight)[0]) for name, measure in measured.items()} == {
        name: pytest.approx(interval.value) for name, interval in named.items()
    }
    weight[0, 2:4] = 0
    without = DetectPredictions(
        made.examples[:2] + made.examples[4:], made.classes, made.answers[:2] + made.answers[4:], masks
    )
    for name, interval in without.scores(seed=0, resamples=100).named().items():
        assert float(measured[name](weight)[0]) == pytest.approx(interval.value)


def changed(made: DetectPredictions, **changes: object) -> DetectPredictions:
    place = next(n for n, answer in enumerate(made.answers) if len(answer.found) and len(answer.truth))
    answer = made.answers[place]
    if "truth" in changes:
        answer = replace(answer, truth=replace(answer.truth, boxes=answer.truth.boxes + 1))
    else:
        answer = replace(answer, found=replace(answer.found, **changes))
    return replace(made, answers=(*made.answers[:place], answer, *made.answers[place + 1 :]))


def test_digests_cover_answers_and_truth() -> None:
    made = predictions()
    answer = next(one.found for one in made.answers if len(one.found) and len(one.truth))
    for changes in (
        {"boxes": answer.boxes + 1},
        {"labels": (answer.labels + 1) % 3},
        {"scores": answer.scores + 1},
        {"masks": tuple(reversed(answer.masks))[:1] * len(answer)},
    ):
        other = changed(made, **changes)
        assert other.sha256 != made.sha256
        assert other.truth_sha256 == made.truth_sha256
    other = changed(made, truth=True)
    assert other.sha256 == made.sha256
    assert other.truth_sha256 != made.truth_sha256
    moved = replace(made, examples=(replace(made.examples[0], group="other"), *made.examples[1:]))
    assert moved.truth_sha256 != made.truth_sha256


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.pop("truth"),
        lambda row: row["truth"][0].update({"class": "z"}),
        lambda row: row["truth"][0].update(box_xyxy_px=[0, 0, 1.001, 1]),
        lambda row: row["truth"][0].update(box_xyxy_px=[0, 0, 1]),
        lambda row: row["truth"][0].update(mask="11"),
        lambda row: row["answers"].append({"class": "a", "box_xyxy_px": [0, 0, 1, 1], "mask": row["truth"][0]["mask"]}),
        lambda row: row.update(split=3),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, spoil) -> None:
    path = tmp_path / "p.jsonl"
    predictions().write(path)
    head, first, *rows = path.read_text().splitlines()
    row = json.loads(rows[0])
    spoil(row)
    path.write_text("\n".join([head, first, json.dumps(row), *rows[1:]]))
    with pytest.raises(CorruptError, match=r"p\.jsonl line 3: not predictions of a detector"):
        DetectPredictions.load(path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "sample_id,group\n"):
        (tmp_path / "p.jsonl").write_text(text)
        with pytest.raises(CorruptError, match="not predictions"):
            DetectPredictions.load(tmp_path / "p.jsonl")


def test_a_glance_chooses_by_masks_where_there_are_any() -> None:
    good, scalars = predictions().glance()
    assert good == (scalars["mask_ap"], scalars["mask_ap50"])
    good, scalars = predictions(masks=False).glance()
    assert good == (scalars["box_ap"], scalars["box_ap50"])
    assert "mask_ap" not in scalars
    pairs = [(things((50, 50), [], []), things((50, 50), [], [], []))]
    nothing = DetectPredictions((Example("a", "", "g"),), CLASSES, tuple(Answer(f, t) for t, f in pairs), False)
    assert nothing.glance()[0] == (-1.0, -1.0)


def test_an_answer_speaks_in_pixels() -> None:
    answer = Answer(things((50, 60), [(20, 30, 6.0)], [2], [250_000]), things((50, 60), [], []))
    assert answer.box_xyxy_px.tolist() == [[24, 14, 36, 26]]
    assert answer.score.tolist() == [0.25]
    assert answer.label.tolist() == [2]
    assert answer.runs == [unpack_runs(answer.found.masks[0])]
    assert sum(answer.runs[0]) == 3000
    assert Answer(replace(answer.found, masks=None), answer.truth).runs is None


def test_the_report_shows_the_worst_images_first() -> None:
    disc, other = (20.0, 30.0, 8.0), (35.0, 12.0, 8.0)
    truth = things((50, 60), [disc], [0])
    pairs = [
        (truth, things((50, 60), [disc], [0], [900_000])),  # right
        (truth, things((50, 60), [disc], [0], [400_000])),  # not sure: missed
        (truth, things((50, 60), [other], [0], [700_000])),  # missed, and false
        (truth, things((50, 60), [disc], [1], [800_000])),  # another class: missed, and false
        (things((50, 60), [], []), things((50, 60), [], [], [])),
    ]
    (section,) = worst_images(list("abcde"), pairs, CLASSES, lambda _: np.zeros((1, 50, 60), np.float32))
    assert [section.body.count(f"<br>{name}<") for name in "abcde"] == [0, 1, 1, 1, 0]
    assert section.body.index("<br>c<") < section.body.index("<br>d<") < section.body.index("<br>b<")
    assert "0 of 1 found, 1 false" in section.body
    assert "0 of 1 found, 0 false" in section.body
    assert "3 of 5 images have an error" in section.body
    assert worst_images(["a"], pairs[:1], CLASSES, lambda _: np.zeros((1, 50, 60), np.float32)) == []


def test_truth_and_answers_are_drawn_where_they_are() -> None:
    truth = things((50, 60), [(20.0, 30.0, 8.0)], [0])
    boxes = Things((50, 60), np.array([[500, 3000, 1500, 4500]]), np.array([0]), None, np.array([900_000]))
    drawn = []
    from stage3_finetune import misses

    for one in (truth, boxes):
        drawn.append(misses._field(one, 0))
    assert drawn[0][20, 30] == 1
    assert drawn[0][0, 0] == 0
    assert drawn[1].sum() == 10 * 15
    assert drawn[1][30:45, 5:15].all()
