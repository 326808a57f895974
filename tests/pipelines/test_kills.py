"""Twenty times killed at random moments, stopped by SIGTERM in every phase: the artifact is the uninterrupted one's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.pipelines.conftest import Chain, write_inputs
from tests.pipelines.killing import FINAL

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

PLANS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "localize": (
        ["--set", "grid_px=32", "--set", "grounder.options.delay_ms=4"],
        ["anywhere"] * 11 + ["assembly"] * 3 + ["final"] * 6,
        ["set-up", "set-up twice", "rows", "rows twice", "assembly", "final", "final twice"],
    ),
    "pretrain": (
        # The reference sampler: equal to the bit, and no compiler in each of so many starts.
        ["--set", "epochs=5", "--set", "save_every_steps=2", "--set", "impl=reference"],
        ["anywhere"] * 11 + ["saving"] * 3 + ["final"] * 6,
        ["set-up", "set-up twice", "steps", "steps twice", "saving", "saving twice", "final", "final twice"],
    ),
    "finetune": (
        ["--set", "epochs=8", "--set", "save_every_steps=2"],
        ["anywhere"] * 11 + ["saving"] * 3 + ["final"] * 6,
        ["set-up", "set-up twice", "steps", "steps twice", "saving", "saving twice", "final", "final twice"],
    ),
}


def serve(stage: str, root: Path) -> dict[str, Any]:
    request = json.dumps({"stage": stage, "root": str(root), "plan": PLANS[stage]})
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.killing", request],
        cwd=ROOT, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(1800)  # twenty starts of a process, on whatever else the machine does
@pytest.mark.slow
@pytest.mark.parametrize("stage", PLANS)
def test_twenty_kills_and_every_stop_end_in_the_uninterrupted_artifact(
    stage: str, finished: Chain, tmp_path: Path
) -> None:
    if stage == "localize":
        write_inputs(tmp_path / "chain", 160)
    else:
        shutil.copytree(finished.root, tmp_path / "chain")
    found = serve(stage, tmp_path / "chain")
    print(f"\n{stage}: {json.dumps(found)}")
    assert found["ids"] == [found["whole"]]
    assert sum(found["killed"].values()) >= 20
    assert sum(count for phase, count in found["killed"].items() if phase in FINAL) >= 3
    assert found["codes"]["75"] >= 5
