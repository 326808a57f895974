"""Layer-wise decay: timm's own layers, wherever the encoder stands in the model."""

import pytest
from timm.optim import param_groups_layer_decay
from torch import nn

from shared.backbones import build
from stage3_finetune.layer_decay import layer_scales


@pytest.mark.parametrize(
    ("name", "size_px"),
    [("test_resnet", None), ("vit_tiny_patch16_224", 32), ("convnext_atto", None), ("test_efficientnet", None)],
)
def test_equals_timms_own_groups(name: str, size_px: int | None) -> None:
    model = build(name, in_chans=1, size_px=size_px).model
    before = set(model.state_dict())
    model.reset_classifier(3)
    head = set(model.state_dict()) - before
    expected = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.7)
        for parameter in group["params"]
    }
    found = layer_scales(model, model, head, decay=0.7)
    assert found == {key: pytest.approx(expected[id(value)]) for key, value in model.named_parameters()}
    assert {found[key] for key in head} == {1.0}
    assert min(found.values()) < 0.5


def test_an_encoder_is_known_inside_any_model_and_layers_do_not_depend_on_it() -> None:
    encoder = build("test_resnet", in_chans=1).model
    whole = nn.ModuleDict({"neck": nn.Linear(3, 3), "body": nn.Sequential(encoder)})
    inside = layer_scales(encoder, whole, ("neck.weight", "neck.bias"), decay=0.5)
    assert inside["neck.weight"] == 1.0
    alone = {key.removeprefix("body.0."): value for key, value in inside.items() if key.startswith("body")}
    encoder.reset_classifier(3)
    with_head = layer_scales(encoder, encoder, ("fc.weight", "fc.bias"), decay=0.5)
    assert alone == {key: value for key, value in with_head.items() if not key.startswith("fc")}
    assert max(alone.values()) == 0.5


def test_a_model_without_a_matcher_is_cut_into_runs() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    model.pretrained_cfg = {"classifier": "19"}
    scales = layer_scales(model, model, ("19.weight", "19.bias"), decay=0.5)
    assert scales["19.weight"] == 1.0
    assert scales["0.weight"] < scales["18.weight"] < 1
