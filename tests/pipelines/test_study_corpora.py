"""The folder of the study: what the built-in recipe reads, from a part of the public images."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.options import read_config
from pipelines.study_config import StudyConfig
from pipelines.study_corpora import main, write_corpora
from pipelines.study_plan import fold_rows, read_corpus
from shared.errors import InputMissingError, MwmError, UsageError
from shared.images import find_sources
from stage1_localize.contracts import Batch
from stage1_localize.grounders.oracle import Oracle


@pytest.fixture(scope="module")
def made(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each class six groups of two images, one of them of the part `val`."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("corpora")
    groups: dict[tuple[str, str], Counter[str]] = {}
    kept = []
    with (test_data / "manifest.csv").open(newline="", encoding="utf-8") as table:
        for row in csv.DictReader(table):
            seen = groups.setdefault((row["set"], row["label"], row["split"]), Counter())
            wanted = row["group"] in seen or len(seen) < (5 if row["split"] == "train" else 1)
            if row["set"] in ("brain4", "br35h", "bccd") and wanted and seen[row["group"]] < 2:
                seen[row["group"]] += 1
                kept.append(row)
    for row in kept:
        for name in filter(None, (row["image"], row["target"])):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).symlink_to(test_data / name)
    with (data / "manifest.csv").open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    counts = write_corpora(data, out)
    assert set(counts) == {"brain4", "br35h"}
    assert counts == {name: sum(row["set"] == name and row["label"] != "notumor" for row in kept) for name in counts}
    assert write_corpora(data, out) == counts  # again over what is there
    return out


def test_the_study_reads_it(made: Path) -> None:
    study = read_config(StudyConfig, "study", None, None)
    corpora = {name: read_corpus(study, name, made) for name in study.corpora}
    brains = corpora["brain4"]
    assert {row.label for row in brains.examples} == {"glioma", "meningioma", "pituitary"}
    assert not any("notumor" in name for name in brains.sources)
    for corpus in corpora.values():
        tested = [
            row.sample_id for fold in range(5) for row in fold_rows(corpus, study, 0, fold) if row.split == "test"
        ]
        assert sorted(tested) == [row.sample_id for row in corpus.examples]


def test_outlines_are_the_targets(made: Path) -> None:
    study = read_config(StudyConfig, "study", None, None)
    (region,) = study.localize_config("br35h").asked()
    oracle = Oracle(Oracle.Options(labels=str(made / "br35h-outlines.json")))
    with (made / "br35h-labels.csv").open() as table:
        targets = {row["sample_id"]: made / row["target"] for row in csv.DictReader(table)}
    for source in find_sources(made / "br35h.csv"):
        truth = np.asarray(Image.open(targets[source.sample_id])) > 0
        batch = Batch([np.zeros((1, *truth.shape), np.float32)], sample_ids=(source.sample_id,))
        (found,) = oracle.locate(batch, [region])
        drawn = np.max([np.zeros((256, 256), np.float32), *found.probability], axis=0) >= 0.5
        assert (drawn == truth).all()
        if truth.any():
            y, x = np.nonzero(truth)
            low, high = found.box_xyxy_px[:, :2].min(axis=0), found.box_xyxy_px[:, 2:].max(axis=0)
            assert [*low, *high] == [x.min(), y.min(), x.max() + 1, y.max() + 1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("set,image,target,group\n", "no column 'label'"),
        ("set,image,target,label,group\nbrain4,a.png,,glioma,g\n", "a.png: no such file, and manifest.csv names it"),
        ("set,image,target,label,group\nbr35h,b.txt,b.txt,,g\n", "a target of br35h: not a PNG"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    (tmp_path / "b.txt").write_text("no picture")
    with pytest.raises(MwmError, match=told):
        write_corpora(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="a new folder"):
        write_corpora(tmp_path, tmp_path)


def test_a_folder_without_images_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(InputMissingError, match=r"manifest\.csv: no such file"):
        write_corpora(tmp_path, tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["study_corpora", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no such file" in capsys.readouterr().err
