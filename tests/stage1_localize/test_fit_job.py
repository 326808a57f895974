"""`fit_grounder` from labels to a head that `localize` uses: published, continued, done, refused.

One run with the real encoder and two steps a fit; the others embed by a sum of pixels, since only their way counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.audit import audit
from pipelines.audit_maps import Again
from shared.artifact import Artifact, read_card, verify
from shared.config import digest, load
from shared.corpus import open_corpus
from shared.errors import (
    CorruptError,
    IncompatibleError,
    InterruptedRun,
    LockedError,
    PromptError,
    QuarantineError,
    SpecMismatchError,
    UsageError,
)
from shared.lease import Lease
from shared.merkle import tensor_digest
from stage1_localize import fit_job, pictures
from stage1_localize.choose import Tries
from stage1_localize.config import LocalizeConfig
from stage1_localize.fit_config import FitGrounderConfig
from stage1_localize.fit_job import fit_grounder
from stage1_localize.fit_tasks import read_fit
from stage1_localize.grounders import GROUNDERS, lite
from stage1_localize.grounders.lite_card import FOLDS, HELD_OUT, RULES, WEIGHTS, open_folds, open_head
from stage1_localize.grounders.lite_head import LiteHead
from stage1_localize.job import localize
from stage1_localize.parts import for_workers, parts_of_this_process, resolve
from stage1_localize.segmenters.lite_medsam import Encoded, letterbox
from tests.pipelines.test_audit import reseal
from tests.pipelines.test_corruption import sweep
from tests.stage1_localize.coco_files import write_corpus

SETTINGS: dict[str, Any] = {"regions": {"square": ["bright square", "quad"]}, "steps": 2, "folds": 2, "workers": 0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def cells_of(image: np.ndarray) -> Encoded:
    pixels, height_px, width_px = letterbox(image)
    cells = pixels[:1].unflatten(1, (64, 4)).unflatten(3, (64, 4)).mean(dim=(2, 4))
    return Encoded(cells.expand(256, -1, -1) * 0.1, height_px, width_px, *image.shape[1:])


def weights_of(state: Mapping[str, torch.Tensor]) -> str:
    return tensor_digest({name: tensor.numpy() for name, tensor in state.items()})


def run(folder: Path, out: str = "head", **changes: Any) -> Artifact:
    return fit_grounder(
        load(FitGrounderConfig, SETTINGS | changes),
        images=folder / "images",
        labels=folder / "coco.json",
        out=folder / out,
        command="mwm fit-grounder",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder)
    threads = torch.get_num_threads()
    artifact = run(folder)
    torch.set_num_threads(threads)
    return artifact


@pytest.fixture
def copied(made: Artifact, tmp_path: Path) -> Path:
    shutil.copytree(made.path, tmp_path / "head")
    return tmp_path / "head"


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """An encoder that costs nothing; the images that it was asked for."""
    asked: list[bytes] = []

    def encode_image(model: object, image: np.ndarray) -> Encoded:
        asked.append(image.tobytes())
        return cells_of(image)

    monkeypatch.setattr(pictures, "encode_image", encode_image)
    monkeypatch.setattr(pictures, "load_model", lambda: None)
    write_corpus(tmp_path)
    return asked


@pytest.mark.slow
def test_a_head_is_published_with_everything_that_belongs_to_it(made: Artifact) -> None:
    card = read_card(made.path, "head")
    assert card == made.card
    assert not verify(made.path, card)
    published = set(card.provenance.files)
    assert {"report.html", "resolved.yaml", "quarantine.jsonl", WEIGHTS, RULES, "corpus/artifact.json"} <= published
    assert open_corpus(made.path / "corpus")[0].artifact_id == card.identity.inputs[0].artifact_id
    assert card.identity.outputs["images"] == 6
    assert card.identity.spec["regions"] == [{"name": "square", "texts": ["bright square", "quad"], "outlined": True}]
    assert "." not in json.dumps(card.identity.spec["numeric"])
    assert card.provenance.metrics["square"]["images"] == 5
    assert not (made.path / "run" / "embeddings").exists()
    assert [row.verdict for row in audit(made.path).rows] == ["identical", "identical"]


@pytest.mark.slow
def test_the_head_s_card_says_what_it_knows_and_the_report_shows_every_image(made: Artifact) -> None:
    head = open_head(str(made.path))
    assert head.card.concepts["square"].wordings == ("bright square", "quad")
    assert "knows square and nothing else" in head.card.not_for_diagnosis
    assert "taken to hold none of it" in head.card.not_for_diagnosis
    assert head.card.scores["square"]["groups"] == 5
    weights = {name: tensor.numpy() for name, tensor in head.network.state_dict().items()}
    assert tensor_digest(weights) == made.card.identity.outputs["weights"]
    page = (made.path / "report.html").read_text(encoding="utf-8")
    assert all(f"{number}.png" in page for number in range(6))
    assert "square, labelled" in page
    assert "square, answered" in page
    assert "Not for diagnosis" in page


@pytest.mark.slow
def test_the_same_command_is_done_and_another_is_refused(made: Artifact) -> None:
    folder = made.path.parent
    assert run(folder).card == made.card
    with pytest.raises(SpecMismatchError, match="turns"):
        run(folder, turns=True)


@pytest.mark.slow
def test_lite_answers_with_the_head_and_the_store_says_so(made: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made.path.parent
    part = {"name": "lite", "options": {"head": str(made.path)}}
    config = load(LocalizeConfig, {"regions": {"it": "Quad"}, "grounder": part, "workers": 0, "micro_batch": 1})
    (folder / "one").mkdir()
    shutil.copy(folder / "images" / "0.png", folder / "one" / "0.png")
    store = localize(config, images=folder / "one", out=folder / "store")
    inputs = {item.role: (item.kind, item.artifact_id) for item in store.card.identity.inputs}
    assert inputs["head"] == ("head", made.card.artifact_id)
    identity = store.card.identity.spec["grounder"]["identity"]
    assert identity["head_sha256"] == hashlib.sha256((made.path / WEIGHTS).read_bytes()).hexdigest()
    assert str(folder) not in json.dumps(store.card.identity.spec)
    resolved = (store.path / "resolved.yaml").read_text()
    assert f"<path>/head@sha256:{made.card.artifact_id}" in resolved
    assert str(folder) not in resolved


@pytest.mark.slow
def test_cross_fitted_each_image_is_answered_by_the_head_that_never_saw_it(
    cheap: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, learnt = fit_job.fit, {}

    def fitted(task: Any) -> str:
        real(task)
        found = read_fit(task)
        assert found is not None
        learnt[weights_of(found[0])] = {item.source.sample_id for item in task.train}
        return str(task.name)

    chosen_on: list[set[int]] = []
    choose = fit_job.choose

    def chosen(tries: Tries) -> int:
        chosen_on.append({row[0].fold for row in tries})
        return choose(tries)

    monkeypatch.setattr(fit_job, "fit", fitted)
    monkeypatch.setattr(fit_job, "choose", chosen)
    made = run(tmp_path)
    monkeypatch.undo()
    assert sorted(map(len, learnt.values())) == [3, 3, 6]
    assert chosen_on == [{0, 1}, {1}, {0}]
    asked: list[str] = []
    look = LiteHead.look

    def looked(self: LiteHead, *given: torch.Tensor) -> Any:
        asked.append(weights_of(self.state_dict()))
        return look(self, *given)

    monkeypatch.setattr(LiteHead, "look", looked)
    monkeypatch.setattr(lite, "encode", lambda batch, model: [cells_of(image) for image in batch.images])
    monkeypatch.setattr(lite, "load_model", lambda engine: None)
    part = {"name": "lite", "options": {"head": str(made.path), "cross_fitted": True}}
    recipe = {"regions": {"it": "Quad"}, "grounder": part, "segmenter": "boxfill", "workers": 0, "micro_batch": 1}
    config = load(LocalizeConfig, recipe)
    store = localize(config, images=tmp_path / "images", out=tmp_path / "store")
    assert len(asked) == 6
    assert all(name not in learnt[weights] for name, weights in zip(store.sample_ids, asked, strict=True))
    identity = store.card.identity.spec["grounder"]["identity"]
    assert identity["cross_fitted"] == digest(made.card.identity.outputs["folds"])
    again = Again(tmp_path / "images", "n", None, (f"grounder.options.head={made.path}",))
    assert audit(store.path, level="maps", again=again).exit_code == 0
    alone = sorted(asked[:6])
    asked.clear()
    together = localize(
        config.model_copy(update={"micro_batch": 4}), images=tmp_path / "images", out=tmp_path / "together"
    )
    assert sorted(asked) == alone
    assert [together.maps([row]).tolist() for row in range(6)] == [store.maps([row]).tolist() for row in range(6)]
    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "0.png")
    with pytest.raises(UsageError, match=r"0.* is no image that the head was fitted on, but another one of that name$"):
        localize(config, images=tmp_path / "images", out=tmp_path / "other")
    (tmp_path / "images" / "0.png").rename(tmp_path / "images" / "new.png")
    with pytest.raises(UsageError, match=r"new.* is no image that the head was fitted on$"):
        localize(config, images=tmp_path / "images", out=tmp_path / "third")


@pytest.mark.slow
def test_words_of_the_packaged_head_are_refused_with_the_known_ones(made: Artifact) -> None:
    part = {"name": "lite", "options": {"head": str(made.path)}}
    config = load(LocalizeConfig, {"regions": {"it": "brain tumour"}, "grounder": part})
    with pytest.raises(PromptError, match="'brain tumour' is not in this head's vocabulary") as caught:
        parts_of_this_process(config.grounder, config.segmenter, config.asked(), "")
    assert "it knows square" in (caught.value.hint or "")


@pytest.mark.slow
def test_a_worker_in_another_folder_finds_the_pinned_head(
    made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.path.parent)
    config = resolve(
        load(LocalizeConfig, {"regions": {"it": "quad"}, "grounder": {"name": "lite", "options": {"head": "head"}}})
    )
    assert config.grounder.options["head"] == f"head@sha256:{made.card.artifact_id}"
    sent = for_workers(config.grounder, GROUNDERS)
    monkeypatch.chdir(tmp_path)
    opened = open_head(sent.options["head"])
    assert opened.origin is not None
    assert opened.origin.artifact_id == made.card.artifact_id


@pytest.mark.slow
def test_a_head_that_is_not_what_was_published_is_never_used(copied: Path, made: Artifact) -> None:
    with pytest.raises(IncompatibleError, match="pinned"):
        open_head(f"{copied}@sha256:{'0' * 64}")
    with pytest.raises(IncompatibleError, match="expected kind 'head'"):
        open_head(str(copied / "corpus"))
    for name in (WEIGHTS, RULES):
        kept = (copied / name).read_bytes()
        flipped = bytearray(kept)
        flipped[len(flipped) // 2] ^= 1
        (copied / name).write_bytes(flipped)
        with pytest.raises(CorruptError, match=Path(name).name):
            open_head(str(copied))
        assert audit(copied).exit_code == 4
        (copied / name).write_bytes(kept)
    (copied / "artifact.json").unlink()
    with pytest.raises(IncompatibleError, match="not published"):
        open_head(str(copied))


@pytest.mark.slow
def test_heads_of_folds_are_what_the_id_says(copied: Path, made: Artifact) -> None:
    """Forged together with the card, whose id stays."""
    table = json.loads((copied / HELD_OUT).read_text())
    first, second = (next(name for name, (fold, _) in table.items() if fold == number) for number in (0, 1))
    forged = {**table, first: [1, table[first][1]], second: [0, table[second][1]]}
    weights = (copied / FOLDS / "1" / WEIGHTS).read_bytes()
    for file, data, message in (
        (HELD_OUT, json.dumps(forged).encode(), "other folds than"),
        (HELD_OUT, b"[]", "cannot be read"),
        (f"{FOLDS}/0/{WEIGHTS}", weights, "other weights than"),
    ):
        kept = (copied / file).read_bytes()
        (copied / file).write_bytes(data)
        reseal(copied)
        assert read_card(copied, "head").artifact_id == made.card.artifact_id
        assert audit(copied).exit_code == 4
        with pytest.raises(CorruptError, match=message):
            open_folds(str(copied))
        (copied / file).write_bytes(kept)
    for folds in ({}, {"heads": {}, "held_out": ""}, "abc", {"heads": {"0": 3, "1": "x"}, "held_out": 1}):
        reseal(copied, lambda body, told=folds: body["identity"]["outputs"].update(folds=told), own_id=True)
        assert audit(copied).exit_code == 4
        with pytest.raises((CorruptError, IncompatibleError)):
            open_folds(str(copied))
    reseal(copied, lambda body: body["identity"]["outputs"].pop("folds"), own_id=True)
    with pytest.raises(IncompatibleError, match="keeps no heads of folds"):
        open_folds(str(copied))


@pytest.mark.slow
def test_any_damage_of_any_file_is_found_and_named(copied: Path) -> None:
    counts = sweep(copied)
    assert counts["lines swapped"] >= 1


@pytest.mark.slow
def test_a_stopped_run_continues_where_it_was_and_ends_the_same(
    cheap: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fitted = fit_job.fit, []

    def interrupted(task: Any) -> str:
        fitted.append(task.name)
        if task.name == "fold-1":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(task)

    monkeypatch.setattr(fit_job, "fit", interrupted)
    with pytest.raises(InterruptedRun, match="SIGTERM; 6 embeddings and every finished fit are kept"):
        run(tmp_path)
    assert len(cheap) == 6
    assert not (tmp_path / "head" / "artifact.json").exists()
    monkeypatch.setattr(fit_job, "fit", lambda task: fitted.append(f"again {task.name}") or real(task))
    continued = run(tmp_path)
    assert len(cheap) == 6, "no image is embedded twice"
    assert fitted == ["fold-0", "fold-1", "again fold-1", "again all"]
    whole = run(tmp_path, out="whole")
    assert continued.card.artifact_id == whole.card.artifact_id
    shutil.rmtree(tmp_path / "whole")


@pytest.mark.slow
def test_too_many_damaged_images_end_the_run_and_a_few_are_counted(cheap: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(QuarantineError, match="1 of 6 images failed, max_failures allows 0"):
        run(tmp_path)
    made = run(tmp_path, max_failures=1)
    assert made.card.identity.outputs["quarantined"] == 1
    (line,) = (made.path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "decode_failed"


def test_two_writers_are_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    with Lease(tmp_path / "head"), pytest.raises(LockedError):
        run(tmp_path)
