"""What a release published opens in every later one: cards, files, roots, and masks drawn again to the bit."""

import hashlib
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from pipelines.audit import audit
from pipelines.predict import open_model
from shared.artifact import CARD, Card, read_card
from shared.backbones import load_encoder
from shared.corpus import open_corpus
from shared.regions import open_region_store
from stage2_pretrain.witness import redraw
from stage3_finetune.predictions import ClassPredictions
from tests.compat import independent_root

HERE = Path(__file__).parent
RELEASES = sorted(path.name for path in HERE.glob("v*") if path.is_dir())


@pytest.fixture(params=RELEASES)
def golden(request: pytest.FixtureRequest) -> Path:
    return HERE / request.param


def test_every_release_has_its_golden_artifacts() -> None:
    assert "v0.1.0" in RELEASES


def test_all_are_identical_to_the_bit_masks_included(golden: Path) -> None:
    result = audit(golden, level="masks")
    assert result.exit_code == 0, result.lines()
    assert {row.verdict for row in result.rows} == {"identical"}, result.lines()
    assert {("region-store", "maps"), ("encoder", "masks"), ("model", "scores")} <= {
        (row.kind, row.check) for row in result.rows
    }


def test_ids_are_those_of_the_release(golden: Path) -> None:
    ids = json.loads((golden / "ids.json").read_text())
    assert ids == {path.parent.relative_to(golden).as_posix(): read_card(path.parent).artifact_id
                   for path in golden.rglob(CARD)}  # fmt: skip
    kinds = {read_card(golden / name).identity.kind for name in ids}
    assert kinds >= {"corpus", "region-store", "encoder", "model", "audit-report"}


def test_cards_fit_the_schema(golden: Path) -> None:
    validator = jsonschema.Draft202012Validator(Card.model_json_schema(mode="serialization"))
    for path in golden.rglob(CARD):
        validator.validate(json.loads(path.read_bytes()))


def test_masks_are_drawn_again_with_the_same_bits(golden: Path) -> None:
    store = open_region_store(golden / "regions")
    found = redraw(store, read_card(golden / "encoder", "encoder").identity.spec, golden / "encoder")
    assert found.mismatches == ()
    assert found.checked == found.draws == 2 * 18


def test_contents_are_read(golden: Path) -> None:
    card, rows = open_corpus(golden / "regions" / "corpus")
    assert len(rows) == card.identity.outputs["count"] == 19
    store = open_region_store(golden / "regions")
    assert [sample.status for sample in store.samples] == ["ok"] * 18 + ["quarantined"]
    maps = store.maps(range(19))
    digests = [hashlib.sha256(values.tobytes()).hexdigest() for values in maps]
    assert digests == [sample.maps_digest for sample in store.samples]
    assert 0 < np.count_nonzero(maps[:18, 0]) < maps[:18, 0].size
    assert len(store.boxes(0)[0]) == 2
    backbone = load_encoder(golden / "encoder" / "encoder")
    with torch.no_grad():
        assert torch.isfinite(backbone.model(torch.zeros(1, 1, 64, 64))).all()
    predictions = ClassPredictions.load(golden / "model" / "predictions.csv")
    assert {row.split for row in predictions.examples} == {"val", "test"}
    task, _ = open_model(str(golden / "model"))
    assert task.classes == predictions.classes


def test_a_second_implementation_agrees(golden: Path) -> None:
    found, wrong = independent_root.read_store(golden / "regions")
    assert wrong == []
    assert found["artifact_id"] == json.loads((golden / "ids.json").read_text())["regions"]


def test_they_are_small_and_say_nothing_of_where_they_were_made(golden: Path) -> None:
    files = [path for path in golden.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 600_000
    for path in files:
        raw = path.read_bytes()
        assert not any(word in raw for word in (b"/tmp", b"/home", b"/opt", b"/work", b"/root")), path
