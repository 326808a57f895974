"""Labels as regions: the pixels that they outline, and no answer for what they do not list."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.errors import InputMissingError, PromptError, UsageError
from shared.regions import open_region_store
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.oracle import Oracle
from tests.stage1_localize.coco_files import HEIGHT, WIDTH, change, write_corpus

ROOT = Path(__file__).parents[3]
SQUARE = [Region("thing", ("Square",))]


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    return write_corpus(tmp_path)


def locate(labels: Path, name: str, height: int = HEIGHT, width: int = WIDTH) -> Detections:
    grounder = Oracle(Oracle.Options(labels=str(labels)))
    grounder.check(SQUARE)
    return grounder.locate(Batch([np.zeros((1, height, width), np.float32)], [name]), SQUARE)[0]


def test_a_map_is_the_outline_s_share_of_each_pixel(corpus: tuple[Path, Path]) -> None:
    body = change(corpus[1])
    body["annotations"][2]["segmentation"] = [[24, 20, 72, 20, 72, 40, 24, 40]]
    body["annotations"][2]["bbox"] = [24, 20, 48, 20]
    change(corpus[1], annotations=body["annotations"])
    found = locate(corpus[1], "2.png")
    assert (found.score.tolist(), found.region.tolist(), found.text.tolist()) == ([1.0], [0], [0])
    assert found.box_xyxy_px.tolist() == [[24, 20, 72, 40]]
    (made,) = found.probability
    assert made is not None
    assert made.mean() == pytest.approx(48 * 20 / (HEIGHT * WIDTH), abs=1e-3)
    assert made[64 + 4 : 128 - 4, 64 + 4 : 192 - 4].min() == 1  # a quarter to a half down, a quarter to three across
    outside = made.copy()
    outside[64 - 4 : 128 + 4, 64 - 4 : 192 + 4] = 0
    assert not outside.any()


def test_a_box_stands_for_an_outline_that_is_not_there(corpus: tuple[Path, Path]) -> None:
    body = change(corpus[1])
    del body["annotations"][0]["segmentation"]
    change(corpus[1], annotations=body["annotations"])
    (made,) = locate(corpus[1], "0.png").probability
    assert made is not None
    assert made.mean() == pytest.approx(24 * 24 / (HEIGHT * WIDTH), abs=1e-3)


def test_a_listed_image_without_annotations_holds_nothing(corpus: tuple[Path, Path]) -> None:
    assert len(locate(corpus[1], "5.png")) == 0


def test_what_the_labels_do_not_say_is_no_answer(corpus: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"the labels do not list 9.png"):
        locate(corpus[1], "9.png")
    with pytest.raises(UsageError, match=r"1.png is 96x81 px, its labels say 96x80"):
        locate(corpus[1], "1.png", height=HEIGHT + 1)
    with pytest.raises(PromptError, match=r"region 'thing': 'circle' is no category of the labels"):
        Oracle(Oracle.Options(labels=str(corpus[1]))).check([Region("thing", ("circle",))])
    with pytest.raises(InputMissingError, match="no such file"):
        Oracle(Oracle.Options(labels="nowhere.json")).check(SQUARE)
    body = change(corpus[1])
    body["annotations"][3]["iscrowd"] = 1
    change(corpus[1], annotations=body["annotations"])
    with pytest.raises(UsageError, match=r"3.png: a crowd annotation says nothing of 'square'"):
        locate(corpus[1], "3.png")


def test_its_identity_is_what_the_labels_say(corpus: tuple[Path, Path]) -> None:
    def identity() -> dict:
        return Oracle(Oracle.Options(labels=str(corpus[1]))).identity()

    before = identity()
    body = change(corpus[1])
    change(corpus[1], images=body["images"][::-1], info={"year": 2026})
    assert identity() == before
    body["annotations"][0]["bbox"][2] += 1
    change(corpus[1], annotations=body["annotations"])
    assert identity() != before


@pytest.mark.slow
def test_a_store_of_labels_serves_policy_oracle(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    images, labels = corpus

    def mwm(*command: str) -> str:
        line = [sys.executable, "-m", "pipelines", *command, "--out", str(tmp_path / command[0])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    recipe = tmp_path / "recipe.yaml"
    parts = {"grounder": {"name": "oracle", "options": {"labels": labels.name}}, "segmenter": "none"}
    recipe.write_text(json.dumps({"localize": {"regions": {"square": "square"}, **parts, "workers": 2}}))
    mwm("localize", str(recipe), "--images", str(images))
    store = open_region_store(str(tmp_path / "localize"))
    assert (store.grounder, store.maps([5]).any()) == ("oracle", False)
    assert store.maps([0])[0].mean() / 254 == pytest.approx(528 / (HEIGHT * WIDTH), abs=1e-3)
    settings = ["policy=oracle", "backbone=resnet18", "size_px=64", "epochs=1", "warmup_epochs=0", "threads=1"]
    settings += ["method.name=spark", "method.decoder_width=32"]
    settings = [word for setting in settings for word in ("--set", setting)]
    mwm("pretrain", "--images", str(images), "--regions", str(tmp_path / "localize"), *settings)
