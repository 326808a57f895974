"""Fifty kills on two thousand images: where each one fell, and whether every run ended in the uninterrupted artifact.

``python -m tests.benchmarks.kills --json [--quick]``. The planted grounder takes 5 ms an image; maps of 32 px, eight
shards of 250. Kills are SIGKILL at moments drawn at random over a whole run, in the assembly of a shard, and after the
last row; then SIGTERM in every phase, once and twice at once. Each command is continued until it is done; then its card
and all its files are verified. CI runs the same on fewer images (`tests/pipelines/test_kills.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.pipelines.conftest import ROOT, write_inputs

SETTINGS = ["--set", "grid_px=32", "--set", "grounder.options.delay_ms=5"]
STOPS = ["set-up", "set-up twice", "rows", "rows twice", "assembly", "final", "final twice"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def main(given: Sequence[str] | None = None) -> None:
    """Kill, continue, compare; exit 1 if any id differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.kills", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="200 images, 10 kills")
    options = parser.parse_args(given)
    images, kills = (200, 10) if options.quick else (2000, 50)
    aims = ["anywhere"] * (kills * 3 // 5) + ["assembly"] * (kills // 5) + ["final"] * (kills // 5)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder) / "chain", images)
        request = {"stage": "localize", "root": f"{folder}/chain", "plan": [SETTINGS, aims, STOPS]}
        salt = Path(folder) / "salt"
        salt.write_text("5a" * 32)
        done = subprocess.run(
            [sys.executable, "-m", "tests.pipelines.killing", json.dumps(request)],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD, "MWM_SALT_FILE": str(salt)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout)
    equal = found["ids"] == [found["whole"]] and sum(found["killed"].values()) >= kills
    result = {"benchmark": "kills", "gate": "green" if equal else "red", "images": images, **found}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
