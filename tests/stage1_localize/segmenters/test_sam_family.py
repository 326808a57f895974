"""Every segmenter of the SAM family: preprocessing, independence of a box, shared embeddings, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.config import digest
from shared.errors import ConfigError, CorruptError, IncompatibleError, InputMissingError
from stage1_localize.contracts import Batch, Detections
from stage1_localize.frames import letterboxed, squashed, to_map_frame
from stage1_localize.segmenters import SEGMENTERS
from stage1_localize.segmenters.sam import Sam
from stage1_localize.segmenters.sam2 import Sam2
from stage1_localize.segmenters.sam_boxes import Preprocessing, best_of, medsam_preprocessing, prepare
from stage1_localize.segmenters.segment_anything import SegmentAnything
from tests.stage1_localize.segmenters.tiny_sam import build_sam, build_sam2, build_segment_anything

BUILD: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "sam": ("sam", build_sam),
    "sam_hq": ("sam", lambda folder: build_sam(folder, hq=True)),
    "sam2": ("sam2", build_sam2),
    "segment_anything": ("segment_anything", build_segment_anything),
}
BOXES = ((5, 4, 40, 30), (20, 10, 79, 50), (0, 0, 80, 50), (50, 20, 60, 28), (1, 30, 20, 49))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, (_, build) in BUILD.items()}


def part(folders: dict[str, dict[str, Any]], name: str, **options: Any) -> Any:
    loaded = SEGMENTERS.load(BUILD[name][0])
    return loaded(loaded.Options(**folders[name], **options))


def boxes(*rows: tuple[float, float, float, float]) -> Detections:
    n = len(rows)
    zeros = np.zeros(n, np.int64)
    return Detections(np.array(rows, np.float32).reshape(n, 4), np.ones(n, np.float32), zeros, zeros, [None] * n)


def image(height: int = 50, width: int = 80, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((channels, height, width)).astype(np.float32)


@pytest.mark.parametrize("name", BUILD)
def test_probabilities_in_the_map_frame_for_every_image_and_box(folders, name):
    batch = Batch([image(), image(30, 30, 3), np.full((1, 64, 64), 0.5, np.float32), np.zeros((3, 9, 1), np.float32)])
    segments = part(folders, name).segment(batch, [boxes(*BOXES), boxes(), boxes((0, 0, 64, 64)), boxes((0, 0, 1, 9))])
    assert [each.shape for each in segments] == [(5, 256, 256), (0, 256, 256), (1, 256, 256), (1, 256, 256)]
    for each in segments:
        assert each.dtype == np.float32
        assert np.isfinite(each).all()
        assert ((each >= 0) & (each <= 1)).all()
    assert len({each.tobytes() for each in segments[0]}) == 5, "the box was not read"
    assert ((segments[0] > 0.01) & (segments[0] < 0.99)).any(), "probabilities, not booleans"


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", BUILD)
def test_a_box_has_the_same_bits_whatever_else_is_asked(folders, name, size):
    segmenter = part(folders, name, boxes_batch=size)
    together = segmenter.segment(Batch([image()]), [boxes(*BOXES)])[0]
    for box, expected in zip(BOXES, together, strict=True):
        (alone,) = segmenter.segment(Batch([image(seed=5), image()]), [boxes((0, 0, 9, 9)), boxes(box)])[1]
        assert np.array_equal(alone, expected)
    turned = segmenter.segment(Batch([image()]), [boxes(*BOXES[::-1], BOXES[2])])[0]
    assert np.array_equal(turned[:5], together[::-1])
    assert np.array_equal(turned[5], together[2])


@pytest.mark.parametrize("name", BUILD)
def test_boxes_in_one_decoder_call_equal_boxes_one_by_one(folders, name):
    one_by_one = part(folders, name, boxes_batch=1).segment(Batch([image()]), [boxes(*BOXES)])[0]
    at_once = part(folders, name, boxes_batch=8).segment(Batch([image()]), [boxes(*BOXES)])[0]
    np.testing.assert_allclose(at_once, one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BUILD)
def test_images_in_one_encoder_call_equal_images_one_by_one(folders, name):
    batch = Batch([image(), image(60, 20), image(33, 44, 3)])
    asked = [boxes((0, 0, 9, 20)), boxes((0, 0, 9, 20)), boxes((5, 5, 30, 20))]
    alone = part(folders, name).segment(batch, asked)
    together = part(folders, name, images_batch=2).segment(Batch(batch.images), asked)
    np.testing.assert_allclose(np.concatenate(together), np.concatenate(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BUILD)
def test_parts_of_one_model_encode_an_image_once_and_only_where_boxes_are(folders, name, monkeypatch):
    first, second = part(folders, name), part(folders, name, multimask="best", boxes_batch=3)
    calls: list[int] = []
    for each in (first, second):
        whole = each._network.encode
        monkeypatch.setattr(each._network, "encode", lambda pixels, whole=whole: calls.append(1) or whole(pixels))
    batch = Batch([image(), image(30, 30), image(40, 20)])
    asked = [boxes(*BOXES), boxes(), boxes((1, 1, 9, 9))]
    first.segment(batch, asked)
    assert len(calls) == 2
    second.segment(batch, asked)
    assert len(calls) == 2
    second.segment(batch, [boxes(), boxes((3, 3, 20, 20)), boxes()])
    assert len(calls) == 3


@pytest.mark.parametrize("name", BUILD)
def test_best_is_the_mask_of_the_highest_predicted_iou(folders, name):
    single = part(folders, name).segment(Batch([image()]), [boxes(*BOXES)])[0]
    best = part(folders, name, multimask="best").segment(Batch([image()]), [boxes(*BOXES)])[0]
    assert not np.allclose(single, best, atol=1e-3)
    logits = torch.arange(6.0).reshape(2, 3, 1, 1)
    assert best_of(logits, torch.tensor([[0.1, 0.9, 0.9], [0.2, 0.1, 0.3]])).flatten().tolist() == [1, 5]


@pytest.mark.parametrize("name", BUILD)
def test_identity_pins_weights_preprocessing_and_numerics_without_floats(folders, name):
    identity = part(folders, name).identity()
    digest(identity)
    assert len(identity["tensors_sha256"]) == 64
    assert "antialiased by torch" in identity["preprocessing"]
    assert part(folders, name).identity() == identity
    assert part(folders, name, dtype="bfloat16").identity() != identity


@pytest.mark.parametrize("name", BUILD)
def test_bfloat16_casts_the_encoder_alone_and_stays_close(folders, name):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        exact = part(folders, name)._network.encode(pixels)
        rough = part(folders, name, dtype="bfloat16")._network.encode(pixels)
    for one, other in zip(exact, rough, strict=True):
        assert other.dtype == torch.float32, "the decoder is not cast"
        assert not torch.equal(one, other)
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    (segments,) = part(folders, name, dtype="bfloat16").segment(Batch([image()]), [boxes(*BOXES)])
    assert np.isfinite(segments).all()


def test_auto_decodes_box_by_box_on_a_cpu():
    pinned = Sam.Options(device="cpu").pinned()
    assert (pinned.boxes_batch, pinned.dtype) == (1, "float32")
    assert Sam.Options(boxes_batch=7).pinned().boxes_batch == 7
    with pytest.raises(ValueError, match="boxes_batch"):
        Sam.Options(boxes_batch=0)


# Against transformers' processors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(50, 80), (301, 123), (64, 64)])
def test_pixels_are_those_of_the_sam_processor(height, width):
    """In float32 equal; its 8 bit route rounds after resizing, which moves a value by half a grey level."""
    from transformers import SamImageProcessor

    processor = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    grey = np.round(image(height, width, 3) * 255)
    ours = prepare((grey / 255).astype(np.float32), Preprocessing(64, "letterbox"))
    exact = processor(torch.from_numpy(grey.astype(np.float32)), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, exact, atol=1e-4, rtol=0)
    rounded = processor(torch.from_numpy(grey.astype(np.uint8)), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, rounded, atol=0.02, rtol=0)


def test_pixels_are_those_of_the_sam2_processor():
    from transformers import Sam2ImageProcessor

    processor = Sam2ImageProcessor(size={"height": 64, "width": 64})
    grey = np.round(image(90, 41, 3) * 255).astype(np.float32)
    exact = processor(torch.from_numpy(grey), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(prepare(grey / 255, Preprocessing(64, "squash")), exact, atol=1e-4, rtol=0)


def test_a_grey_image_is_three_equal_channels_and_medsam_stretches_it():
    grey = image(20, 40)
    how = Preprocessing(64, "letterbox")
    assert torch.equal(prepare(grey, how), prepare(np.repeat(grey, 3, axis=0), how))
    medsam = medsam_preprocessing(64)
    pixels = prepare(grey * 0.3 + 0.2, medsam)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert not prepare(np.full((1, 5, 5), 0.7, np.float32), medsam).any()


def test_medsam_is_sam_with_other_preprocessing(folders):
    sam, medsam = part(folders, "sam"), part(folders, "sam", preprocessing="medsam")
    assert sam.identity()["tensors_sha256"] == medsam.identity()["tensors_sha256"]
    assert "squash" in medsam.identity()["preprocessing"]
    asked = [boxes(*BOXES)]
    assert not np.allclose(sam.segment(Batch([image()]), asked)[0], medsam.segment(Batch([image()]), asked)[0])


def blobs(cells: int) -> torch.Tensor:
    """Smooth logits with a closed outline, as trained decoders give: three discs, positive inside."""
    rows, columns = torch.meshgrid(torch.arange(cells) / cells, torch.arange(cells) / cells, indexing="ij")
    discs = [(0.2, 0.25, 0.12), (0.3, 0.5, 0.2), (0.15, 0.3, 0.1)]
    return torch.stack([(r - (rows - y).hypot(columns - x)) * 40 for y, x, r in discs])


@pytest.mark.parametrize(("height", "width"), [(300, 512), (512, 300), (683, 1024)])
def test_low_resolution_answers_agree_with_full_resolution_ones(height, width):
    """The published way makes masks of the image's size first; ours never leaves the low resolution."""
    from transformers import Sam2ImageProcessor, SamImageProcessor

    logits = blobs(256)
    tall = logits if width > height else logits.mT
    frame = letterboxed(height, width, 1024)
    (full,) = SamImageProcessor().post_process_masks(
        [tall[None]], [(height, width)], [(frame.height_px, frame.width_px)], binarize=True
    )
    (full2,) = Sam2ImageProcessor().post_process_masks([logits[None]], [(height, width)])
    for values, published, where in ((tall, full, frame), (logits, full2, squashed(height, width, 1024))):
        expected = torch.nn.functional.interpolate(published.float(), (256, 256), mode="area")[0] > 0.5
        found = to_map_frame(values, where).sigmoid() > 0.5
        iou = (found & expected).sum((1, 2)) / (found | expected).sum((1, 2))
        assert (iou >= 0.98).all(), iou


# The original package against transformers ---------------------------------------------------------------------------


@pytest.mark.parametrize("best", [False, True])
def test_the_original_package_equals_transformers_on_the_same_weights(folders, best):
    native, original = part(folders, "sam"), part(folders, "segment_anything")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    asked = torch.tensor([[3.0, 4, 30, 50], [0, 0, 64, 64], [10, 20, 11, 60]])
    with torch.inference_mode():
        ours, theirs = native._network.encode(pixels), original._network.encode(pixels)
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=0)
        assert ours[0].std() > 0.1
        for row in range(2):
            one = native._network.decode((ours[0][row : row + 1],), asked, best)
            other = original._network.decode((theirs[0][row : row + 1],), asked, best)
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
            assert one.std() > 0.1


def test_a_low_resolution_logit_of_sam2_is_the_models_own(folders):
    from transformers import Sam2Model

    model = Sam2Model.from_pretrained(folders["sam2"]["model"]).eval()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    asked = torch.tensor([[3.0, 4, 30, 50], [0, 0, 64, 64]])
    network = part(folders, "sam2")._network
    with torch.inference_mode():
        expected = model(pixel_values=pixels, input_boxes=asked[None], multimask_output=False).pred_masks[0, :, 0]
        torch.testing.assert_close(network.decode(network.encode(pixels), asked, False), expected, atol=1e-5, rtol=0)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_folder_of_another_family_is_named(folders):
    with pytest.raises(IncompatibleError, match=r"'sam2', expected 'sam' or 'sam_hq'"):
        Sam(Sam.Options(**folders["sam2"]))
    with pytest.raises(IncompatibleError, match=r"'sam', expected 'sam2'"):
        Sam2(Sam2.Options(**folders["sam"]))
    with pytest.raises(IncompatibleError, match="a folder of transformers"):
        SegmentAnything(SegmentAnything.Options(**folders["sam"]))


def test_folders_that_lack_something(folders, tmp_path):
    with pytest.raises(InputMissingError, match=r"holds no config\.json"):
        Sam(Sam.Options(model=str(tmp_path)))
    (tmp_path / "config.json").write_bytes((Path(folders["sam"]["model"]) / "config.json").read_bytes())
    with pytest.raises(InputMissingError, match=r"holds no model\.safetensors"):
        Sam(Sam.Options(model=str(tmp_path)))
    with pytest.raises(InputMissingError, match="a file; expected a folder"):
        Sam(Sam.Options(**folders["segment_anything"]))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(InputMissingError, match="1 of them absent"):
        Sam(Sam.Options(model=str(tmp_path)))


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_a_hub_name_while_offline(name):
    loaded = SEGMENTERS.load(name)
    with pytest.raises(InputMissingError, match="offline was asked") as caught:
        loaded(loaded.Options(offline=True, model="nobody/no-such-model"))
    assert "hf download" in str(caught.value.hint)


def test_damaged_weights(folders, tmp_path):
    source = Path(folders["sam"]["model"])
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    whole = (source / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        Sam(Sam.Options(model=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(whole)
    said = json.loads((tmp_path / "config.json").read_text())
    said["vision_config"]["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(CorruptError, match="model"):
        Sam(Sam.Options(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CorruptError, match="no JSON object"):
        Sam(Sam.Options(model=str(tmp_path)))


def test_weights_that_do_not_fill_the_model_are_counted(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    source = Path(folders["sam"]["model"])
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    left = {key: value for key, value in tensors.items() if not key.startswith("mask_decoder.iou")}
    save_file(left, tmp_path / "model.safetensors")
    with pytest.raises(CorruptError, match=rf"lack {len(tensors) - len(left)} tensors .* mask_decoder\.iou"):
        Sam(Sam.Options(model=str(tmp_path)))
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert Sam(Sam.Options(model=str(tmp_path))).identity()["unused_tensors"] == 1


def test_normalisation_comes_from_the_folder(folders, tmp_path):
    source = Path(folders["sam"]["model"])
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((source / file).read_bytes())
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}')
    assert "mean 0.1 0.2 0.3, std 1.0 1.0 2.0" in Sam(Sam.Options(model=str(tmp_path))).identity()["preprocessing"]
    path.write_text('{"image_mean": [0.1], "image_std": [1, 1, 0]}')
    with pytest.raises(CorruptError, match="expected three numbers each"):
        Sam(Sam.Options(model=str(tmp_path)))
    path.write_text('{"do_normalize": false}')
    assert "mean 0.0 0.0 0.0" in Sam(Sam.Options(model=str(tmp_path))).identity()["preprocessing"]


def test_shards_are_read_as_one(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    source = Path(folders["sam"]["model"])
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = list(load_file(source / "model.safetensors").items())
    save_file(dict(tensors[::2]), tmp_path / "one.safetensors")
    save_file(dict(tensors[1::2]), tmp_path / "two.safetensors")
    placed = {key: ("one", "two")[i % 2] + ".safetensors" for i, (key, _) in enumerate(tensors)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    whole = Sam(Sam.Options(**folders["sam"])).identity()
    assert Sam(Sam.Options(model=str(tmp_path))).identity() == whole


def test_a_release_file_is_data_of_the_right_model(folders, tmp_path):
    path = Path(folders["segment_anything"]["model"])
    with pytest.raises(ConfigError, match="has no default"):
        SegmentAnything(SegmentAnything.Options())
    with pytest.raises(ConfigError, match=r"variant: vit_b, but sam_tiny\.pth holds other"):
        SegmentAnything(SegmentAnything.Options(**folders["segment_anything"], variant="vit_b"))
    by_folder = tmp_path / "one"
    by_folder.mkdir()
    with pytest.raises(InputMissingError, match="0 weight files"):
        SegmentAnything(SegmentAnything.Options(model=str(by_folder)))
    (by_folder / path.name).write_bytes(path.read_bytes())
    SegmentAnything(SegmentAnything.Options(model=str(by_folder)))
    tensors = torch.load(path, weights_only=True)
    torch.save({"model": {"vision.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(IncompatibleError, match=r"first is 'vision\.weight'"):
        SegmentAnything(SegmentAnything.Options(model=str(tmp_path / "other.pth")))
    tensors.pop("mask_decoder.output_upscaling.0.bias")
    torch.save(tensors, tmp_path / "less.pth")
    with pytest.raises(CorruptError, match="make no Segment Anything model"):
        SegmentAnything(SegmentAnything.Options(model=str(tmp_path / "less.pth")))
    (tmp_path / "half.pth").write_bytes(path.read_bytes()[:500])
    with pytest.raises(CorruptError, match=r"half\.pth"):
        SegmentAnything(SegmentAnything.Options(model=str(tmp_path / "half.pth")))
