"""transformers' GroundingDINO: the published function, once each encoder, boxes in the image's own frame."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import ConfigError, CorruptError, InputMissingError, PromptError
from stage1_localize.contracts import Batch, Detections, Region
from stage1_localize.grounders.dino_images import gather
from stage1_localize.grounders.dino_locate import DinoOptions, read_answer
from stage1_localize.grounders.dino_words import Prompt, Span
from stage1_localize.grounders.grounding_dino import GroundingDino
from tests.stage1_localize.grounders.tiny_grounding_dino import QUERIES, SIDE_PX, build_native

REGIONS = [Region("a", ("brain",)), Region("b", ("left lung", "brain"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("native")
    build_native(made)
    return made


@pytest.fixture(scope="module")
def grounder(folder: Path) -> GroundingDino:
    return build(folder)


def build(folder: Path, **options: Any) -> GroundingDino:
    return GroundingDino(GroundingDino.Options(model=str(folder), **{"size_px": SIDE_PX, **options}))


def noise(height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((channels, height, width), np.float32)


def near(one: Detections, other: Detections, tolerance: float) -> bool:
    """Equal but for the order of boxes whose scores are that close."""
    if len(one) != len(other) or not np.array_equal(one.region, other.region):
        return False
    if not len(one):
        return True
    rows = [np.column_stack([each.region, each.text, each.box_xyxy_px, each.score]) for each in (one, other)]
    distance = np.abs(rows[0][:, None] - rows[1][None]).max(axis=2)
    return bool((distance.min(axis=0) < tolerance).all() and (distance.min(axis=1) < tolerance).all())


def test_one_prompt_gives_what_the_released_classes_give(folder: Path, grounder: GroundingDino) -> None:
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoImageProcessor
    from transformers import GroundingDinoProcessor as Processor

    image = noise(120, 90)
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    model.model.special_tokens = torch.tensor([2, 3, 5, 6])
    processor = Processor(GroundingDinoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    (call,) = gather([image], grounder._how, batch=1, strides=(8,), cells_min=1)
    with torch.inference_mode():
        out = model(call.pixels, **processor.tokenizer(["left lung ."], return_tensors="pt"))
    (said,) = processor.post_process_grounded_object_detection(out, threshold=0.0, target_sizes=[(120, 90)])
    (prompt,) = grounder._prompts([Region("x", ("left lung",))])
    with torch.inference_mode():
        logits, boxes = grounder._network.ask(grounder._network.see(call.pixels), prompt)
    assert torch.equal(out.pred_boxes, boxes)
    assert torch.equal(out.logits[..., :5], logits)
    (found,) = read_answer(logits[0], boxes[0], prompt, DinoOptions(box_min_milli=1, boxes_max=900), 120, 90)
    limit = torch.tensor([90, 120, 90, 120])
    published = said["boxes"].clamp(min=0).minimum(limit).numpy()
    distance = np.abs(found[0][:, None] - published[None]).max(axis=2)
    assert len(found[0]) > QUERIES // 2
    assert (distance.min(axis=1) < 1e-3).all()


def test_boxes_lie_in_the_image_and_in_its_frame() -> None:
    # Four queries for an image of 200 x 100 px: inside, over the edge, thinner than the store keeps, weak.
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.95, 0.05, 0.2, 0.2], [0.5, 0.5, 1e-5, 0.5], [0.5, 0.5, 1, 1]])
    logits = torch.full((4, 7), 9.0)  # delimiters count for nothing
    logits[:, [1, 2, 4]] = torch.tensor([[-9, 0.5, -9], [1.0, -9, 2.0], [5, 5, 5], [-2, -2, -2]])
    prompt = Prompt("left lung . brain .", (2, 1, 1, 5, 1, 5, 3), (Span(0, 0, 1, 3), Span(1, 0, 4, 5)))
    one, other = read_answer(logits, boxes, prompt, DinoOptions(box_min_milli=500, text_min_milli=200), 100, 200)
    assert np.allclose(one[0], [[170, 0, 200, 15], [80, 30, 120, 70]], atol=1e-4)
    assert np.allclose(one[1], 1 / (1 + np.exp([-1.0, -0.5])))
    assert np.allclose(other[0], [[170, 0, 200, 15]], atol=1e-4)
    assert (one[2:], other[2:]) == ((0, 0), (1, 0))
    few = read_answer(logits, boxes, prompt, DinoOptions(boxes_max=1), 100, 200)
    assert [len(found[1]) for found in few] == [1, 1]
    none = read_answer(logits, boxes, prompt, DinoOptions(box_min_milli=900), 100, 200)
    assert [len(found[1]) for found in none] == [0, 0]


def test_an_answer_does_not_depend_on_neighbours_or_other_regions(folder: Path, grounder: GroundingDino) -> None:
    images = [noise(120, 90), noise(120, 90, seed=1), noise(64, 200, 3), np.zeros((1, 50, 50), np.float32)]
    together = grounder.locate(Batch(images), REGIONS)
    assert [len(found) for found in together] == [30, 30, 30, 0]
    for image, found in zip(images, together, strict=True):
        (alone,) = grounder.locate(Batch([image]), REGIONS[1:])
        kept = found.region == 1
        assert np.array_equal(alone.box_xyxy_px, found.box_xyxy_px[kept])
        assert np.array_equal(alone.score, found.score[kept])
        assert np.array_equal(alone.text, found.text[kept])
    batched = build(folder, batch=3).locate(Batch(images), REGIONS)
    assert all(near(a, b, 1e-3) for a, b in zip(together, batched, strict=True))
    again = grounder.locate(Batch(images[:1]), REGIONS)[0]
    assert np.array_equal(together[0].box_xyxy_px, again.box_xyxy_px)


def test_words_decide_and_jointly_they_decide_of_each_other(folder: Path, grounder: GroundingDino) -> None:
    image = noise(120, 90)
    (one,), (other,) = (grounder.locate(Batch([image]), [Region("a", (text,))]) for text in ("brain", "left lung"))
    assert not near(one, other, 1e-2)
    together = build(folder, joint=True, boxes_max=900)
    assert together.identity()["joint"] is True
    assert grounder.identity()["joint"] is False
    (both,) = together.locate(Batch([image]), [Region("a", ("brain",)), Region("b", ("left lung",))])
    (alone,) = together.locate(Batch([image]), [Region("a", ("brain",))])
    assert set(both.region) == {0, 1}
    assert len(alone) != (both.region == 0).sum() or not np.allclose(alone.score, both.score[both.region == 0])


def test_each_encoder_runs_once(folder: Path) -> None:
    grounder = build(folder)
    network = grounder._network
    calls: list[str] = []
    network._backbone.register_forward_hook(lambda *_: calls.append("image"))
    text = network._model.model.text_backbone
    text.bert.register_forward_hook(lambda *_: calls.append("text"))
    batch = Batch([noise(120, 90), noise(64, 64), np.zeros((1, 64, 64), np.float32)])
    for _ in range(2):
        grounder.locate(batch, REGIONS)
    assert (calls.count("image"), calls.count("text")) == (2, 2), "two images, two wordings, asked twice"
    grounder.locate(Batch([noise(70, 80)]), REGIONS)
    assert (calls.count("image"), calls.count("text")) == (3, 2)


def test_too_small_a_size_is_answered_too(folder: Path) -> None:
    (found,) = build(folder, size_px=32).locate(Batch([noise(60, 40)]), REGIONS)
    assert np.isfinite(found.box_xyxy_px).all()
    assert np.isfinite(found.score).all()
    assert len(found)


def test_bfloat16_answers_nearly_the_same(folder: Path, grounder: GroundingDino) -> None:
    half = build(folder, dtype="bfloat16")
    assert "bfloat16" in half.identity()["numeric"]
    (exact,), (found,) = (each.locate(Batch([noise(120, 90)]), REGIONS[:1]) for each in (grounder, half))
    assert found.score.dtype == np.float32
    assert not np.array_equal(exact.score, found.score)
    # A random network forgives little: which weak queries it picks may differ, the strongest boxes may not.
    distance = np.abs(exact.box_xyxy_px[:3, None] - found.box_xyxy_px[None]).max(axis=2).min(axis=1)
    assert distance.max() < 2
    assert np.abs(exact.score[:3] - found.score[:3]).max() < 0.02


def test_the_identity_follows_what_decides_answers(folder: Path, grounder: GroundingDino, tmp_path: Path) -> None:
    identity = grounder.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert build(folder).identity() == identity
    assert build(folder, size_px=128).identity() != identity
    other = tmp_path / "other"
    build_native(other, seed=1)
    assert build(other).identity()["tensors_sha256"] != identity["tensors_sha256"]
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    assert build(copied).identity() == identity, "a folder's place is no part of it"
    (copied / "preprocessor_config.json").write_text("{}")
    assert build(copied).identity() != identity


def test_a_prompt_that_is_too_long_is_refused_before_any_image(grounder: GroundingDino) -> None:
    with pytest.raises(PromptError, match="reads at most 256"):
        grounder.check([Region("x", (" ".join(["lung"] * 300),))])
    grounder.check(REGIONS)
    assert grounder.needs_segmenter(REGIONS)


def test_what_is_wrong_with_a_folder_is_named(folder: Path, tmp_path: Path) -> None:
    def broken(name: str, **files: bytes | None) -> Path:
        made = tmp_path / name
        shutil.copytree(folder, made)
        for file, content in files.items():
            (made / file.replace("_json", ".json").replace("_safetensors", ".safetensors")).unlink()
            if content is not None:
                (made / file.replace("_json", ".json").replace("_safetensors", ".safetensors")).write_bytes(content)
        return made

    whole = (folder / "model.safetensors").read_bytes()
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        build(broken("cut", model_safetensors=whole[: len(whole) // 2]))
    with pytest.raises(InputMissingError, match=r"holds no config\.json"):
        build(broken("bare", config_json=None))
    with pytest.raises(InputMissingError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        build(broken("light", model_safetensors=None))
    with pytest.raises(CorruptError, match=r"config\.json is no JSON object"):
        build(broken("garbled", config_json=b"{"))
    with pytest.raises(ConfigError, match="model_type is 'bert'"):
        build(broken("bert", config_json=b'{"model_type": "bert"}'))
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CorruptError, match=r"model.safetensors lacks \d+ tensors"):
        build(broken("deeper", config_json=json.dumps({**config, "encoder_layers": 3}).encode()))
    with pytest.raises(CorruptError, match=r"model.safetensors (lacks|does not fit)"):
        build(broken("wider", config_json=json.dumps({**config, "num_queries": 31}).encode()))
    with pytest.raises(InputMissingError, match="expected a folder"):
        GroundingDino(GroundingDino.Options(model=str(folder / "model.safetensors")))


def test_offline_without_the_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputMissingError, match="grounding-dino-tiny: not on this disk, and offline") as caught:
        GroundingDino(GroundingDino.Options(offline=True))
    assert "hf download IDEA-Research/grounding-dino-tiny" in str(caught.value.hint)
