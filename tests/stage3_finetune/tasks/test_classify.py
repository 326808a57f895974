"""The classification task on a real small timm model."""

from dataclasses import replace

import pytest
import torch

from shared.backbones import build
from shared.errors import ConfigError, CorruptError
from stage3_finetune.contracts import Batch
from stage3_finetune.export import Preprocessing
from stage3_finetune.tasks import TASKS
from stage3_finetune.tasks.classify import Classify, ClassifyOptions

INPUT = Preprocessing(32, 1, (0.5,), (0.25,))


def task(seed: int = 0, smoothing: int = 0, classes: tuple[str, ...] = ("a", "b", "c")) -> Classify:
    backbone = build("test_resnet", in_chans=1, seed=7)
    options = ClassifyOptions(label_smoothing_milli=smoothing)
    return Classify(options, backbone, classes=classes, preprocessing=INPUT, seed=seed)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    image = torch.rand(6, 1, 32, 32, generator=generator)
    return Batch(image, target, tuple("abcdef"), tuple(target.tolist()), ((32, 32),) * 6)


def predict(one: Classify) -> torch.Tensor:
    with torch.no_grad():
        return torch.from_numpy(one.predict(batch()))


def test_the_table_names_it() -> None:
    assert TASKS.load("classify") is Classify


def test_the_encoder_is_kept_and_the_head_is_a_function_of_the_seed() -> None:
    encoder = build("test_resnet", in_chans=1, seed=7).model.state_dict()
    torch.manual_seed(1)
    first = task()
    torch.manual_seed(2)
    again, other = task(), task(seed=1)
    state = first.model.state_dict()
    assert set(state) - set(encoder) == set(first.head)
    assert all(torch.equal(state[name], encoder[name]) for name in encoder)
    weight = next(name for name in first.head if name.endswith("weight"))
    assert state[weight].shape[0] == 3
    assert torch.equal(state[weight], again.model.state_dict()[weight])
    assert not torch.equal(state[weight], other.model.state_dict()[weight])


def test_loss_is_the_cross_entropy_of_the_predictions_and_falls() -> None:
    one = task()
    one.model.eval()
    probability = predict(one)
    assert torch.allclose(probability.sum(dim=1), torch.ones(6))
    picked = probability[torch.arange(6), batch().target]
    with torch.no_grad():
        values = one.loss(batch())
    assert float(values["loss"]) == pytest.approx(float(-picked.log().mean()), abs=1e-5)
    assert float(values["accuracy"]) == pytest.approx(float((probability.argmax(1) == batch().target).float().mean()))
    smooth = task(smoothing=300)
    smooth.model.eval()
    expected = float(-(0.7 * picked.log() + 0.3 * probability.log().mean(dim=1)).mean())
    with torch.no_grad():
        assert float(smooth.loss(batch())["loss"]) == pytest.approx(expected, abs=1e-5)
    one.model.train()
    optimizer = torch.optim.AdamW(one.model.parameters(), lr=3e-3)
    for _ in range(10):
        optimizer.zero_grad()
        one.loss(batch())["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        assert float(one.loss(batch())["loss"]) < 0.5 * float(values["loss"])


def test_normalisation_is_applied() -> None:
    one, other = task(), task()
    other._mean = torch.tensor([0.0]).reshape(1, 1, 1, 1)
    one.model.eval()
    other.model.eval()
    assert not torch.allclose(predict(one), predict(other))


def test_an_export_comes_back_and_a_damaged_one_is_refused(tmp_path) -> None:
    backbone = build("resnet18", in_chans=1, output_stride=16, model_args={"channels": [8, 8, 8, 8]}, seed=7)
    one = Classify(ClassifyOptions(), backbone, classes=("a", "b", "c"), preprocessing=INPUT, seed=0)
    with torch.no_grad():
        for value in one.model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape) * 0.1)
    one.model.eval()
    one.export(tmp_path / "model")
    back = Classify.restore(tmp_path / "model")
    assert (back.classes, back.preprocessing, back.model.training) == (one.classes, one.preprocessing, False)
    assert torch.equal(predict(back), predict(one))
    config = (tmp_path / "model/config.json").read_text()
    for damaged in ("{", config.replace("label_names", "names")):
        (tmp_path / "model/config.json").write_text(damaged)
        with pytest.raises(CorruptError, match="model"):
            Classify.restore(tmp_path / "model")
    (tmp_path / "model/config.json").write_text(config.replace('"c"', '"c", "d"'))
    with pytest.raises(CorruptError, match=r"fc\.bias: shape \(3,\), expected \(4,\)"):
        Classify.restore(tmp_path / "model")


def test_a_backbone_that_takes_no_classifier_is_refused() -> None:
    options = ClassifyOptions()
    with pytest.raises(ConfigError, match="takes no classifier"):
        Classify(
            options,
            replace(build("test_resnet", in_chans=1), model=torch.nn.Conv2d(1, 4, 3)),
            classes=("a", "b"),
            preprocessing=INPUT,
            seed=0,
        )
