"""`mwm export`: what others load is what was published; nothing appears that was not loaded back and found equal."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from pipelines.exportable import Difference, compare
from pipelines.exporters import EXPORTERS, timm_folder
from shared.artifact import read_card
from tests.conftest import ROOT, lacking
from tests.pipelines.exports import GOLDEN, plant_encoder
from tests.pipelines.test_cli import flip, forge

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": (
        "resnet18",
        {"size_px": 64, "output_stride": 16, "layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]},
    ),
    "convnext": (
        "convnext_atto",
        {"size_px": 64, "in_chans": 3, "output_stride": 16, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    ),
    "vit": (
        "vit_tiny_patch16_224",
        {"size_px": 64, "img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, args = CASES[request.param]
    out = tmp_path_factory.mktemp("planted") / "encoder"
    plant_encoder(out, name, **args)
    return out


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden chain."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    return tmp_path / "golden"


def original(artifact: Path) -> tuple[Any, dict[str, Any]]:
    """The model of an artifact by timm alone, and its config."""
    kind = read_card(artifact).identity.kind
    config = json.loads((artifact / kind / "config.json").read_bytes())
    return timm.create_model(f"local-dir:{artifact / kind}", pretrained=True).eval(), config["pretrained_cfg"]


def batch(config: dict[str, Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1], and the same as a model takes them."""
    pixels = torch.rand(count, *config["input_size"], generator=torch.Generator().manual_seed(count))
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    return pixels, (pixels - mean) / std


def onnx_session(folder: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.fixture
def needs_onnx() -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(name) is None:
            lacking(f"{name} not installed: pip install -e '.[onnx]'")


def test_every_exporter_is_listed_and_in_the_help(mwm) -> None:
    code, out, _ = mwm("list", "exporters")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["huggingface", "onnx", "timm"]
    assert all(callable(EXPORTERS.load(name)) for name in EXPORTERS)
    code, out, _ = mwm("export", "--help")
    assert code == 0
    assert all(name in out for name in EXPORTERS)


def test_timm_gives_the_same_bits(encoder: Path, tmp_path: Path, mwm) -> None:
    code, out, _ = mwm("export", encoder, "--to", "timm", "--out", tmp_path / "x")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["made", "where", "digest", "compared", "next"]
    assert "features to the bit; embedding to the bit" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model, config = original(encoder)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    _, image = batch(config, 2)
    with torch.inference_mode():
        assert torch.equal(theirs(image), model(image))
    squash = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs)).transforms[0]
    assert squash.size == (64, 64) or list(squash.size) == [64, 64]  # rows and columns: nothing is cut off


def test_transformers_gives_the_same_bits(encoder: Path, tmp_path: Path, mwm) -> None:
    from transformers import AutoImageProcessor, AutoModel

    code, out, err = mwm("export", encoder, "--to", "huggingface", "--out", tmp_path / "x")
    assert code == 0
    assert "input to the bit" in out
    assert "Loading weights" not in err
    model, config = original(encoder)
    _, image = batch(config, 2)
    theirs = AutoModel.from_pretrained(tmp_path / "x").eval()
    with torch.inference_mode():
        given = theirs(image)
        assert torch.equal(given.last_hidden_state, model.forward_features(image))
        assert torch.equal(given.pooler_output, model(image))
    wide = Image.fromarray(np.arange(90 * 60, dtype=np.uint8).reshape(60, 90))
    wide = wide if config["input_size"][0] == 1 else wide.convert("RGB")
    read = AutoImageProcessor.from_pretrained(tmp_path / "x")(wide)["pixel_values"]
    assert tuple(read.shape) == (1, *config["input_size"])


@pytest.mark.slow
def test_onnxruntime_agrees_for_any_number_of_images(needs_onnx, encoder: Path, tmp_path: Path, mwm) -> None:
    import onnx

    code, _, err = mwm("export", encoder, "--to", "onnx", "--out", tmp_path / "x")
    assert code == 0, err
    model, config = original(encoder)
    session = onnx_session(tmp_path / "x")
    side = config["input_size"][1] // 16
    for count in (1, 2, 5):
        pixels, image = batch(config, count)
        features, embedding = session.run(["features", "embedding"], {"pixels": pixels.numpy()})
        with torch.inference_mode():
            expected, last = model(image), model.forward_features(image)
        if last.ndim == 3:  # tokens: the class token first, then the patches row by row
            last = last[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        assert features.shape == tuple(last.shape)
        for found, wanted in ((features, last), (embedding, expected)):
            assert np.abs(found - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()
    file = onnx.load(tmp_path / "x" / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    props = {item.key: item.value for item in file.metadata_props}
    assert props["mwm.artifact"] == f"encoder sha256:{read_card(encoder).artifact_id}"
    assert json.loads(props["mwm.mean"]) == config["mean"]
    assert "pixels in [0, 1]" in props["mwm.input"]
    assert "Not for diagnosis" in props["mwm.notice"]
    raw = (tmp_path / "x" / "model.onnx").read_bytes()
    for needle in (os.path.dirname(torch.__file__), str(ROOT), str(tmp_path), "stack_trace", ".py"):
        assert needle.encode() not in raw
    assert mwm("export", encoder, "--to", "onnx", "--out", tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / "model.onnx").read_bytes() == raw


@pytest.mark.slow
def test_a_model_keeps_its_classes_everywhere(needs_onnx, tmp_path: Path, mwm) -> None:
    from transformers import AutoModelForImageClassification

    for to in EXPORTERS:
        code, _, err = mwm("export", GOLDEN / "model", "--to", to, "--out", tmp_path / to)
        assert code == 0, err
    model, config = original(GOLDEN / "model")
    pixels, image = batch(config, 2)
    with torch.inference_mode():
        logits = model(image)
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(image), logits)
        theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "huggingface").eval()
        assert torch.equal(theirs(image).logits, logits)
    assert theirs.config.id2label == {0: "large", 1: "small"}
    session = onnx_session(tmp_path / "onnx")
    probabilities, found, embedding = session.run(None, {"pixels": pixels.numpy()})
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-6)
    np.testing.assert_allclose(probabilities, logits.softmax(1).numpy(), atol=1e-6)
    assert embedding.shape == (2, model.num_features)
    assert json.loads(session.get_modelmeta().custom_metadata_map["mwm.classes"]) == ["large", "small"]


def test_a_mismatch_is_drift_and_nothing_appears(golden: Path, mwm, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = timm_folder.write_timm

    def careless(source: Any, folder: Path) -> None:
        honest(source, folder)
        tensors = {name: value.copy() for name, value in load_file(folder / "model.safetensors").items()}
        tensors["layer4.0.bn2.bias"][0] += 1e-6
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr("pipelines.exporters.timm_folder.write_timm", careless)
    monkeypatch.setattr("pipelines.exporters.hub_folder.write_timm", careless)
    for to in ("timm", "huggingface"):
        code, out, err = mwm("export", golden / "encoder", "--to", to, "--out", golden / "x")
        assert (code, out) == (3, "")
        assert "error[drift]" in err
        assert "features differs" in err
    assert sorted(path.name for path in golden.iterdir()) == sorted(path.name for path in GOLDEN.iterdir())


@pytest.mark.slow
def test_an_onnx_file_that_computes_something_else_is_drift(
    needs_onnx, golden: Path, mwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.exporters import onnx_file

    honest = onnx_file._serialised

    def careless(source: Any) -> bytes:
        with torch.no_grad():
            source.model.conv1.weight.mul_(1.01)
        raw = honest(source)
        with torch.no_grad():
            source.model.conv1.weight.div_(1.01)
        return raw

    monkeypatch.setattr("pipelines.exporters.onnx_file._serialised", careless)
    code, _, err = mwm("export", golden / "encoder", "--to", "onnx", "--out", golden / "x")
    assert code == 3
    assert "error[drift]" in err
    assert not (golden / "x").exists()


def test_what_is_not_finite_or_of_another_shape_is_never_equal() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert not compare({"a": nan}, {"a": nan}, relative=1.0)[0].accepted
    assert not compare({"a": torch.ones(2)}, {"a": torch.ones(1)}, relative=1.0)[0].accepted
    assert compare({"a": torch.ones(2)}, {"a": torch.ones(2)})[0].accepted
    assert not compare({"a": torch.ones(2)}, {"a": torch.ones(2) + 1e-6})[0].accepted
    assert str(Difference("a", 0.0, 1.0, 0.0)) == "a to the bit"


def test_what_cannot_be_exported_is_one_clear_line(golden: Path, mwm) -> None:
    def refused(code: int, kind: str, told: str, *arguments: object, out: Path = golden / "x") -> None:
        found, said, err = mwm("export", *arguments, "--out", out)
        assert (found, said) == (code, ""), err
        assert f"error[{kind}]" in err
        assert told in err
        assert not (golden / "x").exists()

    encoder = golden / "encoder"
    refused(5, "incompatible", "expected kind 'encoder' or 'model'", golden / "regions", "--to", "timm")
    refused(5, "incompatible", "it holds one", golden, "--to", "timm")
    refused(5, "incompatible", "pinned", f"{encoder}@sha256:{'0' * 16}", "--to", "timm")
    refused(2, "missing-input", "no such", golden / "nowhere", "--to", "timm")
    refused(2, "config", "Did you mean 'onnx'?", encoder, "--to", "onxx")
    refused(2, "usage", "a file, expected the folder", encoder / "artifact.json", "--to", "timm")
    refused(2, "usage", "not empty", encoder, "--to", "timm", out=golden / "model" / ".." / "regions")
    refused(2, "usage", "lies inside the published artifact", encoder, "--to", "timm", out=encoder / "x")
    (golden / "file").write_text("")
    refused(2, "usage", "a file, expected a folder", encoder, "--to", "timm", out=golden / "file")
    plant_encoder(golden / "other", "resnet18", size_px=32, layers=[1, 1, 1, 1], channels=[8, 8, 8, 8])
    refused(5, "incompatible", "found kind 'encoder'", encoder, "--to", "timm", "--regions", golden / "other")


@pytest.mark.parametrize("kind", ["encoder", "model"])
def test_a_damaged_artifact_is_not_exported(golden: Path, mwm, kind: str) -> None:
    artifact = golden / kind
    for name in ("config.json", "model.safetensors"):
        flip(artifact / kind / name)
        code, _, err = mwm("export", artifact, "--to", "timm", "--out", golden / "x")
        assert code == 4
        assert f"{kind}/{name}: changed" in err
        flip(artifact / kind / name)
    (artifact / kind / "more.json").write_text("{}")
    code, _, err = mwm("export", artifact, "--to", "timm", "--out", golden / "x")
    assert code == 4
    assert "not listed" in err
    (artifact / kind / "more.json").unlink()
    tensors = {name: value.copy() for name, value in load_file(artifact / kind / "model.safetensors").items()}
    tensors["conv1.weight"] += 1
    save_file(tensors, artifact / kind / "model.safetensors")
    forge(artifact, f"{kind}/model.safetensors")
    code, _, err = mwm("export", artifact, "--to", "timm", "--out", golden / "x")
    assert code == 4
    assert "other weights" in err
    assert not (golden / "x").exists()


def test_a_full_disk_exits_75_and_leaves_nothing(golden: Path, mwm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pipelines.exporters.timm_folder.write_atomic", full)
        code, _, err = mwm("export", golden / "encoder", "--to", "timm", "--out", golden / "x")
        assert code == 75
        assert "error[disk-full]" in err
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 100))
        code, _, err = mwm("export", golden / "encoder", "--to", "timm", "--out", golden / "x")
        assert code == 75
        assert "100 are free" in err
    assert sorted(path.name for path in golden.iterdir()) == sorted(path.name for path in GOLDEN.iterdir())
    assert mwm("export", golden / "encoder", "--to", "timm", "--out", golden / "x")[0] == 0


def test_a_kill_leaves_nothing_that_looks_whole_and_the_same_command_begins_anew(golden: Path, mwm) -> None:
    code = (
        "import os, signal, sys\n"
        "from pipelines.exporters import timm_folder\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "timm_folder.compare = die\n"  # all is written, nothing is compared
        "from pipelines.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["export", str(golden / "encoder"), "--to", "timm", "--out", str(golden / "x")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (golden / "x").exists()
    left = set(golden.iterdir()) - {golden / path.name for path in GOLDEN.iterdir()}
    assert [path.name for path in left] == [".x.export"]
    (golden / "x").mkdir()  # an empty folder is as good as none
    assert mwm(*arguments)[0] == 0
    assert not (golden / ".x.export").exists()
    assert (golden / "x" / "README.md").is_file()


def test_an_export_says_what_to_install(golden: Path, mwm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "onnxscript" else object())
    code, _, err = mwm("export", golden / "encoder", "--to", "onnx", "--out", golden / "x")
    assert code == 2
    assert "onnxscript not installed" in err
    assert "mask-what-matters[onnx]" in err


@pytest.mark.slow
def test_what_has_no_onnx_form_is_the_users_to_know(
    needs_onnx, golden: Path, mwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    from timm.models.resnet import ResNet

    def opaque(self: Any, image: torch.Tensor, **_: Any) -> Any:
        raise RuntimeError("an operation of its own")

    monkeypatch.setattr(ResNet, "forward_intermediates", opaque)
    code, out, err = mwm("export", golden / "encoder", "--to", "onnx", "--out", golden / "x")
    assert (code, out) == (2, "")
    assert "cannot write 'resnet18' as ONNX: an operation of its own" in err
    assert len(err.splitlines()) == 1
    assert not (golden / "x").exists()
