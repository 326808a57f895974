"""The failure matrix where it meets users: a row and a stage a test, by exit code and by what is said.

Damage of published files is in test_corruption.py, kills and full disks are beside their stages.
"""

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.artifact import CARD, read_card
from shared.lease import Lease
from tests.pipelines.conftest import Chain
from tests.pipelines.test_audit import reseal


def pretrain(chain: Chain, out: Path, *more: object) -> list[object]:
    return ["pretrain", chain.recipe, "--images", chain.images, "--regions", chain.out / "regions", "--out", out, *more]


def finetune(chain: Chain, out: Path, *more: object) -> list[object]:
    return [
        "finetune", chain.recipe, "--images", chain.images, "--labels", chain.labels,
        "--encoder", chain.out / "encoder", "--out", out, *more,
    ]  # fmt: skip


def localize(chain: Chain, out: Path, *more: object) -> list[object]:
    return ["localize", chain.recipe, "--images", chain.images, "--out", out, *more]


def audit(chain: Chain, out: Path, *more: object) -> list[object]:
    return ["audit", chain.out, "--out", out, *more]


def run(chain: Chain, out: Path, *more: object) -> list[object]:
    return ["run", chain.recipe, "--images", chain.images, "--labels", chain.labels, "--out", out, *more]


STAGES = {"localize": localize, "pretrain": pretrain, "finetune": finetune, "audit": audit, "run": run}


@pytest.mark.parametrize("stage", STAGES)
def test_two_writers_the_second_exits_7(stage: str, finished: Chain, mwm, tmp_path: Path) -> None:
    with Lease(tmp_path / "x"):
        before = sorted(path.name for path in (tmp_path / "x").rglob("*"))
        code, _, err = mwm(*STAGES[stage](finished, tmp_path / "x"))
    assert code == 7
    assert "error[locked]" in err
    assert sorted(path.name for path in (tmp_path / "x").rglob("*")) in ([], before)


def flip_jpeg_byte(path: Path) -> None:
    """A bit that decodes without a word, to other pixels."""
    with Image.open(path) as image:
        sound = np.asarray(image)
    raw = bytearray(path.read_bytes())
    for place in range(len(raw) - 20, len(raw) // 2, -1):
        changed = raw.copy()
        changed[place] ^= 1
        try:
            with Image.open(io.BytesIO(changed)) as image:
                pixels = np.asarray(image)
        except OSError:
            continue
        if not np.array_equal(pixels, sound):
            path.write_bytes(changed)
            return
    raise AssertionError("no such bit")


@pytest.fixture
def jpegs(chain: Chain, mwm) -> Chain:
    """The chain's images as JPEG, localized, and an encoder made of them."""
    for path in sorted(chain.images.glob("*.png")):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    chain.labels.write_text(chain.labels.read_text().replace(".png", ".jpg"))
    shutil.rmtree(chain.out)
    assert mwm(*localize(chain, chain.out / "regions"))[0] == 0
    return chain


def test_flipped_jpeg_byte_while_localizing_is_source_changed(chain: Chain, monkeypatch, mwm, tmp_path: Path) -> None:
    from stage1_localize import job

    path = chain.images / "p03.jpg"
    with Image.open(chain.images / "p03.png") as image:
        image.save(path, quality=90)
    (chain.images / "p03.png").unlink()
    plain = job.list_corpus

    def listed(sources):
        rows = plain(sources)
        flip_jpeg_byte(path)  # between listing and reading
        return rows

    monkeypatch.setattr(job, "list_corpus", listed)
    code, _, _ = mwm(*localize(chain, tmp_path / "r", "--set", "max_failures=1"))
    assert code == 0
    (line,) = (tmp_path / "r" / "quarantine.jsonl").read_text().splitlines()
    assert '"source_changed"' in line
    assert "p03.jpg" in line


def test_flipped_jpeg_byte_before_pretraining_is_source_changed(jpegs: Chain, mwm, tmp_path: Path) -> None:
    flip_jpeg_byte(jpegs.images / "p03.jpg")
    code, _, err = mwm(*pretrain(jpegs, tmp_path / "e"))
    assert code == 4
    assert "error[source-changed]: p03.jpg: sha256" in err
    assert not (tmp_path / "e" / CARD).exists()


def test_flipped_jpeg_byte_before_finetuning_is_another_specification(jpegs: Chain, mwm, tmp_path: Path) -> None:
    """Fine-tuning knows no store: it takes images as they are, and their digest into its id."""
    scratch = [part for part in finetune(jpegs, tmp_path / "m") if part not in ("--encoder", jpegs.out / "encoder")]
    assert mwm(*scratch)[0] == 0
    images = read_card(tmp_path / "m").identity.spec["images"]
    flip_jpeg_byte(jpegs.images / "p03.jpg")
    code, _, err = mwm(*scratch)
    assert code == 2
    assert "error[other-run]" in err
    assert "images.sha256" in err
    assert images["sha256"] in err


def test_shards_exchanged_by_a_copy_stop_pretraining(chain: Chain, mwm, tmp_path: Path) -> None:
    first, second = (chain.out / "regions/regions.zarr/maps" / f"c.{shard}.0.0.0" for shard in (2, 3))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)  # each whole, with right checksums
    second.write_bytes(one)
    code, _, err = mwm(*pretrain(chain, tmp_path / "e"))
    assert code == 4
    assert "row 2 (p02.png): its region maps are not those that were published" in err or "row 3 (p03.png)" in err


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(kind: str, marker: Path) -> bytes:
    if kind == "pickle":
        return pickle.dumps(Bomb(marker))
    file = io.BytesIO()
    torch.save({"conv1.weight": Bomb(marker)}, file)
    return file.getvalue()


@pytest.mark.parametrize("sealed", [False, True], ids=["dropped in", "card rewritten"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_malicious_checkpoint_is_never_unpickled(
    kind: str, sealed: bool, chain: Chain, mwm, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "exploded"
    evil = pickled(kind, marker)
    places = {
        "encoder": ("encoder/model.safetensors", "witnesses.safetensors"),
        "scratch": ("model/model.safetensors",),
    }
    for artifact, names in places.items():
        for name in names:
            (chain.out / artifact / name).write_bytes(evil)
        if sealed:
            reseal(chain.out / artifact)
        for level in ("integrity", "masks"):
            assert mwm("audit", chain.out, "--level", level)[0] == 4
    code, _, err = mwm(*finetune(chain, tmp_path / "m"))
    assert code == 4
    assert "error[corrupt]" in err
    assert mwm("inspect", chain.out, "--sample", "p00.png", "--epoch", "0")[0] == 4
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_malicious_state_is_never_unpickled(kind: str, chain: Chain, mwm, tmp_path: Path) -> None:
    shutil.rmtree(chain.out / "finetuned")
    shutil.copytree(chain.out / "encoder", tmp_path / "encoder")
    encoder = tmp_path / "encoder"
    (encoder / CARD).unlink()
    states = sorted(encoder.glob("run/state/step-*"))
    assert states
    marker = tmp_path / "exploded"
    for state in states:
        (state / "tensors.safetensors").write_bytes(pickled(kind, marker))
    code, _, err = mwm(*pretrain(chain, encoder))
    assert code == 4
    assert "states were saved here, and none is usable" in err
    assert not marker.exists()


@pytest.mark.parametrize(
    "raw", [b'{"a":' * 100_000, b"[" * 100_000, b" " * ((64 << 20) + 1)], ids=["deep", "deep list", "big"]
)
@pytest.mark.parametrize("reader", ["audit", "inspect", "list", "pretrain", "finetune"])
def test_deep_or_oversized_cards_are_refused(reader: str, raw: bytes, chain: Chain, mwm, tmp_path: Path) -> None:
    for artifact in ("regions", "encoder"):
        (chain.out / artifact / CARD).write_bytes(raw)
    command = {
        "audit": ["audit", chain.out],
        "inspect": ["inspect", chain.out / "encoder"],
        "list": ["list", chain.out],
        "pretrain": pretrain(chain, tmp_path / "e"),
        "finetune": finetune(chain, tmp_path / "m"),
    }[reader]
    code, out, err = mwm(*command)
    assert code == (0 if reader == "list" else 4), err
    assert CARD in out + err or reader == "list"


def test_a_deep_run_folder_is_one_clear_line(chain: Chain, mwm) -> None:
    (chain.out / "encoder" / CARD).unlink()
    for raw in (b'{"a":' * 100_000, b"", b"[1]"):
        (chain.out / "encoder" / "run" / "spec.json").write_bytes(raw)
        code, _, err = mwm(*pretrain(chain, chain.out / "encoder"))
        assert code == 4, err
        assert "run/spec.json" in err


@pytest.mark.parametrize("reader", ["audit", "pretrain"])
def test_zip_stores_are_refused(reader: str, chain: Chain, mwm, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "regions"), "zip", chain.out / "regions")
    shutil.rmtree(chain.out / "regions")
    shutil.move(archive, chain.out / "regions")
    command = ["audit", chain.out / "regions"] if reader == "audit" else pretrain(chain, tmp_path / "e")
    code, _, err = mwm(*command)
    assert code in (2, 5)
    assert "error[" in err


def test_one_image_in_train_and_test_is_warned_of_and_counted(chain: Chain, mwm, tmp_path: Path) -> None:
    """Under two patients' names: groups cannot tell, the bytes do."""
    shutil.copy(chain.images / "p00.png", chain.images / "p10.png")
    shutil.copy(chain.images / "p03.png", chain.images / "p11.png")
    said = "2 of 4 test samples are, byte for byte, files that train has too ('p10.png' = 'p00.png')"
    code, out, err = mwm(*finetune(chain, tmp_path / "m", "--dry-run"))
    assert code == 0
    assert said in out + err
    code, _, err = mwm(*finetune(chain, tmp_path / "m"))
    assert code == 0
    assert f"warning: {said}" in err
    page = (tmp_path / "m" / "report.html").read_text()
    assert "byte for byte, files that train has too" in page
