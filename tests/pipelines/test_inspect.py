"""``mwm inspect``: facts of artifacts, samples and masks, and what it draws."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from shared.artifact import file_sha256, read_card
from shared.regions import open_region_store
from stage2_pretrain.redraw import redraw_one
from stage2_pretrain.witness import read_witnesses
from tests.pipelines.conftest import Chain


def test_a_card_is_told(finished: Chain, mwm) -> None:
    code, out, _ = mwm("inspect", finished.out / "encoder")
    assert code == 0
    assert read_card(finished.out / "encoder").artifact_id in out
    code, _, err = mwm("inspect", finished.out / "encoder", "--epoch", "1")
    assert code == 2
    assert "need --sample" in err


def test_every_mask_of_a_run_draws_again_to_the_recorded_bits(finished: Chain) -> None:
    store = open_region_store(finished.out / "regions")
    card = read_card(finished.out / "encoder")
    tensors, described = read_witnesses(finished.out / "encoder")
    seen = set()
    for epoch in range(2):
        for place, name in enumerate(described["witnesses"]):
            mask = redraw_one(store, card.identity.spec, finished.out / "encoder", name, epoch=epoch, view=0)
            assert (mask.bits == tensors["bits"][epoch, 0, place]).all()
            seen.add(mask.bits.tobytes())
    assert len(seen) > 2


def test_the_mask_of_a_sample_is_told_and_drawn(finished: Chain, mwm, tmp_path: Path) -> None:
    drawn = tmp_path / "mask one.png"
    code, out, _ = mwm(
        "inspect", finished.out, "--sample", "p03.png", "--epoch", "0", "--images", finished.images, "--out", drawn,
        "--json",
    )  # fmt: skip
    assert code == 0
    told = json.loads(out)
    assert told["witness"] == "matches the recorded bits"
    assert told["epoch"] == "0 of 0 to 1"
    assert told["hidden"].startswith("10 of 16: ")  # 600 thousandths
    assert told["encoder"].endswith(read_card(finished.out / "encoder").artifact_id)
    picture = np.asarray(Image.open(io.BytesIO(drawn.read_bytes())))
    assert picture.shape[1] > 3 * picture.shape[0]  # four panels
    last = mwm("inspect", finished.out / "encoder", "--sample", "p03.png", "--json")[1]
    assert json.loads(last)["epoch"] == "1 of 0 to 1"
    assert json.loads(last)["draw"] != told["draw"]


def test_a_sample_of_a_store_is_told_and_drawn(finished: Chain, mwm, tmp_path: Path) -> None:
    store = finished.out / "regions"
    code, out, _ = mwm(
        "inspect", store, "--sample", "p00.png", "--images", finished.images, "--out", tmp_path / "p.png"
    )
    assert code == 0
    assert "region bright  " in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_corpus_says_which_file_a_sample_was(finished: Chain, mwm) -> None:
    code, out, _ = mwm("inspect", finished.out / "regions" / "corpus", "--sample", "p03.png", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["row"] == 3
    assert told["source"] == f"sha256:{file_sha256(finished.images / 'p03.png')}"
    code, _, err = mwm("inspect", finished.out / "regions" / "corpus", "--sample", "p3.png")
    assert (code, "did you mean 'p03.png'?" in err) == (2, True)


def test_questions_that_have_no_answer_say_what_has(chain: Chain, mwm, tmp_path: Path) -> None:
    store, encoder = chain.out / "regions", chain.out / "encoder"
    picture = ["--images", chain.images, "--out", tmp_path / "p.png"]
    shutil.copytree(encoder, tmp_path / "alone")
    for command, told in (
        ([store, "--sample", "p3.png"], "did you mean 'p03.png'?"),
        ([store, "--sample", "p03.png", "--epoch", "0"], "a region-store has no epochs"),
        ([encoder, "--sample", "p03.png", "--epoch", "2"], "this run has epochs 0 to 1"),
        ([encoder, "--sample", "p03.png", "--epoch", "-3"], "this run has epochs 0 to 1"),
        ([encoder, "--sample", "p03.png", "--view", "1"], "this run has view 0 only"),
        ([encoder, "--sample", "p03.png", "--out", tmp_path / "p.png"], "--out needs --images"),
        ([chain.out / "scratch", "--sample", "p03.png"], "a model holds no samples"),
        ([tmp_path / "alone", "--sample", "p03.png"], "--regions PATH names it"),
        ([store, "--sample", "p03.png", *picture[:3], tmp_path / "no" / "p.png"], "its folder does not exist"),
        ([store, "--sample", "p03.png", *picture[:3], store / "p.png"], "lies inside the published artifact"),
    ):
        code, out, err = mwm("inspect", *command)
        assert (code, out) == (2, ""), command
        assert told in err
    assert mwm("inspect", tmp_path / "alone", "--sample", "p03.png", "--regions", store)[0] == 0
    shutil.copy(chain.images / "p04.png", chain.images / "p03.png")
    code, _, err = mwm("inspect", encoder, "--sample", "p03.png", *picture)
    assert code == 2
    assert "is not the file that was localized" in err
    assert not (tmp_path / "p.png").exists()


def test_a_quarantined_sample_says_why(chain: Chain, mwm, tmp_path: Path) -> None:
    (chain.images / "p03.png").write_bytes(b"no image")
    assert mwm("localize", chain.recipe, "--images", chain.images, "--out", tmp_path / "r")[0] == 0
    code, out, _ = mwm("inspect", tmp_path / "r", "--sample", "p03.png")
    assert code == 0
    assert "decode_failed in stage read" in out
    code, _, err = mwm(
        "inspect", tmp_path / "r", "--sample", "p03.png", "--images", chain.images, "--out", tmp_path / "p.png"
    )
    assert code == 2
    assert "has no maps: decode_failed" in err


def test_bits_that_were_changed_are_drift(chain: Chain, mwm) -> None:
    path = chain.out / "encoder" / "witnesses.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    place = json.loads((chain.out / "encoder" / "witnesses.json").read_bytes())["witnesses"].index("p03.png")
    tensors["bits"][1, 0, place, 0] ^= np.uint8(5)
    save_file(tensors, path)
    code, out, err = mwm("inspect", chain.out, "--sample", "p03.png", "--epoch", "1")
    assert code == 3
    assert "DIFFERS from the recorded bits in 2 of 16 patches" in out
    assert "error[drift]" in err
    assert mwm("inspect", chain.out, "--sample", "p03.png", "--epoch", "0")[0] == 0
