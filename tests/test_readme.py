"""What the README shows of a notebook runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_notebook_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### From a notebook")[2].partition("\n## ")[0]
    lines = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert lines
    (tmp_path / "xrays").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (96, 128), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "xrays" / f"scan-{number}.png")
    monkeypatch.chdir(tmp_path)
    told: dict[str, object] = {"__name__": "notebook"}
    exec(compile("\n".join(lines), "README.md", "exec"), told)
    assert (tmp_path / "regions" / "artifact.json").is_file()
    assert told["store"].maps([0]).shape == (1, 1, 256, 256)
