"""Every built-in recipe: its settings hold, and its method and policy are built at the size of their papers."""

import pytest

from pipelines.options import RECIPES, read_config
from shared.backbones import build
from shared.config import validate
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.masking.plan import build_policy
from stage2_pretrain.masking.schedule import options_at
from stage2_pretrain.methods import METHODS
from stage2_pretrain.run import resolve

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_its_method(name: str) -> None:
    config = resolve(read_config(PretrainConfig, name, "pretrain", None))
    options = {key: value for key, value in config.backbone_options.items() if key != "output_stride"}
    backbone = build(
        config.backbone,
        in_chans=config.channels,
        output_stride=config.backbone_options.get("output_stride"),
        model_args=options,
        size_px=config.size_px,
        seed=0,
    )
    part = METHODS.load(config.method["name"])
    made = part(validate(part.Options, config.method_options), backbone, size_px=config.size_px, seed=0)
    assert made.grid[0] * made.grid[1] >= 49
    for epoch in (0, config.epochs - 1):
        settings = options_at(config.schedule, config.policy_options, epoch=epoch, epochs=config.epochs)
        assert build_policy(config.policy["name"], settings).strata
