"""The detection task on real small timm models."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.backbones import build
from shared.errors import ConfigError, CorruptError
from stage3_finetune.annotations import pack, unpack
from stage3_finetune.contracts import WHOLE, Batch
from stage3_finetune.export import Preprocessing
from stage3_finetune.instances import Things, place
from stage3_finetune.tasks import TASKS
from stage3_finetune.tasks.detect import Detect, DetectOptions, _mode

SIDE = 64
INPUT = Preprocessing(SIDE, 1, (0.5,), (0.25,))
SMALL = {"width": 16, "head_width": 32, "mask_width": 16, "proposals": 20, "candidates": 50, "sampled": 16}
SIZE = (96, 128)


def task(seed: int = 0, name: str = "test_resnet", masks: object = True, **changes: object) -> Detect:
    stride = changes.pop("output_stride", None)
    backbone = build(name, in_chans=1, size_px=SIDE, output_stride=stride, seed=7)
    options = DetectOptions.model_validate({**SMALL, "masks": masks, **changes})
    return Detect(options, backbone, classes=("a", "b"), preprocessing=INPUT, seed=seed)


def truth() -> list[Things]:
    """One thing, two, none; in images of 96 x 128 px."""
    found = []
    for boxes, labels in (([(16, 24, 64, 72)], [1]), ([(0, 0, 40, 40), (64, 48, 128, 96)], [0, 1]), ([], [])):
        masks = []
        for x0, y0, x1, y1 in boxes:
            inside = np.zeros(SIZE, bool)
            inside[y0:y1, x0:x1] = True
            masks.append(pack(inside))
        corners = np.array(boxes, np.int64).reshape(-1, 4) * 100
        found.append(Things(SIZE, corners, np.array(labels, np.int64), tuple(masks)))
    return found


def batch(masks: bool = True) -> Batch:
    """The images show the things: each is bright in its box."""
    there = truth() if masks else [replace(one, masks=None) for one in truth()]
    image = torch.full((3, 1, SIDE, SIDE), 0.2)
    for pixels, one in zip(image, there, strict=True):
        for box, label in zip(place(one, WHOLE, SIDE)["boxes"].int().tolist(), one.labels.tolist(), strict=True):
            pixels[:, box[1] : box[3], box[0] : box[2]] = 1.0 if label else 0.6
    return Batch(image, [place(one, WHOLE, SIDE) for one in there], tuple("abc"), tuple(there), (SIZE,) * 3)


@pytest.fixture(scope="module")
def trained() -> Detect:
    """Eighty steps on one batch."""
    torch.manual_seed(0)
    one = task(score_milli=300)
    one.model.train()
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=3e-3)
    for step in range(80):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 80)
        optimizer.zero_grad()
        one.loss(batch())["loss"].backward()
        torch.nn.utils.clip_grad_norm_(one.model.parameters(), 1.0)
        optimizer.step()
    one.model.eval()
    return one


def test_the_table_names_it() -> None:
    assert TASKS.load("detect") is Detect


def test_the_encoder_is_kept_and_the_rest_is_a_function_of_the_seed() -> None:
    encoder = build("test_resnet", in_chans=1, seed=7).model.state_dict()
    torch.manual_seed(1)
    first = task()
    torch.manual_seed(2)
    again, other = task(), task(seed=1)
    state = first.model.state_dict()
    assert all(torch.equal(state[f"backbone.encoder.{name}"], value) for name, value in encoder.items())
    assert set(state) == {*first.head, *(f"backbone.encoder.{name}" for name in encoder)}
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in state.items())
    assert not all(torch.equal(state[name], other.model.state_dict()[name]) for name in first.head)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("test_resnet", {}), ("test_vit", {}), ("test_convnext", {}), ("resnet10t", {"output_stride": 8})],
)
@pytest.mark.parametrize("masks", [True, False])
def test_any_encoder_learns_from_boxes_and_masks(name: str, masks: bool, changes: dict[str, object]) -> None:
    one = task(name=name, masks=masks, **changes)
    one.model.train()
    losses = one.loss(batch(masks))
    assert ("loss_mask" in losses) == masks
    assert float(losses["loss"]) == pytest.approx(sum(float(v) for k, v in losses.items() if k != "loss"), abs=1e-5)
    losses["loss"].backward()
    missing = [name for name, value in one.model.named_parameters() if value.grad is None and name in one.head]
    assert missing == []
    assert any(value.grad is not None for name, value in one.model.named_parameters() if name not in one.head)


def test_it_finds_what_it_was_shown_in_the_frame_of_the_image(trained: Detect) -> None:
    with torch.no_grad():
        answers = trained.predict(batch())
    for answer, there in zip(answers, truth(), strict=True):
        assert answer.truth.boxes.tolist() == there.boxes.tolist()
        assert answer.found.size_px == SIZE
        assert (np.diff(answer.found.scores) <= 0).all()
        for box, label, mask in zip(there.boxes, there.labels, there.masks, strict=True):
            overlap = [_iou(box, other) for other in answer.found.boxes]
            best = int(np.argmax(overlap))
            assert overlap[best] > 0.5
            assert answer.found.labels[best] == label
            inside, other = unpack(mask, SIZE), unpack(answer.found.masks[best], SIZE)
            assert (inside & other).sum() / (inside | other).sum() > 0.5
    assert len(answers[2].found) == 0


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    cut = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(np.maximum(cut, 0)))
    return shared / (np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2]) - shared)


def test_what_is_exported_is_restored_with_equal_answers(trained: Detect, tmp_path) -> None:
    trained.export(tmp_path)
    found = Detect.restore(tmp_path)
    assert (found.classes, found.preprocessing, found.options) == (("a", "b"), INPUT, trained.options)
    assert not found.model.training
    unlabelled = replace(batch(), target=None, truth=(None,) * 3)
    with torch.no_grad():
        for one, other in zip(trained.predict(batch()), found.predict(unlabelled), strict=True):
            assert len(other.truth) == 0
            assert one.found.masks == other.found.masks
            for name in ("boxes", "labels", "scores"):
                np.testing.assert_array_equal(getattr(one.found, name), getattr(other.found, name))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"width": 16', '"width": 24'))
    with pytest.raises(CorruptError, match="shape"):
        Detect.restore(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptError):
        Detect.restore(tmp_path)


def test_an_untrained_model_says_little() -> None:
    one = task()
    one.model.eval()
    with torch.no_grad():
        assert sum(len(answer.found) for answer in one.predict(batch())) < 5


def test_a_frozen_encoder_keeps_its_mode_and_still_learns(trained: Detect) -> None:
    one = task()
    one.model.eval()  # as `freeze` has it
    before = {name: value.clone() for name, value in one.model.state_dict().items() if "running" in name}
    assert "loss_mask" in one.loss(batch())
    assert not one.model.training
    assert not one.model.rpn.training
    assert all(torch.equal(one.model.state_dict()[name], value) for name, value in before.items())
    trained.model.train()
    with _mode(trained.model, training=False):
        assert not trained.model.roi_heads.training
        assert trained.model.backbone.training
    assert trained.model.roi_heads.training
    trained.model.eval()


def test_images_are_normalised_once_and_not_resized() -> None:
    one = task()
    images, _ = one.model.transform([batch().image[0]], None)
    torch.testing.assert_close(images.tensors[0], (batch().image[0] - 0.5) / 0.25)


def test_what_does_not_fit_is_refused() -> None:
    backbone = build("test_resnet", in_chans=1)
    with pytest.raises(ConfigError, match="'auto' is decided by labels"):
        Detect(DetectOptions(), backbone, classes=("a",), preprocessing=INPUT, seed=0)
    with pytest.raises(ConfigError, match="no multiple of the encoder's stride"):
        Detect(DetectOptions(masks=False), backbone, classes=("a",), preprocessing=replace(INPUT, size_px=70), seed=0)
