"""``mwm init``: a recipe that says what every setting is, and runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.chain import ChainConfig
from pipelines.starter import choose, look_at, recipe_text
from shared.config import validate
from tests.pipelines.conftest import Chain

SETTING = re.compile(r"^( *)#([a-z_]+: .*)$")
SMALL = [
    "localize.regions={bright: disc}", "localize.grounder=planted", "localize.segmenter=none", "localize.workers=0",
    "pretrain.backbone=resnet18", "pretrain.backbone_options={output_stride: 16, channels: [8, 8, 16, 16]}",
    "pretrain.method={name: spark, decoder_width: 32}", "finetune.backbone_options={channels: [8, 8, 16, 16]}",
    "pretrain.size_px=64", "finetune.size_px=64", "pretrain.threads=1", "finetune.threads=1",
]  # fmt: skip


@pytest.mark.parametrize("finetunes", [True, False])
def test_what_stands_behind_a_hash_is_the_default(finetunes: bool) -> None:
    text = recipe_text(None, choose(None), finetunes=finetunes)
    plain = validate(ChainConfig, yaml.safe_load(text))
    lines = text.splitlines()
    settings = [line for line in lines if SETTING.match(line)]
    assert len(settings) > 25
    for line in settings:
        if line.startswith("#finetune"):
            continue
        changed = "\n".join(SETTING.sub(r"\1\2", other) if other is line else other for other in lines)
        assert validate(ChainConfig, yaml.safe_load(changed)) == plain, line
    everything = yaml.safe_load("\n".join(SETTING.sub(r"\1\2", line) for line in lines))
    whole = validate(ChainConfig, everything)
    assert whole.finetune is not None
    assert set(everything) == set(ChainConfig.model_fields)
    for section in ("localize", "pretrain", *(["finetune"] if finetunes else [])):
        assert set(everything[section]) == set(type(getattr(whole, section)).model_fields)


def test_every_setting_is_described_and_every_other_line_is_words() -> None:
    text = recipe_text(None, choose(None), finetunes=True)
    for model in ("localize", "pretrain", "finetune"):
        field = ChainConfig.model_fields[model].annotation
        for name, setting in next(
            m for m in (field, *getattr(field, "__args__", ())) if hasattr(m, "model_fields")
        ).model_fields.items():
            words = setting.description.split()
            assert " ".join(words[:3]) in text, name
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "tumour" in text  # what the grounder knows


def test_a_look_at_the_images_chooses(tmp_path: Path) -> None:
    for place in range(9):
        pixels = np.full((40 + place, 50, 3), 90 + place, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{place}.{'png' if place % 3 else 'jpg'}")
    (tmp_path / "broken.png").write_bytes(b"no")
    seen = look_at(tmp_path)
    assert (seen.count, seen.formats, seen.colour) == (10, {"png": 7, "jpg": 3}, True)
    assert (seen.height_px[0], seen.height_px[2], seen.width_px) == (40, 48, (50, 50, 50))
    assert (seen.unreadable, seen.groups) == (1, 0)
    chosen = choose(seen)
    assert chosen["pretrain"] == {"size_px": 128, "epochs": 300, "batch_size": 8, "channels": 3}
    assert chosen["finetune"]["batch_size"] == 8
    assert choose(None)["pretrain"]["batch_size"] == 64
    assert "1 of the 10 could not be read" in " ".join(seen.lines())


def test_the_recipe_runs_dry(finished: Chain, mwm, tmp_path: Path) -> None:
    recipe = tmp_path / "my own.yaml"
    code, out, err = mwm("init", "--images", finished.images, "--labels", finished.labels, "--out", recipe)
    assert (code, err) == (0, "")
    assert "12 samples in 12 png files, grey, 80 px high, 96 px wide" in out
    assert str(finished.root) not in recipe.read_text()
    given = ["--images", finished.images, "--labels", finished.labels, "--out", tmp_path / "x"]
    sets = [word for text in SMALL for word in ("--set", text)]
    code, _, err = mwm("run", recipe, *given, *sets, "--dry-run")
    assert code == 0, err
    assert "scratch: time: about" in err
    before = recipe.read_bytes()
    code, _, err = mwm("init", "--out", recipe)
    assert code == 2
    assert "nothing is overwritten" in err
    assert recipe.read_bytes() == before


def test_what_cannot_be_begun_with(finished: Chain, mwm, tmp_path: Path) -> None:
    for command, told in (
        (["--out", tmp_path / "r.txt"], "ends in .yaml"),
        (["--out", tmp_path / "no" / "r.yaml"], "its folder does not exist"),
        (["--out", tmp_path / "r.yaml", "--images", tmp_path / "nowhere"], "no such folder"),
        (["--out", tmp_path / "r.yaml", "--labels", finished.recipe], "labels"),
    ):
        code, _, err = mwm("init", *command)
        assert code == 2, err
        assert told in err
    assert list(tmp_path.iterdir()) == []
