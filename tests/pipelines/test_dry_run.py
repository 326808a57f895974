"""``--dry-run``: checks as the real run would, estimates, and leaves no trace."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from shared import loop
from shared.artifact import CARD
from shared.lease import Lease
from tests.pipelines.conftest import Chain
from tests.shared.dicom_files import write_dicom


def commands(chain: Chain, out: Path) -> dict[str, list[object]]:
    """Every command that has a dry run, on inputs that fit."""
    images = ["--images", chain.images]
    labels = ["--labels", chain.labels]
    return {
        "localize": ["localize", chain.recipe, *images, "--out", out],
        "pretrain": ["pretrain", chain.recipe, *images, "--regions", chain.out / "regions", "--out", out],
        "finetune": [
            "finetune", chain.recipe, *images, *labels, "--encoder", chain.out / "encoder", "--out", out,
            "--set", "backbone=auto", "--set", "backbone_options={}",
        ],
        "run": ["run", chain.recipe, *images, *labels, "--out", out],
    }  # fmt: skip


def snapshot(*roots: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of everything below some folders, and of the folders."""
    found = [path for root in roots for path in (root, *root.rglob("*"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["localize", "pretrain", "finetune", "run"])
def test_nothing_is_written_and_the_figures_are_those_of_the_run(
    finished: Chain, mwm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home, temporary, parent = tmp_path / "home", tmp_path / "tmp", tmp_path / "parent"
    for folder in (home, temporary, parent):
        folder.mkdir()
    for variable in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = snapshot(tmp_path, finished.root)
    code, out, err = mwm(*commands(finished, parent / "x")[name], "--dry-run", "--json")
    assert code == 0, err
    assert snapshot(tmp_path, finished.root) == before
    told = json.loads(out)
    assert told["dry_run"] is True
    made = {"localize": "regions", "pretrain": "encoder", "finetune": "finetuned"}
    for step, forecast in told["forecast"].items():
        assert forecast["standing"] == "new"
        assert 0 < forecast["seconds"] < 600
        assert forecast["memory_bytes"] > 50e6
        actual = folder_bytes(finished.out / made.get(step, step))
        assert forecast["disk_bytes"] == pytest.approx(actual, rel=0.2), (step, actual)
    assert list(told["forecast"]) == (["localize", "pretrain", "finetuned", "scratch"] if name == "run" else [name])


@pytest.mark.parametrize(
    ("name", "settings", "tried"),
    [
        ("pretrain", ["batch_size=12", "accumulate=2"], "of 12 images a step 8 were tried"),
        ("finetune", ["batch_size=8"], "of 8 images a step 4 were tried"),
    ],
)
def test_slow_steps_are_tried_with_few_images_and_it_says_so(
    finished: Chain, mwm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: list[str], tried: str
) -> None:
    asked = [*commands(finished, tmp_path / "x")[name], *(word for entry in settings for word in ("--set", entry))]
    code, _, err = mwm(*asked, "--dry-run")
    assert (code, "were tried" in err) == (0, False), err
    monkeypatch.setattr(loop, "_PATIENCE_S", 0.0)
    code, _, err = mwm(*asked, "--dry-run")
    assert code == 0, err
    lines = [line for line in err.splitlines() if tried in line]
    assert [line.partition(":")[0] for line in lines] == ["time", "warning"]
    assert "memory: of the trial, whole steps need more" in lines[1]


def test_a_look_at_dicom_makes_no_salt(finished: Chain, mwm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MWM_SALT_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for number in range(3):
        write_dicom(tmp_path / "images" / f"{number}.dcm", np.arange(4096, dtype=np.uint16).reshape(64, 64) + number)
    images = ["--images", tmp_path / "images"]
    code, _, err = mwm("localize", finished.recipe, *images, "--out", tmp_path / "x", "--dry-run")
    assert (code, "3 found" in err) == (0, True), err
    code, out, err = mwm("init", *images, "--out", tmp_path / "r.yaml")
    assert (code, "1 groups" in out) == (0, True), err
    assert not (tmp_path / "config").exists()


def test_settings_are_data_and_the_rest_is_talk(finished: Chain, mwm, tmp_path: Path) -> None:
    code, out, err = mwm(*commands(finished, tmp_path / "x")["localize"], "--dry-run")
    assert code == 0
    assert yaml.safe_load(out)["grid_px"] == 64
    for word in ("images: 12 found", "time: about", "disk: about", "memory: about", "nothing written"):
        assert word in err
    code, out, err = mwm(*commands(finished, tmp_path / "x")["localize"], "--dry-run", "-q")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["grid_px"] == 64


def test_a_folder_that_holds_a_run_is_judged_as_by_the_run(chain: Chain, mwm) -> None:
    regions, encoder = chain.out / "regions", chain.out / "encoder"
    code, out, err = mwm(*commands(chain, chain.out)["run"], "--dry-run", "--json")
    assert code == 0, err
    assert {item["standing"] for item in json.loads(out)["forecast"].values()} == {"done"}
    again = [*commands(chain, regions)["localize"], "--dry-run"]
    code, _, err = mwm(*again, "--set", "grid_px=32")
    assert code == 2
    assert "differing: spec.grid" in err
    assert "already done" in mwm(*again)[2]
    assert json.loads(mwm(*again, "--fresh", "--json")[1])["forecast"]["localize"]["standing"] == "new"
    (encoder / CARD).unlink()
    resumed = [*commands(chain, encoder)["pretrain"], "--dry-run"]
    code, _, err = mwm(*resumed)
    assert code == 0
    assert "would be continued" in err
    assert "x 0 steps to do" in err  # its last state is whole
    code, _, err = mwm(*resumed, "--set", "seed=1")
    assert code == 2
    assert "another specification" in err
    with Lease(encoder):
        assert mwm(*resumed)[0] == 7
    code, _, err = mwm(*commands(chain, chain.labels)["localize"], "--dry-run")
    assert code == 2
    assert "a file, expected a folder" in err
    code, _, err = mwm(*commands(chain, chain.images)["localize"], "--dry-run")
    assert code == 2
    assert "not a run of mwm" in err


def test_inputs_that_the_run_would_refuse_are_refused(chain: Chain, mwm, tmp_path: Path) -> None:
    given = commands(chain, tmp_path / "x")
    (chain.images / "p03.png").write_bytes(b"no image")
    code, _, err = mwm(*given["localize"], "--dry-run")
    assert code == 0
    assert "warning: 1 of 2 images tried would be quarantined: decode_failed" in err
    assert mwm(*given["pretrain"], "--set", "batch_size=4", "--dry-run")[0] == 4  # the store knows other bytes
    for path in chain.images.iterdir():
        path.write_bytes(b"no image")
    code, _, err = mwm(*given["localize"], "--dry-run")
    assert code == 6
    assert "none of the" in err
    (chain.images / "p05.png").unlink()
    assert mwm(*given["pretrain"], "--dry-run")[0] == 2
    code, _, err = mwm(*given["finetune"], "--dry-run")
    assert code == 2
    assert "1 of 12 samples are not among the images" in err
    assert not (tmp_path / "x").exists()


def test_a_recipe_with_its_own_images_takes_no_others(finished: Chain, mwm, tmp_path: Path) -> None:
    code, _, err = mwm("run", "tour", "--images", finished.images, "--out", tmp_path / "x", "--dry-run")
    assert code == 2
    assert "brings its own images" in err
