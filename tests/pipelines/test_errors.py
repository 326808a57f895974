"""What a stranger gets wrong at the command line, and what they are told: one line, a hint, nothing begun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.conftest import Chain
from tests.test_house import ROOT

RECIPES = {
    "indent": "localize:\n  regions: {bright: disc}\n grid_px: 3\n",
    "bracket": "localize:\n  regions: {bright: disc}\n  grid_px: [\n",
    "tab": "localize:\n\tregions: {}\n",
    "twice": "localize:\n  regions: {bright: disc}\n  grid_px: 64\n  grid_px: 32\n",
    "typo": "localise:\n  regions: {bright: disc}\n",
    "flat": "regions: {bright: disc}\n",
    "list": "- a\n",
    "empty": "",
    "types": "localize:\n  regions: {bright: disc}\n  grid_px: wide\n  micro_batch: 0\n  grid_pix: 3\n",
    "bare": "localize: {}\n",
}


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("indent", "recipe indent.yaml line 3: not YAML"),
        ("bracket", "recipe bracket.yaml line 4: not YAML"),
        ("tab", "recipe tab.yaml line 2: not YAML"),
        ("twice", "line 4: not YAML: 'grid_px' is given twice"),
        ("typo", "has no section 'localize'\nhint: it has 'localise': did you mean that?"),
        ("flat", "hint: its settings stand at the top: put them below 'localize:', indented"),
        ("list", "expected sections with settings, found a list"),
        ("empty", "found nothing\nhint: 'mwm init' writes a recipe"),
        (
            "types",
            "grid_px: expected a valid integer (found 'wide'); "
            "micro_batch: expected greater than or equal to 1 (found 0); "
            "grid_pix: unknown key. Did you mean 'grid_px'?",
        ),
        ("bare", "regions: required, not given\nhint: write it into the recipe, or --set regions=..."),
    ],
)
def test_recipes(finished: Chain, mwm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(f"{recipe}.yaml").write_text(RECIPES[recipe])
    code, out, err = mwm("localize", f"{recipe}.yaml", "--images", finished.images, "--out", "x")
    assert (code, out) == (2, "")
    assert err.startswith("error[config]: ")
    assert told in err
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("localize RECIPE --images IMAGES --out x --set localize.grid_px=64", 2, "hint: --set 'grid_px=64'"),
        ("run RECIPE --images IMAGES --labels LABELS --out x --set grid_px=64", 2, "hint: --set 'localize.grid_px=64'"),
        (
            "localize tour --images IMAGES --out x --set grounder.options.foo=1", 2,
            "hint: if it is a name, write it out first: --set 'grounder={name: lite}'",
        ),
        ("localize RECIPE --images IMAGES --out LABELS", 2, "labels.csv: a file, expected a folder"),
        ("run RECIPE --images IMAGES --labels LABELS --out LABELS", 2, "labels.csv: a file, expected a folder"),
        ("localize IMAGES --images IMAGES --out x", 2, "a folder, expected a YAML file"),
        ("localize RECIPE --images LABELS --out x", 2, "no column 'image'"),
        ("pretrain RECIPE --images IMAGES --regions OUT/encoder --out x", 5, "'mwm localize' makes a region-store"),
        ("pretrain RECIPE --images IMAGES --regions OUT --out x", 5, "hint: it holds one: OUT/regions"),
        ("pretrain RECIPE --images IMAGES --regions IMAGES --out x", 5, "'mwm localize' makes a region-store"),
        ("pretrain RECIPE --images IMAGES --regions OUT/regions@0123456789ab --out x", 2, "written PATH@sha256:DIGITS"),
        ("pretrain RECIPE --images IMAGES --regions OUT/regions@sha256:0123456789ab --out x", 5, "pinned sha256:01234"),
        ("finetune RECIPE --images IMAGES --labels LABELS --encoder OUT/regions --out x", 5, "makes an encoder"),
        ("finetune RECIPE --images IMAGES --labels LABELS --encoder OUT --out x", 5, "hint: it holds one: OUT/encoder"),
        (
            "finetune RECIPE --images IMAGES --labels LABELS --out x --set val_milli=800 --set test_milli=300", 2,
            "error[config]: val_milli + test_milli must leave something to train on (below 1000)\n",
        ),
        (
            "pretrain RECIPE --images IMAGES --regions OUT/regions --out x --set policy.name=region "
            "--set policy.hide_insde=1",
            2, "error[config]: policy: hide_insde: unknown key. Did you mean 'hide_inside'?\n",
        ),
        ("run RECIPE --out x", 2, "hint: --images FOLDER"),
        ("run RECIPE --images IMAGES --out x", 2, "--labels: not given, and the recipe finetunes"),
        ("audit LABELS", 2, "a file, expected the folder of an artifact"),
        ("inspect LABELS", 2, "a file, expected the folder of an artifact"),
        ("localize", 2, "hint: mwm localize --help"),
        ("locallize", 2, "hint: mwm --help"),
        ("localize RECIPE --images IMAGES --out " + 300 * "a", 2, "File name too long"),
        ("localize RECIPE --images EMPTY --out x", 2, "--images: given, but empty"),
    ],
)  # fmt: skip
def test_commands(
    finished: Chain, mwm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {
        "RECIPE": finished.recipe,
        "IMAGES": finished.images,
        "LABELS": finished.labels,
        "OUT": finished.out,
        "EMPTY": "",
    }
    words = [
        next((word.replace(name, str(place), 1) for name, place in places.items() if word.startswith(name)), word)
        for word in command.split()
    ]
    found, out, err = mwm(*words)
    assert (found, out) == (code, ""), err
    assert told in err.replace(str(finished.out), "OUT")
    assert "error[bug]" not in err
    assert max(map(len, err.splitlines())) < 700
    assert not Path("x").exists()


def test_unicode_and_spaces_in_paths_and_long_ids(finished: Chain, mwm, tmp_path: Path) -> None:
    folder = tmp_path / "Bilder für Zoë 画像"
    folder.mkdir()
    for path in finished.images.iterdir():
        (folder / f"{'é' * 50} {path.name}").write_bytes(path.read_bytes())
    out = tmp_path / "aus gabe é"
    code, told, _ = mwm("localize", finished.recipe, "--images", folder, "--out", out, "--json")
    assert code == 0
    assert json.loads(told)["path"] == str(out)
    code, told, _ = mwm("localize", finished.recipe, "--images", folder, "--out", out)
    assert f"next: mwm pretrain --images ... --regions '{out}' --out ..." in told  # to paste as it stands
    sample = f"{'é' * 50} p00.png"
    code, told, _ = mwm("inspect", out, "--sample", sample, "--json")
    assert json.loads(told)["sample"] == sample
    (folder / f"{'é' * 70}.png").write_bytes((finished.images / "p00.png").read_bytes())
    code, _, err = mwm("localize", finished.recipe, "--images", folder, "--out", tmp_path / "x")
    assert code == 2
    assert "at most 128 are allowed" in err


def test_a_reader_that_leaves_is_no_error(finished: Chain) -> None:
    """As ``mwm list FOLDER | head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pipelines", "list", str(finished.out)]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_leaves_stdout_empty_even_with_json(finished: Chain, mwm) -> None:
    """Who reads JSON looks at the exit code first; the words are on stderr, also under ``-q``."""
    for more in ([], ["--json"], ["-q"], ["--json", "-q"]):
        code, out, err = mwm("localize", "toor", "--images", finished.images, "--out", "x", *more)
        assert (code, out) == (2, "")
        assert err.startswith("error[missing-input]: recipe 'toor'")
