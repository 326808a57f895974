"""The original package beside transformers' class, on the same random weights, through both loaders."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import ConfigError, CorruptError, IncompatibleError, InputMissingError
from shared.images import Source, find_sources, read_image
from stage1_localize.contracts import Batch, Region
from stage1_localize.grounders import groundingdino_py
from stage1_localize.grounders.dino_images import gather
from stage1_localize.grounders.grounding_dino import GroundingDino
from stage1_localize.grounders.groundingdino_py import PACKAGED, GroundingDinoPy, read_config
from tests.stage1_localize.grounders.tiny_grounding_dino import LEGACY_CONFIG, build_legacy, build_native

REGIONS = [Region("a", ("brain",)), Region("b", ("left lung", "white blood cell"))]
TOLERANCE = 1e-4
"""Of scores, and of boxes as shares of the image's sides."""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return build_legacy(tmp_path_factory.mktemp("legacy"))


@pytest.fixture(scope="module")
def legacy(options: dict[str, Any]) -> GroundingDinoPy:
    return GroundingDinoPy(GroundingDinoPy.Options(**options))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> GroundingDino:
    return GroundingDino(GroundingDino.Options(**build_native(tmp_path_factory.mktemp("native"))))


def noise(height: int, width: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).random((channels, height, width), np.float32)


def compare(native: GroundingDino, legacy: GroundingDinoPy, image: np.ndarray, regions: list[Region]) -> None:
    """Every query of every prompt, before any threshold."""
    strides, queries = native._network.strides, native._network.num_queries
    assert (legacy._network.strides, legacy._network.num_queries) == (strides, queries)
    (call,) = gather([image], native._how, batch=1, strides=strides, cells_min=queries)
    prompts = native._prompts(regions)
    assert prompts == legacy._prompts(regions)
    with torch.inference_mode():
        seen = [each._network.see(call.pixels) for each in (native, legacy)]
        for prompt in prompts:
            logits, boxes = native._network.ask(seen[0], prompt)
            logits_py, boxes_py = legacy._network.ask(seen[1], prompt)
            assert logits.shape == logits_py.shape
            assert boxes.std() > 0.05, "boxes differ from each other, or the comparison says little"
            assert (logits.sigmoid() - logits_py.sigmoid()).abs().max() < TOLERANCE
            assert (boxes - boxes_py).abs().max() < TOLERANCE


@pytest.mark.parametrize("shape", [(480, 480, 3), (120, 90, 1), (64, 200, 1), (12, 300, 1), (40, 40, 1)])
def test_both_packages_compute_the_same_function(
    native: GroundingDino, legacy: GroundingDinoPy, shape: tuple[int, int, int]
) -> None:
    compare(native, legacy, noise(*shape), REGIONS)


def test_they_agree_on_several_phrases_in_one_prompt(
    tmp_path: Path,
) -> None:
    small = {"joint": True, "size_px": 32}
    one = GroundingDino(GroundingDino.Options(**{**build_native(tmp_path / "n"), **small}))
    other = GroundingDinoPy(GroundingDinoPy.Options(**{**build_legacy(tmp_path / "l"), **small}))
    image = noise(50, 50)
    compare(one, other, image, REGIONS)


def test_they_agree_on_a_real_image(native: GroundingDino, legacy: GroundingDinoPy, test_data: Path) -> None:
    source: Source = next(iter(find_sources(test_data / "brain4")))
    image = read_image(source).pixels
    compare(native, legacy, image, REGIONS)
    (found,), (found_py,) = (each.locate(Batch([image]), REGIONS) for each in (native, legacy))
    assert len(found) == len(found_py) > 0
    assert np.abs(found.score - found_py.score).max() < TOLERANCE
    assert np.array_equal(found.region, found_py.region)


def test_each_encoder_runs_once_and_an_answer_is_its_own(legacy: GroundingDinoPy) -> None:
    calls: list[str] = []
    hooks = [
        legacy._network._backbone.register_forward_hook(lambda *_: calls.append("image")),
        legacy._network._model.bert.bert.register_forward_hook(lambda *_: calls.append("text")),
    ]
    batch = Batch([noise(100, 70), noise(64, 64, 3), np.ones((1, 30, 30), np.float32)])
    asked = [Region("a", ("nodule",)), Region("b", ("right lung",))]
    both = legacy.locate(batch, asked)
    legacy.locate(batch, asked)
    assert (calls.count("image"), calls.count("text")) == (2, 2)
    assert len(both[2]) == 0
    (alone,) = legacy.locate(Batch([batch.images[0]]), asked[1:])
    assert np.array_equal(alone.box_xyxy_px, both[0].box_xyxy_px[both[0].region == 1])
    for hook in hooks:
        hook.remove()


def test_the_packages_own_configurations_are_read(options: dict[str, Any]) -> None:
    for name in PACKAGED:
        config = read_config(groundingdino_py._config_file(name))
        assert config["num_queries"] == 900
        assert config["backbone"].startswith("swin_")


@pytest.mark.parametrize("line", ["import os", "a = open('x')", "a = b = 1", "a: int = 1", "f()", "a.b = 1"])
def test_a_configuration_is_read_and_never_run(tmp_path: Path, line: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(f"{LEGACY_CONFIG}\n{line}\n")
    with pytest.raises(ConfigError, match=r"config.py, line \d+: expected 'name = literal'"):
        read_config(path)
    path.write_text("a = (")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(path)


def test_what_is_wrong_with_the_files_is_named(options: dict[str, Any], tmp_path: Path) -> None:
    def build(**changed: Any) -> GroundingDinoPy:
        return GroundingDinoPy(GroundingDinoPy.Options(**{**options, **changed}))

    def config(old: str, new: str) -> str:
        assert old in LEGACY_CONFIG
        (tmp_path / "changed.py").write_text(LEGACY_CONFIG.replace(old, new))
        return str(tmp_path / "changed.py")

    whole = Path(options["model"]).read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError, match=r"cut\.pth"):
        build(model=str(cut))
    with pytest.raises(CorruptError, match=r"weights.pth: lack \d+ tensors"):
        build(config=config("enc_layers = 2", "enc_layers = 3"))
    with pytest.raises(CorruptError, match=r"weights\.pth: other shapes"):
        build(config=config("num_queries = 30", "num_queries = 31"))
    with pytest.raises(ConfigError, match="builds no model"):
        build(config=config("nheads = 4\n", ""))
    with pytest.raises(ConfigError, match="backbone 'resnet50'"):
        build(config=config("backbone = {", "backbone = 'resnet50'; old = {"))
    with pytest.raises(InputMissingError, match="none of SwinT_OGC"):
        build(config="SwinX")
    with pytest.raises(InputMissingError, match=r"holds no config\.json"):
        build(text_model=str(tmp_path))
    with pytest.raises(InputMissingError, match="holds 0 weights files"):
        build(model=options["text_model"])
    garbled = tmp_path / "text"
    garbled.mkdir()
    for file in Path(options["text_model"]).iterdir():
        (garbled / file.name).write_bytes(file.read_bytes())
    (garbled / "config.json").write_text("{")
    with pytest.raises(CorruptError, match=r"config\.json"):
        build(text_model=str(garbled))


def test_a_machine_without_libgl_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoGraphics:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "groundingdino.models.GroundingDINO.groundingdino":
                raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")

    for name in [name for name in sys.modules if name.startswith("groundingdino.models")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoGraphics(), *sys.meta_path])
    with pytest.raises(IncompatibleError, match="cannot be imported") as caught:
        groundingdino_py._import_package()
    assert "libgl1" in str(caught.value.hint)


def test_paths_travel_and_places_do_not_count(options: dict[str, Any], legacy: GroundingDinoPy, tmp_path: Path) -> None:
    here = Path.cwd()
    relative = {name: os.path.relpath(options[name], here) for name in ("model", "config", "text_model")}
    sent = GroundingDinoPy.Options(**{**options, **relative}).anywhere()
    assert all(Path(getattr(sent, name)).is_absolute() for name in relative)
    assert GroundingDinoPy(sent).identity() == legacy.identity()
    assert GroundingDinoPy.Options(config="SwinT_OGC").anywhere().config == "SwinT_OGC"
    identity = legacy.identity()
    assert json.loads(json.dumps(identity)) == identity


def test_the_package_is_left_as_it_was(legacy: GroundingDinoPy) -> None:
    module = groundingdino_py._import_package().model
    assert module.BertModelWarper.__name__ == "BertModelWarper"
    assert module.get_tokenlizer.__name__ == "groundingdino.util.get_tokenlizer"
