"""`mwm fit-grounder` as a user meets it: help, a dry run, faulty labels. The run itself: test_fit_job."""

import json
from pathlib import Path

import pytest

from tests.stage1_localize.coco_files import change, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> list[object]:
    images, labels = write_corpus(tmp_path / "data")
    return ["--images", images, "--labels", labels, "--out", tmp_path / "head"]


def test_help_ends_with_the_settings(mwm) -> None:
    code, out, _ = mwm("fit-grounder", "--help")
    assert code == 0
    assert "COCO boxes or outlines -> head" in out
    for key in ("regions", "exhaustive", "turns", "lateral", "start", "steps", "folds", "workers"):
        assert f"\n  {key} " in out


def test_a_dry_run_tells_settings_and_cost_and_writes_nothing(mwm, corpus: list[object], tmp_path: Path) -> None:
    code, out, err = mwm("fit-grounder", *corpus, "--dry-run", "--json", "--set", "workers=2")
    assert code == 0, err
    told = json.loads(out)
    assert told["settings"]["steps"] == 150
    assert told["settings"]["regions"] == {"square": ["square"]}
    forecast = told["forecast"]["fit-grounder"]
    assert forecast["inputs"]["labels"] == "6 images, 5 annotations of 1 regions"
    assert 60 < forecast["seconds"] < 600
    assert any("only 5 images" in text for text in forecast["warnings"])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_faulty_labels_are_one_line_and_leave_nothing(mwm, corpus: list[object], tmp_path: Path) -> None:
    rows = [{"id": 3, "image_id": 77, "category_id": 7, "bbox": [0, 0, 0, 1]}] * 2
    change(tmp_path / "data" / "coco.json", annotations=rows)
    code, _, err = mwm("fit-grounder", *corpus)
    assert code == 2
    assert err.startswith("error[usage]: labels coco.json: 3 problems: annotation 3: image_id 77 is no image")
    assert "Traceback" not in err
    assert not (tmp_path / "head").exists()
    code, _, err = mwm("fit-grounder", *corpus, "--set", "fold=3")
    assert (code, "Did you mean 'folds'?" in err) == (2, True)
