"""Settings: strict, explained, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared.config import load, spec
from shared.errors import ConfigError
from stage3_finetune.config import FinetuneConfig


def test_unknown_keys_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        load(FinetuneConfig, {"epoch": 3, "augment": {"flips": True}})
    assert "epoch: unknown key. Did you mean 'epochs'?" in caught.value.message
    assert "augment.flips: unknown key. Did you mean 'flip'?" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"val_milli": 500, "test_milli": 500}, "val_milli"),
        ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs"),
        ({"classes": ["a", "a"]}, "classes"),
        ({"augment": {"crop_scale": [900, 800]}}, "crop_scale"),
        ({"threads": 0}, "threads"),
        ({"batch_size": 1}, "batch_size"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(FinetuneConfig, changes)


def test_runtime_fields_stay_out_of_the_specification() -> None:
    plain = spec(FinetuneConfig())
    assert spec(FinetuneConfig(loader_workers=3, cache_mib=0, save_every_s=1.0)) == plain
    assert spec(FinetuneConfig(seed=1)) != plain
    assert not {"loader_workers", "cache_mib", "save_every_s", "save_every_steps"} & set(plain)


def test_every_field_is_described_and_importing_loads_no_torch() -> None:
    assert all(field.description for field in FinetuneConfig.model_fields.values())
    code = "import sys, stage3_finetune.config, stage3_finetune.tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
