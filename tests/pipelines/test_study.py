"""A study from the command line to its page: folds that keep groups whole, runs that continue, nothing hidden."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import rfc8785
import yaml

from pipelines.audit import audit
from pipelines.study import Children, RunFailedError, Step, _grown, _run_all, _stores, study_spec
from pipelines.study_check import store_differences
from pipelines.study_config import StudyConfig
from pipelines.study_forecast import rehearse_study
from pipelines.study_plan import plan, read_corpus
from pipelines.study_report import study_page
from pipelines.study_stats import Compared
from pipelines.study_summary import Summary, Table, config_told, recompute, told_spec
from shared.artifact import Input, publish, read_card
from shared.errors import ConfigError, CorruptError, IncompatibleError, InterruptedRun, SpecMismatchError
from stage3_finetune.predictions import ClassPredictions
from tests.pipelines import forging
from tests.pipelines.studies import GROUPS, RECIPE, config, disc_outlines, write_discs
from tests.pipelines.test_audit import reseal

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("study") / "data")


def recipe(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def command(recipe: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pipelines", "run", str(recipe), "--images", str(data), "--out", str(out), *more]


@pytest.mark.slow
def test_a_study_is_stopped_continued_published_and_audited(data: Path, tmp_path: Path, mwm) -> None:
    out, environment = tmp_path / "out", {**os.environ, "OMP_NUM_THREADS": "1"}
    discs = {**RECIPE["corpora"]["discs"], "endpoints": {"full": {}}}
    corpora = {"discs": discs}
    told = command(recipe(tmp_path, corpora=corpora), data, out)
    first = subprocess.Popen(told, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    begun = out / "discs/round-0/fold-0"
    while not (done := list(begun.glob("*/full/artifact.json"))) and first.poll() is None:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate()
    assert first.returncode == 75, said
    assert done
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("artifact.json")}
    again = subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "pretraining helps: " in again.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if "/study/" not in str(path))

    card = read_card(out / "study", "study")
    assert (card.identity.outputs["runs"], card.identity.outputs["of"]) == (4, 4)
    models = [item for item in card.identity.inputs if item.kind == "model"]
    assert len(models) == 2 * 2
    body = json.loads((out / "study/study.json").read_text())
    assert body["open"] == []
    tables = {table["endpoint"]: table for table in body["tables"]}
    assert tables["full"]["arms"] == ["scratch", "uniform"]
    assert tables["full"]["scores"]["accuracy"]["images"] == 2 * GROUPS

    # The number on the page is that of the predictions, each image once.
    rows = [
        ClassPredictions.load(out / f"discs/round-0/fold-{fold}/uniform/full/predictions.csv").part("test")
        for fold in (0, 1)
    ]
    joined = ClassPredictions.join(rows)
    assert sorted(row.sample_id for row in joined.examples) == sorted(path.name for path in (data / "images").iterdir())
    accuracy = float((joined.probability.argmax(1) == joined.label).mean())
    assert tables["full"]["scores"]["accuracy"]["scores"]["uniform"][0] == pytest.approx(accuracy)

    # Pretraining saw the training groups alone.
    for fold in (0, 1):
        with (out / f"discs/round-0/fold-{fold}/labels.csv").open() as file:
            parts = {row["sample_id"]: row["split"] for row in csv.DictReader(file)}
        encoder = read_card(out / f"discs/round-0/fold-{fold}/uniform/encoder", "encoder")
        assert encoder.identity.outputs["samples"] == sum(part == "train" for part in parts.values())

    report = (out / "study/report.html").read_text()
    assert "Not for diagnosis" in report
    assert "would not be told from none" in report
    code, audited, _ = mwm("audit", out, "--level", "masks")
    assert code == 0, audited
    assert "study" in audited
    assert_a_forged_study_drifts(out)

    other = recipe(tmp_path, corpora=corpora, finetune={**RECIPE["finetune"], "lr": 0.01})
    code, _, refused = mwm("run", other, "--images", data, "--out", out)
    assert code == 2
    assert "scratch: not of this study: full: lr: '0.0003' there, '0.01' asked" in refused
    asked = {**RECIPE, "corpora": corpora}
    forging.assert_a_run_of_other_settings_is_found(out, asked)
    forging.assert_encoders_are_compared_with_each_other(out, asked)
    forging.assert_what_a_stage_decides_is_its_right(out, asked)
    more = {**RECIPE["arms"], "again": {}}  # from scratch: the cheapest
    wider = command(recipe(tmp_path, corpora=corpora, arms=more), data, out)
    subprocess.run(wider, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert read_card(out / "study", "study").identity.outputs["runs"] == 6
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if "/study/" not in str(path))


def assert_a_forged_study_drifts(out: Path) -> None:
    """Numbers and sentences, resealed: only the runs' predictions can tell."""
    folder = out / "study"
    kept = {path: path.read_bytes() for path in (folder / "study.json", folder / "artifact.json")}
    assert recompute(folder, read_card(folder)) == []
    told = json.loads(kept[folder / "study.json"])
    told["tables"][0]["scores"]["accuracy"]["scores"]["uniform"][0] += 0.05
    (folder / "study.json").write_text(json.dumps(told))
    reseal(folder)
    assert [(row.check, row.verdict) for row in audit(folder).rows if row.verdict != "identical"] == [
        ("scores", "drift")
    ]
    for path, data in kept.items():
        path.write_bytes(data)
    reseal(folder, lambda body: body["provenance"]["metrics"].update(claims={"pretraining helps": "holds: +9 points"}))
    assert recompute(folder, read_card(folder)) == ["claims on the card: not what its runs say"]
    sealed = kept[folder / "artifact.json"] = (folder / "artifact.json").read_bytes()
    reseal(folder, lambda body: body["identity"]["spec"]["config"]["finetune"].update(lr="0.01"), own_id=True)
    trained = "not of this study: discs/round-0/fold-0/scratch: full: lr: '0.0003' there, '0.01' asked"
    assert trained in recompute(folder, read_card(folder))
    nothing = {"pretrain": {"nothing": 1}}
    reseal(folder, lambda body: body["identity"]["spec"]["config"]["arms"]["uniform"].update(nothing), own_id=True)
    with pytest.raises(CorruptError, match="settings of the study"):
        recompute(folder, read_card(folder))
    (folder / "artifact.json").write_bytes(sealed)
    moved = out / "aside"
    (out / "discs").rename(moved)
    with pytest.raises(IncompatibleError, match="runs are not beside it"):
        recompute(folder, read_card(folder))
    moved.rename(out / "discs")


def test_a_set_that_taught_the_grounder_is_told_and_which_arms_it_did_not_teach() -> None:
    outlined = {**RECIPE["corpora"]["discs"], "outlines": "outlines.json", "supervised": True}
    arms = {**RECIPE["arms"], "unseen": {"pretrain": {}, "store": "cross-fitted"}}
    scores = {"accuracy": Compared(dict.fromkeys(("scratch", "uniform", "unseen", "again"), (0.5, 0, 1)), (), 9, 9)}

    def page(**changes: object) -> str:
        study = config(**changes)
        return study_page(study, Summary((Table("discs", "full", tuple(study.arms), 1, 2, scores),), (), 0, 0, (), {}))

    assert "supervised here" not in page()
    assert "by heads fitted on outlines" not in page(corpora={"discs": outlined})
    assert "supervised here. Regions of unseen: by heads fitted on outlines" in page(
        corpora={"discs": outlined}, arms=arms
    )
    both = {**arms, "again": arms["unseen"], "uniform": {**arms["uniform"], "store": "cross-fitted"}}
    told = page(corpora={"discs": outlined}, arms=both)
    assert "Regions of uniform, unseen, again: by heads" in told
    assert "supervised here" not in told
    taught = {"discs": {**outlined, "supervised": False}}
    assert "Regions of unseen: by heads fitted on outlines" in page(corpora=taught, arms=arms)


def test_labels_needed_are_drawn_where_endpoints_differ_in_their_share_alone() -> None:
    endpoints = {
        "tenth": {"finetune": {"fraction_milli": 100}},
        "full": {},
        "probe": {"finetune": {"freeze": True}, "scratch": False},
    }
    study = config(corpora={"discs": {**RECIPE["corpora"]["discs"], "endpoints": endpoints}})
    tables = [
        Table(
            "discs",
            name,
            ("scratch", "uniform"),
            1,
            2,
            {"accuracy": Compared({"scratch": (low, 0, 1), "uniform": (high, 0, 1)}, (), 9, 9)},
        )
        for name, low, high in (("full", 0.8, 0.9), ("tenth", 0.4, 0.6), ("probe", 0.5, 0.5))
    ]
    page = study_page(study, Summary(tuple(tables), (), 0, 0, (), {}))
    assert "discs, tenth, full: labels needed" in page
    assert "probe: labels needed" not in page
    assert "labels needed" not in study_page(study, Summary(tuple(tables[1:]), (), 0, 0, (), {}))


def test_a_folder_may_grow_and_its_folds_and_stores_may_not(data: Path, tmp_path: Path) -> None:
    discs = RECIPE["corpora"]["discs"]
    more = {"discs": discs, "again": discs}
    found = {name: read_corpus(config(corpora=more), name, data) for name in more}

    def begin(study: StudyConfig) -> None:
        grown = _grown(tmp_path, study_spec(study, {name: found[name] for name in study.corpora}))
        (tmp_path / "run/study.json").write_bytes(rfc8785.dumps(grown))

    begin(config(corpora={"discs": {**discs, "regions": {"disc": "a typo"}}}))
    begin(config())  # nothing was made of it
    (tmp_path / "discs/regions").mkdir(parents=True)
    (tmp_path / "discs/regions/artifact.json").touch()
    begin(config(corpora=more))
    made = tmp_path / "again/round-0/fold-0/scratch/full"
    made.mkdir(parents=True)
    (made / "artifact.json").touch()
    for study in (config(claims=[], resamples=500, jobs=1, rounds=2), config(corpora=more), config()):
        begin(study)
    words = {"discs": {**discs, "regions": {"disc": "another word"}}}
    for study, said in (
        (config(seed=3), r"spec\.folds\.seed \(0 there, 3 asked\)"),
        (config(corpora=words), r"spec\.corpora\.discs\.localize\.regions"),
        (config(corpora={**more, "again": words["discs"]}), r"spec\.corpora\.again\.localize"),
    ):
        with pytest.raises(SpecMismatchError, match=said):
            begin(study)
    own = found["discs"]
    for corpus, said in (
        (replace(own, outlines_sha256="0" * 64), r"spec\.corpora\.discs\.outlines"),
        (replace(own, examples=own.examples[1:]), r"spec\.corpora\.discs\.labels"),
    ):
        with pytest.raises(SpecMismatchError, match=said):
            _grown(tmp_path, study_spec(config(), {"discs": corpus}))
    given = config(corpora={"discs": {**discs, "store": "elsewhere"}})
    assert study_spec(given, {"discs": own})["corpora"]["discs"]["localize"] is None


def test_a_card_keeps_the_order_of_arms_and_endpoints() -> None:
    """Its keys are sorted, and the first arm is what the others are compared with."""
    uniform, scratch = RECIPE["arms"]["uniform"], RECIPE["arms"]["scratch"]
    for arms in ({"uniform": uniform, "scratch": scratch}, {"scratch": scratch, "uniform": uniform}):
        study = config(arms=arms)
        told = config_told(json.loads(rfc8785.dumps(told_spec(study))))
        assert told_spec(told) == told_spec(study)
        assert list(told.arms) == list(arms)
        assert told.compared("discs", "full") == study.compared("discs", "full")
        assert list(told.corpora["discs"].endpoints) == ["full", "probe"]


def test_a_command_stopped_before_it_answers_signals_is_interrupted() -> None:
    for stop, error in ((Children.stop, InterruptedRun), (kill_each, RunFailedError)):
        children = Children()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(children.run, ["doctor"])
            while not children.running:
                time.sleep(0.001)
            stop(children)
            with pytest.raises(error):
                running.result()


def kill_each(children: Children) -> None:
    for child in list(children.running):
        child.terminate()


def test_one_corpus_after_another_is_run(tmp_path: Path) -> None:
    """Groups of runs through one set of children, the first of them done: only a failure tells others to stop."""
    ran: list[str] = []

    class Recorded(Children):
        def run(self, arguments: Sequence[str]) -> None:
            if arguments[0] == "fails":
                raise RunFailedError("it failed")
            ran.append(arguments[0])

    children, runs, folds = Recorded(), plan(config())[:2], []
    done = tmp_path / "done"
    done.mkdir()
    (done / "artifact.json").touch()
    _run_all({runs[0]: [Step(done, ("done",))]}, children, 1, lambda: folds.append(0))
    for number, run in enumerate(runs):
        _run_all({run: [Step(tmp_path / "never", (str(number),))]}, children, 1, lambda: folds.append(1))
        assert not children.stopping.is_set()
    assert (ran, folds) == (["0", "1"], [1, 1])
    with pytest.raises(RunFailedError, match="it failed"):
        _run_all({runs[0]: [Step(tmp_path / "never", ("fails",))]}, children, 1, lambda: None)
    assert children.stopping.is_set()


def test_regions_of_heads_that_never_saw_an_image_are_made_by_two_commands(tmp_path: Path) -> None:
    arms = {**RECIPE["arms"], "unseen": {"pretrain": {}, "store": "cross-fitted"}}
    outlined = {"discs": {**RECIPE["corpora"]["discs"], "outlines": "outlines.json"}}
    data = write_discs(tmp_path / "data")
    (data / "outlines.json").write_text(json.dumps(disc_outlines(data)))
    study = config(arms=arms, corpora=outlined, localize={**RECIPE["localize"]})
    corpus = read_corpus(study, "discs", data)
    found, steps = _stores(study, corpus, data, tmp_path / "out")
    folder = tmp_path / "out" / "discs"
    assert found == {"localized": str(folder / "regions"), "cross-fitted": str(folder / "cross-fitted")}
    assert [step.arguments[0] for step in steps] == ["localize", "fit-grounder", "localize"]
    assert steps[1].arguments[1:] == (
        "--images", str(data / "discs.csv"), "--labels", str(data / "outlines.json"), "--out", str(folder / "head"),
    )  # fmt: skip
    asked = yaml.safe_load(Path(steps[2].arguments[1]).read_text())["localize"]
    assert asked["grounder"] == {"name": "lite", "options": {"head": str(folder / "head"), "cross_fitted": True}}
    assert asked["segmenter"]["name"] == "boxfill"
    for changes, message in (
        ({"images": json.loads((data / "outlines.json").read_text())["images"][1:]}, "1 images of discs.csv are not"),
        ({"categories": [{"id": 1, "name": "ring"}]}, "'disc' is no category of these outlines"),
    ):
        body = disc_outlines(data) | changes
        body["annotations"] = [one for one in body["annotations"] if one["image_id"]]
        (data / "outlines.json").write_text(json.dumps(body))
        with pytest.raises(ConfigError, match=message):
            read_corpus(study, "discs", data)
    (data / "outlines.json").write_text(json.dumps(disc_outlines(data)))
    (told,) = rehearse_study(study, out=tmp_path / "out", images=data).values()
    assert "1 x fit-grounder of" in told.how["time"]
    assert "1 x localize, cross-fitted of" in told.how["time"]
    assert "1 x localize of" in told.how["time"]
    alone = {"scratch": {}, "unseen": arms["unseen"]}
    study = config(arms=alone, claims=[], corpora=outlined)
    (told,) = rehearse_study(study, out=tmp_path, images=data).values()
    assert "1 x localize, cross-fitted of" in told.how["time"]
    assert "1 x localize of" not in told.how["time"]


def test_a_store_that_is_called_cross_fitted_is_looked_at(tmp_path: Path) -> None:
    arms = {**RECIPE["arms"], "unseen": {"pretrain": {}, "store": "cross-fitted"}}
    study = config(arms=arms, corpora={"discs": {**RECIPE["corpora"]["discs"], "outlines": "outlines.json"}})

    def said(head: str | None, identity: dict[str, str], study: StudyConfig = study) -> list[str]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "discs"
        for name in ("head", "cross-fitted"):
            (folder / name).mkdir(parents=True)
        made = publish(folder / "head", kind="head", inputs=[], spec={}, outputs={})
        inputs = [] if head is None else [Input(role="head", kind="head", artifact_id=head or made.artifact_id)]
        spec = {"grounder": {"identity": identity}}
        publish(folder / "cross-fitted", kind="region-store", inputs=inputs, spec=spec, outputs={})
        return [text for _, text in store_differences(study, folder.parent)]

    answered, none = {"cross_fitted": "digest"}, "its images were not answered by heads that never saw them"
    assert said("", answered) == []
    assert said("", {}) == [none]
    assert said("0" * 64, answered) == ["its head is not the one beside it"]
    assert said(None, {}) == [none, "its head is not the one beside it"]
    assert said(None, {}, config()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"scratch": {}}}, "arms"),
        ({"arms": {**RECIPE["arms"], "oracle": {"pretrain": {}, "store": "oracle"}}}, "no outlines for oracle"),
        (
            {"arms": {**RECIPE["arms"], "unseen": {"pretrain": {}, "store": "cross-fitted"}}},
            "no outlines for cross-fitted",
        ),
        ({"claims": [{**RECIPE["claims"][0], "arm": "none"}]}, "no arm 'none'"),
        ({"claims": [{**RECIPE["claims"][0], "endpoint": "none"}]}, "has no 'none'"),
        ({"folds": 1}, "folds"),
        (
            {"corpora": {"discs": {**RECIPE["corpora"]["discs"], "endpoints": {"encoder": {}}}}, "claims": []},
            "'encoder' is",
        ),
        ({"pairs": [["uniform", "none"]]}, "pairs: no arm 'none'"),
    ],
)
def test_studies_that_do_not_hold_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_the_dry_run_says_the_hours_and_what_can_be_shown(data: Path, tmp_path: Path, mwm) -> None:
    code, out, err = mwm("run", str(recipe(tmp_path)), "--images", str(data), "--out", str(tmp_path / "o"), "--dry-run")
    assert code == 0, err
    assert "folds: 2" in out
    assert [line for line in err.splitlines() if "trying" in line] == [
        f"discs: trying {name}" for name in ("localize", "encoder", "full", "probe")
    ]
    assert "2 x encoder of" in err
    assert "4 x full of" in err
    assert "2 x probe of" in err
    assert f"smallest difference that {GROUPS} groups could show" in err
    assert not (tmp_path / "o").exists()
    code, _, err = mwm("run", str(recipe(tmp_path)), "--out", str(tmp_path / "o"))
    assert (code, "--images: not given" in err) == (2, True)
    code, _, err = mwm("run", str(recipe(tmp_path)), "--images", str(data), "--labels", "x.csv")
    assert (code, "names the labels of each corpus" in err) == (2, True)
