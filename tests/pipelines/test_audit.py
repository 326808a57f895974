"""Verdicts and exit codes of an audit, where somebody rewrote the card as well; test_corruption.py damages bytes."""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import rfc8785

from pipelines.audit import AuditResult, Row, Verdict, audit
from shared.artifact import CARD, Card, file_sha256, read_card
from shared.errors import DiskFullError, IncompatibleError, InputMissingError, UsageError
from tests.pipelines.conftest import Chain

GOLDEN = Path(__file__).parents[1] / "compat" / "v0.1.0"


def reseal(artifact: Path, change: Callable[[dict[str, Any]], object] = lambda body: None, *, own_id: bool = False):
    """Rewrite a card so that its seal and every file's digest hold; with ``own_id``, its id too."""
    body = json.loads((artifact / CARD).read_bytes())
    for name in body["provenance"]["files"]:
        body["provenance"]["files"][name] = file_sha256(artifact / name)
    change(body)
    if own_id:
        body["artifact_id"] = hashlib.sha256(rfc8785.dumps(body["identity"])).hexdigest()
    del body["card_sha256"]
    body["card_sha256"] = hashlib.sha256(rfc8785.dumps(body)).hexdigest()
    (artifact / CARD).write_bytes(rfc8785.dumps(body))


def worst(result: AuditResult) -> list[tuple[str, str, str]]:
    return [(row.check, row.verdict, row.detail) for row in result.rows if row.verdict != "identical"]


RULES = {
    frozenset({"identical"}): 0,
    frozenset({"drift"}): 3,
    frozenset({"corrupt"}): 4,
    frozenset({"missing"}): 4,
    frozenset({"unrecomputable"}): 5,
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_four_wins_over_three_and_five_is_only_where_nothing_could_be_judged(size: int) -> None:
    verdicts: tuple[Verdict, ...] = ("identical", "drift", "missing", "corrupt", "unrecomputable")
    for chosen in itertools.combinations(verdicts, size):
        code = AuditResult(tuple(Row("a", "encoder", "files", 1, verdict) for verdict in chosen)).exit_code
        if {"corrupt", "missing"} & set(chosen):
            assert code == 4
        elif "drift" in chosen:
            assert code == 3
        else:
            assert code == RULES.get(frozenset(chosen), 0)


def test_a_sound_chain_is_identical_in_every_row(finished: Chain) -> None:
    result = audit(finished.out, level="all")
    assert result.exit_code == 0
    left_out = [row for row in result.rows if row.verdict != "identical"]
    assert [row.detail for row in left_out] == ["left out: needs the images (--images)"]
    checks = {(row.kind, row.check) for row in result.rows}
    assert {("region-store", "maps"), ("encoder", "masks"), ("model", "scores"), ("audit-report", "files")} <= checks
    assert all(row.checked for row in result.rows if row not in left_out)


def test_what_cannot_be_audited_is_refused(finished: Chain, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--level bits: unknown"):
        audit(finished.out, level="bits")
    with pytest.raises(InputMissingError):
        audit(tmp_path / "none")
    with pytest.raises(IncompatibleError, match="not published"):
        audit(tmp_path)


def test_an_unknown_version_is_counted_and_alone_exit_5(chain: Chain) -> None:
    reseal(chain.out / "encoder", lambda body: body["identity"].update(kind_version="2.0"))
    result = audit(chain.out)
    assert result.exit_code == 0
    assert [row.artifact for row in result.rows if row.verdict == "unrecomputable"] == ["encoder"]
    assert audit(chain.out / "encoder").exit_code == 5


def test_a_forged_metric_is_drift_and_named(chain: Chain) -> None:
    def better(body: dict[str, Any]) -> None:
        body["provenance"]["metrics"]["test"]["accuracy"]["value"] = 0.99

    reseal(chain.out / "scratch", better)
    result = audit(chain.out)
    assert result.exit_code == 3
    (row,) = [row for row in result.rows if row.verdict != "identical"]
    assert (row.artifact, row.check, row.verdict) == ("scratch", "scores", "drift")
    assert row.detail.startswith("test.accuracy.value: 0.99 on the card, 0.5 from the predictions")


@pytest.mark.parametrize("change", ["gone", "confusion", "start", "interval"])
def test_any_part_of_the_metrics_is_compared(change: str, chain: Chain) -> None:
    def forge(body: dict[str, Any]) -> None:
        metrics = body["provenance"]["metrics"]
        match change:
            case "gone":
                del metrics["test"]
            case "confusion":
                metrics["test"]["confusion"][0][0] += 1
            case "start":
                metrics["start"] = "encoder" if metrics["start"] == "scratch" else "scratch"
            case "interval":
                metrics["test"]["auroc"]["low"] = None

    reseal(chain.out / "scratch", forge)
    assert audit(chain.out / "scratch").exit_code == 3


def test_labels_forged_in_the_predictions_are_found(chain: Chain) -> None:
    """Ids and probabilities stay: only what they are scored against is changed, and the scores with it."""
    path = chain.out / "scratch" / "predictions.csv"
    lines = path.read_text().splitlines()
    cells = lines[1].split(",")
    cells[3] = "large" if cells[3] == "small" else "small"
    path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    reseal(chain.out / "scratch")
    result = audit(chain.out / "scratch")
    assert result.exit_code == 4
    assert "predictions.csv: other labels, groups or parts" in worst(result)[0][2]


def test_labels_forged_in_the_predictions_of_the_best_epoch_are_found(tmp_path: Path) -> None:
    """Their digest covers ids and probabilities: the truth is that of `predictions.csv`."""
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "model", model)
    path = model / "predictions_best_on_val.csv"
    lines = path.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    assert [row[3] for row in rows] != [row[4] for row in rows]
    path.write_text("\n".join([lines[0], *(",".join([*row[:3], row[4], *row[4:]]) for row in rows)]) + "\n")
    reseal(model)
    result = audit(model)
    assert result.exit_code == 4
    assert any("predictions_best_on_val.csv: other labels, groups or parts" in detail for _, _, detail in worst(result))


def test_a_predicted_class_that_is_not_the_most_probable_one(chain: Chain) -> None:
    path = chain.out / "scratch" / "predictions.csv"
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    cells[4] = "large" if cells[4] == "small" else "small"
    path.write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    reseal(chain.out / "scratch")
    assert "predictions.csv line 3" in worst(audit(chain.out / "scratch"))[0][2]


def test_a_corpus_forged_with_its_card(chain: Chain) -> None:
    corpus = chain.out / "regions" / "corpus"
    lines = (corpus / "samples.jsonl").read_bytes()
    (corpus / "samples.jsonl").write_bytes(lines.replace(b'"patient', b'"someone') if b"patient" in lines else b"")
    reseal(corpus)
    assert worst(audit(corpus)) == [("files", "corrupt", "samples.jsonl: other samples than the artifact's id")]


def test_a_store_with_the_corpus_of_another(chain: Chain) -> None:
    """A whole corpus, id and all, exchanged beside a store, and the store's card rewritten to list it."""
    regions = chain.out / "regions"
    reseal(regions / "corpus", lambda body: body["identity"]["outputs"].update(count=11), own_id=True)
    reseal(regions)
    result = audit(regions)
    assert result.exit_code == 4
    assert "another corpus than the one this store was made from" in worst(result)[0][2]


@pytest.mark.parametrize("change", ["source_sha256", "group", "a row less"])
def test_a_store_whose_rows_are_not_its_corpus(change: str, chain: Chain) -> None:
    """Images exchanged in the store's list alone, its card and id made to fit: the corpus says what they were."""
    regions = chain.out / "regions"
    lines = (regions / "samples.jsonl").read_bytes().splitlines(keepends=True)
    row = json.loads(lines[2])
    lines[2:3] = [] if change == "a row less" else [json.dumps({**row, change: "ab" * 32}).encode() + b"\n"]
    (regions / "samples.jsonl").write_bytes(b"".join(lines))
    sha256 = hashlib.sha256(b"".join(lines)).hexdigest()
    reseal(regions, lambda body: body["identity"]["outputs"].update(samples_sha256=sha256), own_id=True)
    result = audit(regions)
    assert result.exit_code == 4
    told = {
        "source_sha256": f"row 2 ({row['sample_id']}): its source_sha256 is not that of its corpus",
        "group": f"row 2 ({row['sample_id']}): its group is not that of its corpus",
        "a row less": "its sample_id is not that of its corpus",
    }
    assert told[change] in " ".join(detail for check, _, detail in worst(result) if check == "files")


@pytest.mark.parametrize(
    ("artifact", "name"),
    [("encoder", "encoder/model.safetensors"), ("encoder", "witnesses.json"), ("scratch", "predictions.csv"),
     ("scratch", "model/model.safetensors"), ("regions", "samples.jsonl"), ("regions", "quarantine.jsonl")],
)  # fmt: skip
@pytest.mark.parametrize("how", ["unlisted and gone", "nonsense", "deep"])
def test_a_file_that_must_be_there_whatever_the_card_lists(artifact: str, name: str, how: str, chain: Chain) -> None:
    folder = chain.out / artifact
    if how == "unlisted and gone":
        body = json.loads((folder / CARD).read_bytes())
        reseal(folder, lambda body: body["provenance"]["files"].pop(name))
        (folder / name).unlink()
        assert name in body["provenance"]["files"]
    else:
        (folder / name).write_bytes(b"nonsense" if how == "nonsense" else b'{"a":' * 100_000)
        reseal(folder)
    result = audit(folder)
    assert result.exit_code == 4
    assert Path(name).name in " ".join(detail for _, _, detail in worst(result))


@pytest.mark.parametrize("artifact", ["regions", "regions/corpus", "encoder", "scratch"])
def test_outputs_that_do_not_say_what_they_must(artifact: str, chain: Chain) -> None:
    reseal(chain.out / artifact, lambda body: body["identity"].update(outputs={}), own_id=True)
    result = audit(chain.out / artifact)
    assert result.exit_code == 4
    assert CARD in worst(result)[0][2]


def test_an_artifact_in_a_folder_called_run_is_audited(chain: Chain, tmp_path: Path) -> None:
    for name in ("run", "deep/run/more"):
        store = Path(shutil.copytree(chain.out / "regions", tmp_path / name / "regions"))
        assert {row.artifact for row in audit(tmp_path).rows} >= {f"{name}/regions"}
        (store / "resolved.yaml").write_text("x")
        assert audit(tmp_path).exit_code == 4
        shutil.rmtree(tmp_path / name)
    shutil.copytree(chain.out / "encoder", chain.out / "regions/run/state/kept")  # what a run keeps is not audited
    assert not [row for row in audit(chain.out).rows if "kept" in row.artifact]


def test_masks_are_drawn_from_the_store_beside_an_encoder(chain: Chain) -> None:
    result = audit(chain.out / "encoder", level="masks")
    assert result.exit_code == 0
    assert [(row.artifact, row.check) for row in result.rows if row.verdict == "identical"] == [
        ("encoder", "files"), ("regions", "files"), ("regions", "maps"), ("encoder", "masks"),
    ]  # fmt: skip
    (chain.out / "regions" / "report.html").write_text("x")  # damaged, it proves nothing
    assert audit(chain.out / "encoder", level="masks").exit_code == 4
    (chain.out / "regions" / CARD).write_text("{")
    alone = audit(chain.out / "encoder", level="masks")
    assert [row.verdict for row in alone.rows] == ["identical", "unrecomputable"]


def test_masks_from_a_damaged_store_elsewhere_prove_nothing(chain: Chain, tmp_path: Path) -> None:
    regions = Path(shutil.move(chain.out / "regions", tmp_path / "regions"))
    encoder = chain.out / "encoder"
    assert audit(encoder, level="masks").exit_code == 0  # unrecomputable without its store, and counted
    sound = audit(encoder, level="masks", regions=regions)
    assert sound.exit_code == 0
    assert {row.artifact for row in sound.rows} == {"encoder", "regions"}
    shard = regions / "regions.zarr/maps/c.0.0.0.0"
    other = regions / "regions.zarr/maps/c.1.0.0.0"
    first, second = shard.read_bytes(), other.read_bytes()
    shard.write_bytes(second)  # both whole, each with right checksums
    other.write_bytes(first)
    assert audit(encoder, level="masks", regions=regions).exit_code == 4


def test_damage_of_what_is_no_artifact_stops_no_audit(chain: Chain) -> None:
    for text in (b"", b"[1]", b"{" * 100_000):
        (chain.out / "encoder" / "run" / "spec.json").write_bytes(text)
        assert audit(chain.out).exit_code == 0
    (chain.out / "encoder" / CARD).unlink()
    assert audit(chain.out).exit_code == 4


def test_an_audit_can_be_published_and_audited(chain: Chain, tmp_path: Path) -> None:
    first = audit(chain.out, out=chain.out / "mine")
    card = read_card(chain.out / "mine", "audit-report")
    assert card.identity.outputs["exit_code"] == first.exit_code == 0
    audit(chain.out, out=chain.out / "mine")  # the same again: its own report is not part of what it looks at
    assert read_card(chain.out / "mine") == card
    page = chain.out / "mine" / "report.html"
    page.write_text(page.read_text().replace("identical", "IDENTICAL"))
    result = audit(chain.out)
    assert result.exit_code == 4
    assert [row.artifact for row in result.rows if row.verdict == "corrupt"] == ["mine"]


def test_a_disk_that_is_full_leaves_no_half_report_of_an_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if "report.html" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError):
        audit(GOLDEN / "model", out=tmp_path / "audit")
    assert not list((tmp_path / "audit").glob("*report.html*"))


def test_published_cards_fit_the_schema_of_the_models(finished: Chain) -> None:
    schema = Card.model_json_schema(mode="serialization")
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    cards = [json.loads(path.read_bytes()) for path in finished.out.rglob(CARD)]
    assert {card["identity"]["kind"] for card in cards} == {
        "corpus", "region-store", "encoder", "model", "audit-report"
    }  # fmt: skip
    for card in cards:
        validator.validate(card)
        for path in (("identity",), ("provenance",), ()):
            broken = json.loads(json.dumps(card))
            place = broken
            for key in path:
                place = place[key]
            place["unknown"] = 1
            assert not validator.is_valid(broken), path
            del place["unknown"]
            place.pop(max(place))
            assert not validator.is_valid(broken), path
