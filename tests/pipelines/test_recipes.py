"""Every built-in recipe: its settings hold, and its method and policy are built at the size of their papers."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.options import RECIPES, is_study, read_config
from pipelines.study_config import StudyConfig
from pipelines.study_plan import plan, run_settings
from shared.backbones import build
from shared.config import validate
from stage2_pretrain.config import PretrainConfig
from stage2_pretrain.masking.plan import build_policy
from stage2_pretrain.masking.schedule import options_at
from stage2_pretrain.methods import METHODS
from stage2_pretrain.run import resolve
from stage3_finetune.average_precision import measures
from stage3_finetune.instances import Things
from stage3_finetune.metrics import class_measures

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
CHAINS = [name for name in NAMES if not is_study(name)]
STUDIES = [name for name in NAMES if is_study(name)]


@pytest.mark.parametrize("name", CHAINS)
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


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_a_study_has_its_share_and_its_settings(name: str, tmp_path: Path) -> None:
    study = read_config(StudyConfig, name, None, None)
    assert study.folds == 5  # seeds
    for run in plan(study):
        settings = run_settings(study, run, tmp_path)
        assert set(settings) - {"encoder"} <= set(study.corpora[run.corpus].endpoints)
        if "encoder" in settings:
            config = resolve(settings["encoder"])
            assert build_policy(config.policy["name"], config.policy_options).strata


def test_arms_of_the_study_hide_alike_on_a_grid_that_tells_regions() -> None:
    """But for `uniform-60`, which is there because that is its paper's share."""
    study = read_config(StudyConfig, "study", None, None)
    assert study.pretrain.size_px // study.pretrain.backbone_options["output_stride"] >= 14
    shares = {
        name: arm.pretrain["policy"].get("overall", arm.pretrain["policy"].get("hide"))
        for name, arm in study.arms.items()
        if arm.pretrain is not None
    }
    assert shares.pop("uniform-60") == 600
    assert set(shares.values()) == {400}
    assert set(shares) == {"uniform", "region", "region-soft", "region-cross-fitted", "shuffled", "oracle"}


@pytest.mark.parametrize("name", STUDIES)
def test_claims_name_scores_that_their_task_has(name: str) -> None:
    """Else a verdict, hours later, would be that there is no such score."""
    study = read_config(StudyConfig, name, None, None)
    things = Things((8, 8), np.zeros((0, 4), np.int64), np.zeros(0, np.int64), (), np.zeros(0, np.int64))
    known = {
        "classify": set(class_measures(np.eye(2), np.array([0, 1]))),
        "detect": set(measures([(things, things)], 1, masks=True)),
    }
    for claim in study.claims:
        task = study.corpora[claim.corpus].endpoints[claim.endpoint].finetune.get("task", "classify")
        assert claim.score in known[task]
        assert (claim.arm, claim.than) in study.compared(claim.corpus, claim.endpoint)
