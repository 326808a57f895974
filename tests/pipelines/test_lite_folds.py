"""Heads that never saw a part: groups stay whole, every one is left out once, and words go with their set."""

import csv
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines import lite_data
from pipelines.lite_folds import Left, held_out, leave_out, publish_head, write_lists
from pipelines.lite_pictures import SETS, pictures
from shared.errors import PromptError, UsageError
from stage1_localize.contracts import Region
from stage1_localize.fit import FitSettings
from stage1_localize.grounders.lite import Lite
from stage1_localize.grounders.lite_card import open_head
from stage1_localize.grounders.lite_head import LiteHead
from stage1_localize.pictures import Picture
from stage1_localize.segmenters.lite_medsam import Encoded


@pytest.fixture(scope="module")
def nine(test_data, tmp_path_factory):
    """A manifest of three training pictures of every set, with full paths."""
    folder, counts, kept = tmp_path_factory.mktemp("nine"), defaultdict(int), []
    with (test_data / "manifest.csv").open(newline="", encoding="utf-8") as table:
        for row in csv.DictReader(table):
            counts[row["set"], row["split"]] += 1
            if row["set"] in SETS and row["split"] == "train" and counts[row["set"], "train"] <= 3:
                kept.append(row | {name: str(test_data / row[name]) for name in ("image", "target")})
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    return folder


@pytest.fixture
def few(nine, monkeypatch):
    """The folder of the nine pictures; a blank slice for the template, blank embeddings: no encoder runs."""
    square = np.zeros((64, 64), np.float32)
    piece = Picture("template", "block00", square[None], masks={"brain": square + 1}, absent=frozenset(["lungs"]))
    monkeypatch.setattr(lite_data, "template_pictures", lambda part: iter([piece]))
    blank = Encoded(torch.zeros(256, 64, 64), 256, 256, 256, 256)
    monkeypatch.setattr(lite_data, "cached_encode", lambda image, cache: blank)
    return nine


@pytest.mark.parametrize("folds", [2, 3])
def test_every_training_group_is_left_out_of_one_fold(test_data, folds):
    left = [leave_out(test_data, [], folds, fold) for fold in range(folds)]
    everyone = {name for one in left for name in one.groups}
    assert sum(len(one.groups) for one in left) == len(everyone)
    assert left[0] == leave_out(test_data, [], folds, 0)
    for name in ("br35h", "cxrlung", "bccd"):
        shares = [sum(group.startswith(f"{name}/") for group in one.groups) for one in left]
        assert max(shares) - min(shares) <= 1, "every fold has its share of every set"
    assert sum(group.startswith("br35h/") for group in everyone) == 146


def test_a_fit_sees_nothing_of_what_is_held_out(few, tmp_path):
    rows = [picture.group for picture in pictures(few, "train") if picture.source == "br35h"]
    gone = rows[0]
    left = Left(folds=2, fold=0, groups=frozenset([f"br35h/{gone}"]))
    fitted = lite_data.examples(few, tmp_path, left)
    assert {example.source for example in fitted} == {"br35h", "cxrlung", "bccd", "template"}
    assert not [example for example in fitted if (example.source, example.group) == ("br35h", gone)]
    kept = len(rows) - rows.count(gone)
    assert 0 < kept < 3
    assert sum(example.source == "br35h" for example in fitted) == 2 * kept
    plain = lite_data.examples(few, tmp_path, left, mirrors=False)
    assert sum(example.source == "br35h" for example in plain) == kept


def test_held_out_pictures_are_those_of_the_image_lists(test_data, tmp_path):
    left = leave_out(test_data, [], 20, 3)
    left = Left(folds=20, fold=3, groups=frozenset(name for name in left.groups if name.startswith("br35h/")))
    (path,) = write_lists(test_data, left, tmp_path / "new")
    assert path.name == "held-out-br35h.csv"
    with path.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert all((test_data / row["image"]).is_file() for row in rows)
    assert len({row["sample_id"] for row in rows}) == len(rows)
    groups = [picture.group for picture in held_out(test_data, left)]
    assert sorted(groups) == sorted(row["group"] for row in rows)
    assert {f"br35h/{group}" for group in groups} == left.groups


def test_a_head_without_a_set_refuses_the_set_s_words(few, tmp_path):
    left = Left(sets=("br35h",))
    fitted = lite_data.examples(few, tmp_path, left)
    assert "tumour" not in lite_data.held_by(fitted)
    assert all("tumour" not in example.absent for example in fitted), "it would be taught as never there"
    assert any("lungs" in example.absent for example in fitted)
    torch.manual_seed(0)
    state = LiteHead().state_dict()
    save_file(state, tmp_path / "lite.safetensors")
    settings = FitSettings(mix={"cxrlung": 1, "bccd": 2, "template": 1}, steps=1)
    card = lite_data.first_card(tmp_path / "lite.safetensors", fitted, 1, settings, left)
    assert set(card.data) == set(settings.mix)
    assert card.fit["left_out"]["sets"] == ["br35h"]
    assert {"brain mass", "brain lesion"} <= set(card.foreign), "else they pass for 'brain'"
    publish_head(tmp_path / "head", card, state, left)
    head = open_head(str(tmp_path / "head"))
    assert all(torch.equal(head.network.state_dict()[name], tensor) for name, tensor in state.items())
    grounder = Lite(Lite.Options(), head)
    grounder.check([Region(name="chest", texts=("lungs",))])
    for text in ("tumour", "brain tumour", "glioma"):
        with pytest.raises(PromptError, match="vocabulary"):
            grounder.check([Region(name="growth", texts=(text,))])


@pytest.mark.parametrize(
    ("sets", "folds", "fold"),
    [(["brain4"], 1, None), (["br35h", "cxrlung", "bccd"], 1, None), ([], 2, None), ([], 2, 2), ([], 1, 0), ([], 0, 0)],
)
def test_parts_that_do_not_exist_are_refused(test_data, sets, folds, fold):
    with pytest.raises(UsageError, match=r"expected (some of|both)"):
        leave_out(test_data, sets, folds, fold)


def test_a_fold_s_head_is_not_scored_as_another(few, tmp_path, capsys):
    fitted = lite_data.examples(few, tmp_path)
    save_file(LiteHead().state_dict(), tmp_path / "lite.safetensors")
    card = lite_data.first_card(tmp_path / "lite.safetensors", fitted, 1, lite_data.SETTINGS)
    assert "left_out" not in card.fit
    (tmp_path / "lite.json").write_text(card.model_dump_json(), encoding="utf-8")
    places = ["--data", str(few), "--cache", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        lite_data.main([*places, "--evaluate", "--folds", "2", "--fold", "0"])
    assert "give the flags of its fit" in capsys.readouterr().err
