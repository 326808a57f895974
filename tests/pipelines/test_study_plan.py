"""Folds that keep groups whole, and the runs of a study with the settings of each."""

import shutil
from pathlib import Path

import pytest

from pipelines.study_plan import fold_rows, plan, read_corpus, run_settings
from shared.errors import ConfigError
from tests.pipelines.studies import config, write_discs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_discs(tmp_path_factory.mktemp("study") / "data")


def test_folds_keep_groups_whole_and_test_each_image_once(data: Path) -> None:
    study = config(folds=3)
    corpus = read_corpus(study, "discs", data)
    tested: list[str] = []
    for fold in range(3):
        rows = fold_rows(corpus, study, 0, fold)
        parts = {part: {row.group for row in rows if row.split == part} for part in ("train", "val", "test")}
        assert all(parts.values())
        assert not parts["train"] & parts["val"]
        assert not (parts["train"] | parts["val"]) & parts["test"]
        assert {row.label for row in rows if row.split == "test"} == {"a", "b"}
        tested += [row.sample_id for row in rows if row.split == "test"]
        assert fold_rows(corpus, study, 0, fold) == rows
    assert sorted(tested) == sorted(row.sample_id for row in corpus.examples)
    assert fold_rows(corpus, study, 1, 0) != fold_rows(corpus, study, 0, 0)


def test_a_probe_means_nothing_from_scratch(tmp_path: Path) -> None:
    scratch, uniform = plan(config())[:2]
    assert list(run_settings(config(), scratch, tmp_path)) == ["full"]
    found = run_settings(config(), uniform, tmp_path)
    assert list(found) == ["encoder", "full", "probe"]
    assert (found["probe"].freeze, found["encoder"].seed, found["full"].seed) == (True, 0, 0)
    assert run_settings(config(), scratch, tmp_path)["full"].backbone == found["encoder"].backbone
    later = next(run for run in plan(config()) if (run.fold, run.arm) == (1, "uniform"))
    found = run_settings(config(), later, tmp_path)
    assert {settings.seed for settings in found.values()} == {1}
    assert found["encoder"].subset == (tmp_path / "train.csv").resolve()


def test_whole_folds_come_first() -> None:
    runs = plan(config(rounds=2))
    assert [(run.round, run.fold, run.arm) for run in runs][:3] == [
        (0, 0, "scratch"), (0, 0, "uniform"), (0, 1, "scratch"),
    ]  # fmt: skip
    assert len({run.seed(config(rounds=2)) for run in runs}) == 4
    assert len({run.seed(config()) for run in runs if (run.round, run.fold) == (0, 0)}) == 1  # alike in all arms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sample_id,label\n00-0.png,a\n01-0.png,b\n", "not every row has a group"),
        ("sample_id,label,group,split\n00-0.png,a,g0,train\n01-0.png,b,g1,test\n", "parts of their own"),
        ("sample_id,label,group\n00-0.png,a,g0\n00-1.png,a,g0\n01-0.png,b,g1\n", "fewer than 2 folds"),
        ("sample_id,label,group\n00-0.png,a,g0\n99.png,b,g1\n", "not among the images"),
    ],
)
def test_labels_that_cannot_be_cut_into_folds_are_refused(data: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    listed = [line.rpartition(",")[0] for line in (data / "discs.csv").read_text().splitlines()]
    (tmp_path / "discs.csv").write_text("\n".join(listed) + "\n")
    shutil.copytree(data / "images", tmp_path / "images")
    study = config()

    def cut() -> None:
        corpus = read_corpus(study, "discs", tmp_path)
        fold_rows(corpus, study, 0, 0)

    with pytest.raises(ConfigError, match=message):
        cut()
