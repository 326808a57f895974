"""Loader processes of a run: any number gives the same bits, and no way of ending leaves a process or noise."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from shared.checkpoint import latest_state
from shared.runlog import read_metrics
from tests.stage2_pretrain.stores import write_discs, write_store
from tests.stage2_pretrain.test_train import COUNT, ROOT, config, run

SCRIPT = """
import multiprocessing, os, signal, sys
from pathlib import Path
from pipelines import cli
from stage2_pretrain import train
add = train.Tally.add
corpus, out, what, at, workers = sys.argv[1:]
steps = []
def harm(self, step, visible):
    add(self, step, visible)
    steps.append(step)
    if len(steps) == int(at):
        if what == "kill a worker":
            multiprocessing.active_children()[0].kill()
        else:
            os.killpg(0, getattr(signal, what))
train.Tally.add = harm
arguments = ["--images", corpus + "/images", "--regions", corpus + "/regions", "--out", out]
cli.main(["pretrain", corpus + "/recipe.yaml", *arguments, "--set", "loader_workers=" + workers])
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Inputs and a recipe, in a folder of their own."""
    folder = tmp_path / "corpus"
    write_discs(folder / "images", COUNT)
    write_store(folder / "images", folder / "regions", quarantined=(5,))
    (folder / "recipe.yaml").write_text("pretrain: " + config().model_dump_json())
    return folder


def harmed(corpus: Path, out: Path, what: str, at: int, workers: int) -> tuple[int, str]:
    """Run in a process group of its own; returns the exit code and what was said, once the group is gone."""
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(out), what, str(at), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _, said = started.communicate(timeout=300)
    patience = time.monotonic() + 10  # Python's own resource tracker goes a moment after its process
    while (left := members(started.pid)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not left
    return started.returncode, said


def members(group: int) -> list[str]:
    """Commands of the live processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            if int(its_group) == group and state != "Z":
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_run_cut_off_in_every_way_with_other_workers_each_time_has_the_same_id(corpus: Path, tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "whole", loader_workers=0)
    out = tmp_path / "cut"
    code, said = harmed(corpus, out, "SIGINT", 1, 3)
    assert (code, "Traceback" in said) == (75, False), said
    assert "error[interrupted]: SIGINT after step 1 of 8; state saved" in said
    code, said = harmed(corpus, out, "kill a worker", 2, 2)
    assert (code, "Traceback" in said) == (75, False), said
    assert "error[loader-died]: a loader process died" in said
    assert latest_state(out / "run/state")[0] >= 1
    code, said = harmed(corpus, out, "SIGTERM", 2, 1)
    assert (code, "Traceback" in said) == (75, False), said
    made = run(corpus, out, loader_workers=0)
    assert made.card.artifact_id == whole.card.artifact_id
    assert read_metrics(out) == read_metrics(whole.path)


def test_a_changed_image_is_told_by_a_loader_process_as_by_this_one(corpus: Path, tmp_path: Path) -> None:
    Image.new("L", (70, 90)).save(corpus / "images/00.png")
    code, said = harmed(corpus, tmp_path / "out", "SIGTERM", 99, 1)
    assert (code, "Traceback" in said) == (4, False), said
    assert said.count("error[source-changed]: 00.png: sha256 ") == 1
