"""The fused sampler, run by Triton's interpreter in a process of its own; `tests.benchmarks.compiled` compiles it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two to seven minutes, by what else the machine does
def test_the_interpreter_gives_the_bits_of_the_reference() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "tests/stage2_pretrain/kernels/interpreted_fused.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 17
    assert "skipped" not in done.stdout
