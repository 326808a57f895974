"""What the README shows of a notebook runs as it stands; the localizing itself is tested where it lives."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.regions import RegionStore
from stage1_localize.config import LocalizeConfig
from tests.conftest import ROOT
from tests.shared.planted_stores import plant_store


def test_the_notebook_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### From a notebook")[2].partition("\n## ")[0]
    lines = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert lines
    (tmp_path / "xrays").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 128), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "xrays" / f"scan-{number}.png")

    def localized(config: LocalizeConfig, *, images: Path, out: Path) -> RegionStore:
        maps = np.full((1, 16, 24), 200, np.uint8)
        return plant_store(out, images, lambda *_: maps, regions=list(config.regions))

    monkeypatch.setattr("stage1_localize.job.localize", localized)
    monkeypatch.chdir(tmp_path)
    told: dict[str, object] = {"__name__": "notebook"}
    exec(compile("\n".join(lines), "README.md", "exec"), told)
    assert isinstance(told["store"], RegionStore)
