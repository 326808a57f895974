"""SAM 3: words in, instances out; a wording depends on nothing but the image; refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import digest
from shared.errors import CorruptError, IncompatibleError, InputMissingError, PromptError
from stage1_localize.config import PartConfig
from stage1_localize.contracts import Batch, Region
from stage1_localize.frames import squashed
from stage1_localize.grounders.sam3 import Sam3, in_image
from stage1_localize.parts import build_parts
from tests.stage1_localize.grounders.tiny_sam3 import SIZE_PX, build_sam3
from tests.stage1_localize.segmenters.tiny_sam import build_sam

LUNG, TUMOUR = Region("lung", ("left lung", "heart")), Region("tumour", ("tumour",))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return build_sam3(tmp_path_factory.mktemp("sam3"))


def build(options: dict[str, Any], **more: Any) -> Sam3:
    return Sam3(Sam3.Options(**{**options, "score_min_milli": 0, **more}))


def image(height: int = 50, width: int = 80, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((channels, height, width)).astype(np.float32)


def test_every_instance_has_a_box_a_score_and_pixels(options):
    batch = Batch([image(), image(30, 90, 3), np.full((1, 64, 64), 0.5, np.float32)])
    *found, nothing = build(options).locate(batch, [LUNG, TUMOUR])
    assert len(nothing) == 0
    for picture, each in zip(batch.images, found, strict=False):
        assert len(each) == 18
        sides = [picture.shape[2], picture.shape[1]] * 2
        assert (each.box_xyxy_px >= 0).all()
        assert (each.box_xyxy_px <= sides).all()
        assert (each.box_xyxy_px[:, 2:] > each.box_xyxy_px[:, :2]).all()
        assert ((each.score > 0) & (each.score <= 1)).all()
        assert sorted(set(zip(each.region.tolist(), each.text.tolist(), strict=True))) == [(0, 0), (0, 1), (1, 0)]
        for own in each.probability:
            assert own.shape == (256, 256)
            assert own.dtype == np.float32
            assert 0 <= own.min() < own.max() <= 1
    assert len({own.tobytes() for own in found[0].probability}) == 18


def test_a_wording_answers_alone_as_among_others_and_neighbours(options):
    grounder = build(options)
    together = grounder.locate(Batch([image(), image(seed=3)]), [LUNG, TUMOUR])[1]
    alone = build(options).locate(Batch([image(seed=3)]), [TUMOUR])[0]
    rows = np.flatnonzero(together.region == 1)
    assert np.array_equal(together.box_xyxy_px[rows], alone.box_xyxy_px)
    assert np.array_equal(together.score[rows], alone.score)
    assert all(np.array_equal(together.probability[i], own) for i, own in zip(rows, alone.probability, strict=True))
    lung = np.flatnonzero((together.region == 0) & (together.text == 0))
    assert not np.array_equal(together.score[lung], alone.score), "the words were not read"


def test_text_is_encoded_once_a_wording_and_an_image_once(options, monkeypatch):
    grounder = build(options)
    seen: list[str] = []
    for name in ("vision_encoder", "text_encoder"):
        module = getattr(grounder._model, name)
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    asked = [LUNG, TUMOUR, Region("again", ("heart",))]
    grounder.locate(Batch([image(), image(seed=1)]), asked)
    grounder.locate(Batch([image(seed=2)]), asked)
    assert seen.count("vision_encoder") == 3
    assert seen.count("text_encoder") == 3


def test_answers_are_those_of_the_published_route(options):
    """Processor, model and post-processing of transformers on the same image and words."""
    from transformers import AutoTokenizer, Sam3ImageProcessor, Sam3Model

    folder = options["model"]
    processor = Sam3ImageProcessor(size={"height": SIZE_PX, "width": SIZE_PX})
    grey = np.round(image(40, 70, 3) * 255).astype(np.float32)
    pixels = processor(torch.from_numpy(grey), return_tensors="pt")["pixel_values"]
    tokens = AutoTokenizer.from_pretrained(folder)(
        "left lung", padding="max_length", max_length=24, return_tensors="pt"
    )
    with torch.inference_mode():
        model = Sam3Model.from_pretrained(folder).eval()
        said = model(pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    (published,) = processor.post_process_instance_segmentation(said, threshold=0.0, target_sizes=[(40, 70)])
    found = build(options).locate(Batch([grey / 255]), [Region("lung", ("left lung",))])[0]
    order = torch.argsort(-published["scores"], stable=True)
    sides = torch.tensor([70.0, 40, 70, 40])
    np.testing.assert_allclose(found.score, published["scores"][order], atol=1e-4)
    np.testing.assert_allclose(found.box_xyxy_px, published["boxes"][order].clamp(torch.zeros(4), sides), atol=1e-2)
    maps = torch.nn.functional.interpolate(said.pred_masks[:, order], (256, 256), mode="bilinear").sigmoid()[0]
    np.testing.assert_allclose(np.stack(found.probability), maps, atol=1e-3)


def test_weak_instances_and_those_beyond_the_limit_are_left_out(options):
    everything = build(options).locate(Batch([image()]), [TUMOUR])[0]
    assert (np.diff(everything.score) <= 0).all()
    limit = int(np.median(everything.score) * 1000)
    some = build(options, score_min_milli=limit).locate(Batch([image()]), [TUMOUR])[0]
    assert 0 < len(some) < len(everything)
    assert some.score.min() * 1000 >= limit
    few = build(options, boxes_max=2).locate(Batch([image()]), [TUMOUR])[0]
    assert np.array_equal(few.score, everything.score[:2])


def test_boxes_are_cut_at_the_edges():
    boxes = in_image(np.array([[-0.2, 0.25, 1.2, 0.5]], np.float32), squashed(40, 80, 56))
    assert boxes.tolist() == [[0, 10, 80, 20]]


def test_it_needs_no_segmenter_and_refuses_what_it_cannot_read(options):
    config = PartConfig(name="sam3", options=options)
    build_parts(config, PartConfig(name="none"), [LUNG])
    with pytest.raises(PromptError, match="makes 42 tokens, the text encoder reads 24"):
        build_parts(config, PartConfig(name="none"), [Region("long", ("a" * 40,))])
    with pytest.raises(PromptError, match="holds no word"):
        build(options).check([Region("empty", (" ",))])


def test_identity_pins_words_too_and_has_no_float(options, tmp_path):
    identity = build(options).identity()
    digest(identity)
    assert {"config.json", "tokenizer.json"} <= set(identity["files_sha256"])
    assert build(options, dtype="bfloat16").identity() != identity
    rough = build(options, dtype="bfloat16").locate(Batch([image()]), [TUMOUR])[0]
    assert all(np.isfinite(own).all() for own in rough.probability)


def test_the_detector_of_a_video_release_is_the_same_model(options, tmp_path):
    from safetensors.torch import load_file, save_file

    source = Path(options["model"])
    said = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam3_video", "detector_config": said}))
    tensors = load_file(source / "model.safetensors")
    video = {f"detector_model.{key}": value for key, value in tensors.items()}
    save_file({**video, "tracker_model.more": torch.zeros(1)}, tmp_path / "model.safetensors")
    for file in source.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    there, here = build({"model": str(tmp_path)}), build(options)
    assert there.identity()["tensors_sha256"] == here.identity()["tensors_sha256"]


def test_folders_that_lack_something(options, tmp_path):
    with pytest.raises(InputMissingError, match=r"config\.json"):
        build({"model": str(tmp_path)})
    with pytest.raises(IncompatibleError, match="'sam', expected 'sam3' or 'sam3_video'"):
        build(build_sam(tmp_path / "sam"))
    with pytest.raises(InputMissingError, match="offline was asked"):
        build({"model": "nobody/no-such-model", "offline": True})
    source = Path(options["model"])
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    with pytest.raises(InputMissingError, match=r"no tokenizer\.json and no vocab\.json"):
        build({"model": str(tmp_path)})
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptError, match="no tokenizer can be read"):
        build({"model": str(tmp_path)})
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        build({"model": str(tmp_path)})
