"""The model card: a hub can read its head, its code runs, it tells the lineage and no sample."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import rfc8785
from huggingface_hub import ModelCard

from pipelines.exportable import open_exportable
from pipelines.lineage import Lineage, trace
from pipelines.model_card import model_card, packaged_terms, uses_lite
from shared.artifact import Card, read_card
from shared.errors import UsageError
from tests.pipelines.exports import GOLDEN

ENCODER = GOLDEN / "encoder"


def edited(card: Card, **identity: object) -> Card:
    return card.model_copy(update={"identity": card.identity.model_copy(update=identity)})


def test_a_hub_reads_its_head_and_a_reader_finds_the_lineage(tmp_path: Path, mwm) -> None:
    code, _, err = mwm("export", ENCODER, "--to", "huggingface", "--out", tmp_path / "x")
    assert (code, err) == (0, "")
    read = ModelCard.load(tmp_path / "x" / "README.md")
    assert read.data.library_name == "timm"
    assert read.data.pipeline_tag == "image-feature-extraction"
    assert read.data.license == "unknown"
    assert {"timm", "medical-imaging", "not-for-diagnosis"} <= set(read.data.tags)
    store = read_card(GOLDEN / "regions")
    for told in (
        "Not for diagnosis",
        f"`sha256:{read_card(ENCODER).artifact_id}`",
        f"`sha256:{store.artifact_id}`",
        f"corpus | `sha256:{store.identity.inputs[0].artifact_id}`",
        "images | 18, without labels",
        "**slope**: cone, nothing",
        "region, version 1, shares in thousandths: budget matched, hide_inside 800, inside 500, overall 600",
        "patches | 4 x 4",
        "spark, version 1: decoder_width 16",
        "epochs | 2, 6 steps of 6 images",
        "Mask What Matters (arXiv 2509.23054)",
        "Sparse and Hierarchical Masked Modeling (arXiv 2301.03580)",
        "state",
    ):
        assert told in read.content, told
    assert "research-use" not in read.content


def test_it_names_no_sample_and_no_place(tmp_path: Path, mwm) -> None:
    known = re.findall(r'"sample_id":"([^"]+)"', (GOLDEN / "regions" / "samples.jsonl").read_text())
    assert len(known) == 19
    for kind in ("encoder", "model"):
        assert mwm("export", GOLDEN / kind, "--to", "timm", "--out", tmp_path / kind)[0] == 0
        for path in (tmp_path / kind).iterdir():
            raw = path.read_bytes()
            assert not [name for name in (*known, str(tmp_path), str(GOLDEN.parent)) if name.encode() in raw]


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_the_code_in_it_runs(tmp_path: Path, mwm, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    assert mwm("export", ENCODER, "--to", to, "--out", tmp_path / 'my "best" one')[0] == 0
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / 'my "best" one' / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        assert len(block.splitlines()) == 3
        names: dict[str, object] = {}
        exec(block, names)
        assert "model" in names


def test_a_store_that_is_not_at_hand_is_said_and_can_be_given(tmp_path: Path, mwm) -> None:
    shutil.copytree(ENCODER, tmp_path / "encoder")
    code, _, err = mwm("export", tmp_path / "encoder", "--to", "timm", "--out", tmp_path / "x")
    assert code == 0
    assert "warning: its region store" in err
    assert "not at hand" in (tmp_path / "x" / "README.md").read_text()
    code, _, err = mwm(
        "export", tmp_path / "encoder", "--to", "timm", "--out", tmp_path / "y", "--regions", GOLDEN / "regions"
    )
    assert (code, err) == (0, "")
    assert "**bright**: disc" in (tmp_path / "y" / "README.md").read_text()


def test_another_store_is_not_taken_for_the_encoders(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "regions", tmp_path / "other")
    body = json.loads((tmp_path / "other" / "artifact.json").read_bytes())
    body["identity"]["spec"]["regions"][0]["texts"] = ["another"]
    body["artifact_id"] = hashlib.sha256(rfc8785.dumps(body["identity"])).hexdigest()
    del body["card_sha256"]
    body["card_sha256"] = hashlib.sha256(rfc8785.dumps(body)).hexdigest()
    (tmp_path / "other" / "artifact.json").write_bytes(rfc8785.dumps(body))
    with pytest.raises(UsageError, match="the encoder was made from e0fd765ffd57f266"):
        trace(ENCODER, read_card(ENCODER), tmp_path / "other")


def test_a_model_tells_its_scores_classes_and_encoder(tmp_path: Path) -> None:
    source = open_exportable(str(GOLDEN / "model"))
    text = model_card(source, trace(source.path, source.card), "timm", "x", [])
    for told in ("image-classification", "classes | large, small", "accuracy | 0.500", "10 train, 4 val, 4 test"):
        assert told in text, told
    assert f"encoder `sha256:{read_card(ENCODER).artifact_id}`" in text
    alone = model_card(source, Lineage(None, None, None, None), "timm", "x", [])
    assert "random weights, no encoder" in alone
    assert "arXiv" not in alone


def test_masks_of_the_packaged_weights_bring_their_terms(tmp_path: Path, mwm, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_exportable(str(ENCODER))
    lineage = trace(source.path, source.card)
    assert lineage.store is not None
    spec = lineage.store.identity.spec
    lite = edited(lineage.store, spec={**spec, "grounder": {**spec["grounder"], "name": "lite"}})
    with_lite = replace(lineage, store=lite)
    assert uses_lite(with_lite)
    assert not uses_lite(lineage)
    head = lite.identity.inputs[0].model_copy(update={"kind": "head"})
    assert not uses_lite(replace(lineage, store=edited(lite, inputs=(head,))))
    text = model_card(source, with_lite, "timm", "x", [])
    assert "license: other\nlicense_name: research-use-weights\nlicense_link: LICENSE.weights\n" in text
    assert "for research use only" in text
    monkeypatch.setattr("pipelines.lineage.trace", lambda *_: with_lite)
    assert mwm("export", ENCODER, "--to", "timm", "--out", tmp_path / "x")[0] == 0
    assert (tmp_path / "x" / "LICENSE.weights").read_bytes() == packaged_terms().read_bytes()


def test_words_of_a_user_are_no_markup(tmp_path: Path) -> None:
    source = open_exportable(str(ENCODER))
    lineage = trace(source.path, source.card)
    assert lineage.store is not None
    regions = [{"name": "a|b", "texts": ["<img src=x>\n# top"]}]
    odd = edited(lineage.store, spec={**lineage.store.identity.spec, "regions": regions})
    text = model_card(source, replace(lineage, store=odd), "timm", "x", [])
    assert r"- **a\|b**: \<img src=x\> \# top" in text
