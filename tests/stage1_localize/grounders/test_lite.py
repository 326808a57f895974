"""`lite`: its words, its routes, and the shipped weights on a real template."""

import hashlib
import importlib.resources

import numpy as np
import pytest
import torch

from pipelines.lite_words import REFUSED, UNSEEN
from pipelines.template import TemplateSlice, template_slices
from shared.config import validate
from shared.errors import ConfigError, CorruptError, PromptError
from stage1_localize.contracts import Batch, Region
from stage1_localize.grounders import lite, lite_card
from stage1_localize.grounders.lite import Lite, answer_parts
from stage1_localize.grounders.lite_card import Concept, Folds, Head, load_packaged
from stage1_localize.grounders.lite_head import Answer
from stage1_localize.segmenters import lite_medsam
from stage1_localize.segmenters.lite_medsam import Encoded, LiteMedSam

WEIGHTS = importlib.resources.files("stage1_localize").joinpath("weights")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def piece() -> TemplateSlice:
    """A slice through the ventricles, from a block that was held out of training (see lite_pictures)."""
    from pipelines.lite_pictures import template_pictures

    held_out = {picture.image.tobytes() for picture in template_pictures("held-out")}
    for piece in template_slices()[75:95]:
        if (piece.pixels[None].astype(np.float32) / np.float32(255)).tobytes() in held_out:
            return piece
    raise AssertionError("no held-out slice near the middle")


@pytest.fixture(scope="module")
def brain(piece) -> Batch:
    return Batch([piece.pixels[None].astype(np.float32) / np.float32(255)])


def regions(*texts: str) -> list[Region]:
    return [Region(text, (text,)) for text in texts]


def test_every_concept_has_ten_wordings_and_both_spellings():
    card = load_packaged().card
    assert {"tumour", "lungs", "left lung", "right lung", "brain", "grey matter", "white matter"} < set(card.concepts)
    assert {"white blood cell", "red blood cell", "platelet"} < set(card.concepts)
    assert all(len(set(concept.wordings)) >= 10 for concept in card.concepts.values())
    assert {"tumor", "tumour"} <= set(card.concepts["tumour"].wordings)
    assert {"grey matter", "gray matter"} <= set(card.concepts["grey matter"].wordings)


def test_the_card_pins_the_weights_and_says_what_they_are_not_for():
    card = load_packaged().card
    raw = WEIGHTS.joinpath("lite.safetensors").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == card.weights_sha256
    assert len(raw) < 2_000_000
    assert "Not for diagnosis" in card.not_for_diagnosis
    assert all(source in card.data for source in ("br35h", "cxrlung", "bccd", "template"))
    assert "CC BY 4.0" in WEIGHTS.joinpath("LICENSE.weights").read_text(encoding="utf-8")


@pytest.mark.slow
def test_known_words_and_near_synonyms_are_accepted():
    grounder = Lite(Lite.Options())
    grounder.check(regions("Tumour", "gray matter", "WBC", "left  lung"))
    vocabulary = grounder._vocabulary
    asked = [(concept, text) for concept, texts in UNSEEN.items() for text in texts]
    right = [
        text
        for concept, text in asked
        if (known := vocabulary.snap(text).known) and vocabulary.concept_of[known] == concept
    ]
    assert len(right) >= 0.85 * len(asked), sorted({text for _, text in asked} - set(right))


@pytest.mark.slow
def test_foreign_words_are_refused_by_name_with_the_words_it_knows():
    grounder = Lite(Lite.Options())
    for text in ("heart", "pneumonia", "kidney"):
        with pytest.raises(PromptError, match=f"'{text}' is not in this head's vocabulary") as caught:
            grounder.check(regions("brain", text))
        assert "grey matter" in (caught.value.hint or "")
    refused = [text for text in REFUSED if grounder._vocabulary.snap(text).known is None]
    assert len(refused) >= 0.85 * len(REFUSED), sorted(set(REFUSED) - set(refused))


def test_an_empty_wording_is_an_error():
    with pytest.raises(PromptError, match="empty"):
        Lite(Lite.Options()).check([Region("nothing", (" ",))])


@pytest.mark.slow
def test_grey_and_white_matter_are_told_apart_by_words(piece, brain):
    from stage1_localize.pictures import truth_map

    found = Lite(Lite.Options()).locate(brain, regions("brain", "gray matter", "white matter"))[0]
    maps = dict(zip(found.region.tolist(), found.probability, strict=True))
    truth = [truth_map(mask) for mask in (piece.brain, piece.grey, piece.white)]
    table = [[_dice(maps[k] > 0.5, t) for t in truth] for k in range(3)]
    assert table[0][0] > 0.95
    assert table[1][1] > 0.7 > table[1][2]
    assert table[2][2] > 0.7 > table[2][1]
    assert (found.score > 0.9).all()


def test_what_is_absent_leaves_the_map_empty(brain):
    found = Lite(Lite.Options()).locate(brain, regions("lung", "left lung", "platelet", "red blood cell"))[0]
    assert sum(float((p > 0.5).mean()) for p in found.probability if p is not None) < 0.01
    assert not any(p is None for p in found.probability)


def test_a_map_does_not_depend_on_what_else_is_asked(brain):
    grounder = Lite(Lite.Options())
    alone = grounder.locate(brain, regions("white matter"))[0]
    beside = grounder.locate(Batch(brain.images), regions("brain", "left lung", "white matter"))[0]
    place = beside.region.tolist().index(2)
    assert np.array_equal(alone.probability[0], beside.probability[place])
    assert alone.score[0] == beside.score[place]


def test_grounder_and_segmenter_share_one_encoder_pass(brain, monkeypatch):
    calls = []
    whole = lite_medsam.encode_image
    monkeypatch.setattr(lite_medsam, "encode_image", lambda model, image: calls.append(1) or whole(model, image))
    batch = Batch(brain.images)
    found = Lite(Lite.Options()).locate(batch, regions("brain", "tumour"))
    LiteMedSam(LiteMedSam.Options()).segment(batch, found)
    assert len(calls) == 1


def test_a_constant_image_holds_nothing():
    batch = Batch([np.full((1, 40, 50), 0.5, np.float32)])
    assert len(Lite(Lite.Options()).locate(batch, regions("brain", "tumour"))[0]) == 0


def test_routes_decide_whether_pixels_are_needed():
    grounder = Lite(Lite.Options())
    assert not grounder.needs_segmenter(regions("brain", "lungs"))
    assert grounder.needs_segmenter(regions("brain", "platelets"))


def test_a_fold_s_own_route_decides_too(monkeypatch):
    whole = load_packaged()
    lungs = whole.card.concepts["lungs"]
    assert lungs.route == "mask"
    boxes = whole.card.concepts | {"lungs": lungs.model_copy(update={"route": "component"})}
    of_fold = Head(whole.card.model_copy(update={"concepts": boxes}), whole.network)
    for heads, needed in (({0: whole}, False), ({0: whole, 1: of_fold}, True)):
        monkeypatch.setattr(lite, "open_folds", lambda reference, heads=heads: Folds(whole, heads, {}, "digest"))
        grounder = Lite(Lite.Options(head="head", cross_fitted=True))
        assert grounder.needs_segmenter(regions("lungs")) is needed


def test_cross_fitting_needs_a_head():
    with pytest.raises(ConfigError, match="cross_fitted: expected a 'head'"):
        validate(Lite.Options, {"cross_fitted": True})


def test_tampered_weights_are_refused(monkeypatch, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "lite.json").write_text(WEIGHTS.joinpath("lite.json").read_text(encoding="utf-8"))
    (tmp_path / "weights" / "lite.safetensors").write_bytes(b"other")
    monkeypatch.setattr(lite_card.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(CorruptError, match=r"lite\.safetensors: sha256"):
        load_packaged.__wrapped__()


IMAGE = Encoded(torch.zeros(256, 64, 64), height_px=128, width_px=256, height_image_px=64, width_image_px=128)
"""Twice as wide as high; one image px is two input px."""


def planted(presence: float = 8.0) -> Answer:
    return Answer(
        mask=torch.full((1, 1, 128, 128), -8.0),
        centre=torch.full((1, 1, 64, 64), -8.0),
        presence=torch.tensor([[presence]]),
        log_size=torch.full((1, 2, 64, 64), float(np.log(5))),
    )


def concept(route: str, **changes) -> Concept:
    return Concept(wordings=("thing",), route=route, **changes)


def test_peaks_become_boxes_and_the_threshold_becomes_one_half():
    answer = planted()
    answer.centre[0, 0, 10, 20] = 4.0
    answer.centre[0, 0, 11, 21] = 3.0  # the same thing: overlaps, and is no peak
    answer.centre[0, 0, 20, 50] = float(np.log(0.3 / 0.7)) + 1e-5
    answer.centre[0, 0, 25, 5] = float(np.log(0.29 / 0.71))
    answer.centre[0, 0, 50, 20] = 4.0  # in the padding
    parts = answer_parts(answer, concept("centre", centre_min_milli=300), IMAGE)
    assert len(parts) == 2
    (first, high, none), (second, low, _) = parts
    assert none is None
    centre = (first[:2] + first[2:]) / 2
    assert np.abs(centre - [20.5 * 2, 10.5 * 2]).max() < 1.1, "cells of 4 input px are 2 image px"
    assert np.allclose(second[2:] - second[:2], 10, atol=1e-3)
    assert high > 0.95
    assert low == pytest.approx(0.5, abs=1e-3)


def test_components_become_boxes_inside_the_image():
    answer = planted()
    answer.mask[0, 0, 10:20, 10:30] = 8
    answer.mask[0, 0, 40:50, 100:128] = 8
    answer.mask[0, 0, 30, 30] = 8  # too small
    parts = answer_parts(answer, concept("component", margin_px=4), IMAGE)
    assert len(parts) == 2
    assert np.abs(parts[0][0] - [8, 8, 32, 22]).max() <= 1
    assert parts[1][0][2] == 128, "clipped at the image's edge"
    assert all(probability is None and 0.5 < score <= 1 for _, score, probability in parts)


def test_a_mask_is_cut_from_its_padding_and_fills_the_map_frame():
    answer = planted()
    answer.mask[0, 0, 0:32, 64:] = 8
    answer.mask[0, 0, 50:52, 4:6] = 8  # a speck
    answer.mask[0, 0, 70:] = 8  # in the padding
    ((box, score, probability),) = answer_parts(answer, concept("mask"), IMAGE)
    assert np.abs(box - [64, 0, 128, 32]).max() <= 1
    assert score > 0.99
    assert probability[:120, 136:].min() > 0.9
    assert probability[136:, 136:].max() < 0.1
    assert probability[:180, :120].max() < 0.1


@pytest.mark.parametrize("route", ["mask", "component", "centre"])
def test_nothing_is_found_without_presence(route):
    answer = planted(presence=-1.0)
    answer.mask[0, 0, :40, :40] = 8
    answer.centre[0, 0, 10, 20] = 4.0
    assert answer_parts(answer, concept(route), IMAGE) == []
    answer.presence[:] = 1.0
    assert len(answer_parts(answer, concept(route), IMAGE)) == 1


def _dice(found: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())
