"""The recipes for clusters, run as far as one machine can: scripts with stubs, a manifest held to the CLI."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.stage_commands import localize as localize_command
from shared.artifact import read_card
from stage1_localize.job import localize
from tests.pipelines.conftest import ROOT, Chain, write_inputs
from tests.stage1_localize.planted_corpus import recipe

CLUSTERS = ROOT / "pipelines" / "clusters"
MANIFEST = CLUSTERS / "kubernetes.yaml"
SCRIPTS = sorted(CLUSTERS.glob("*.sh"))

STUBS = {
    "mwm": f'exec {sys.executable} -m pipelines "$@"',
    "dask": f'what=$1; shift; exec {sys.executable} -m dask "$what" --host 127.0.0.1 "$@"',
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
    # A batch system's array: one session a worker, its id printed; --parsable is asked for.
    "sbatch": 'setsid bash "${!#}" >>"$STUB_LOG" 2>&1 & echo $!',
    "scancel": 'kill -TERM -- "-$1"',
}


def options_of(command: list[str]) -> set[str]:
    return {word for word in command if word.startswith("--")}


def known_options(program: str, what: str) -> set[str]:
    module = {"mwm": "pipelines", "dask": "dask"}[program]
    done = subprocess.run(
        [sys.executable, "-m", module, what, "--help"],
        cwd=ROOT, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout))


def commands() -> list[list[str]]:
    """Every command of the manifest and of the scripts."""
    found = []
    for document in yaml.safe_load_all(MANIFEST.read_text()):
        if document["kind"] != "Service":
            found += [each["command"] for each in document["spec"]["template"]["spec"]["containers"]]
    for script in SCRIPTS:
        text = re.sub(r"\\\n", " ", script.read_text())
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        found += [match.split() for line in lines for match in re.findall(r"\b(?:mwm|dask) [a-z]+ -?.*", line)]
    return found


def test_every_command_is_one_and_has_its_options() -> None:
    seen = {(command[0], command[1]) for command in commands()}
    assert seen == {("dask", "scheduler"), ("dask", "worker"), ("mwm", "localize")}
    known = {pair: known_options(*pair) for pair in seen}
    for command in commands():
        assert options_of(command) <= known[command[0], command[1]], command
    assert localize_command.__name__ == "localize"


def test_workers_have_one_thread() -> None:
    workers = [command for command in commands() if command[:2] == ["dask", "worker"]]
    assert len(workers) == 3
    for command in workers:
        assert command[command.index("--nthreads") + 1] == "1"


def test_the_manifest_names_one_scheduler_and_one_claim() -> None:
    documents = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(MANIFEST.read_text())}
    service = documents["Service", "mwm-scheduler"]["spec"]
    address = f"tcp://mwm-scheduler:{service['ports'][0]['port']}"
    assert service["selector"] == documents["Deployment", "mwm-scheduler"]["spec"]["template"]["metadata"]["labels"]
    assert sum(address in command for command in commands()) == 3
    for (kind, name), document in documents.items():
        if kind == "Deployment":
            labels = document["spec"]["template"]["metadata"]["labels"]
            assert document["spec"]["selector"]["matchLabels"] == labels == {"app": name}
    job = documents["Job", "mwm-localize"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    evicted, hopeless = job["podFailurePolicy"]["rules"]  # others, 75 among them, count: a disk may stay full
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert (hopeless["action"], hopeless["onExitCodes"]["values"]) == ("FailJob", [1, 2, 4, 5, 6])
    assert 0 < job["backoffLimit"] < 100


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_a_script_without_its_inputs_says_which() -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("RECIPE", "IMAGES", "OUT")}
    done = subprocess.run(["bash", CLUSTERS / "slurm.sh"], env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RECIPE: a recipe, by name or file" in done.stderr


@pytest.mark.parametrize(
    ("mwm", "queued"),
    [
        ("exit 75", False),
        ("mkdir -p $OUT/journal; echo {} >$OUT/journal/shard-00000.state; exit 75", False),
        ("mkdir -p $OUT/journal; echo a >>$OUT/journal/shard-00000.rows; exit 75", True),
        ("mkdir -p $OUT/run; echo {} >$OUT/run/regions.json; exit 75", True),
        ("trap 'exit 75' TERM; sleep 1; kill -TERM $PPID; while :; do sleep 0.1; done", True),
        ("exit 6", False),
    ],
    ids=["nothing finished", "only tried", "rows finished", "all rows finished", "told to stop", "too many failures"],
)
def test_slurm_queues_a_run_again_only_if_that_may_help(mwm: str, queued: bool, tmp_path: Path) -> None:
    """A full disk ends with 75 at once, however often it is asked."""
    stubs = {
        "mwm": mwm,
        "dask": 'while [ "$1" != --scheduler-file ]; do shift; done; echo {} >"$2"; exec sleep 60',
        "sbatch": "echo 7",
        "scancel": "true",
        "scontrol": f'echo "$@" >>{tmp_path}/queued',
    }
    for name, line in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    names = {"RECIPE": "r", "IMAGES": "i", "OUT": str(tmp_path / "out"), "SLURM_JOB_ID": "12"}
    env = {**os.environ, **names, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", CLUSTERS / "slurm.sh"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == (6 if mwm == "exit 6" else 75), done.stderr
    assert (tmp_path / "queued").exists() == queued
    assert not queued or (tmp_path / "queued").read_text() == "requeue 12\n"
    assert ("not queued again" in done.stderr) == (done.returncode == 75 and not queued)


def test_an_installation_brings_the_recipes() -> None:
    """Package data of a wheel is what patterns of pyproject.toml name: every file here must match one."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, folders in {"pipelines": ("clusters", "recipes"), "stage1_localize": ("weights",)}.items():
        there = resources.files(package)
        wanted = {f"{name}/{file.name}" for name in folders for file in (there / name).iterdir()}
        named = {path for each in patterns[package] for path in (ROOT / package).glob(each)}
        assert wanted == {f"{path.parent.name}/{path.name}" for path in named}
        assert wanted
    assert {path.name for path in resources.files("pipelines").joinpath("clusters").iterdir()} == {
        "kubernetes.yaml", "slurm.sh", "slurm_worker.sh"
    }  # fmt: skip


def until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    limit = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.05)


def of_run(out: Path, what: str) -> list[psutil.Process]:
    """Processes ``dask WHAT`` of a run: they name its scheduler file."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if what in words and f"{out}.scheduler.json" in words:
                found.append(process)
    return found


class Slurm:
    """slurm.sh on a chain's images with stubs for what only a cluster has."""

    def __init__(self, tmp_path: Path, delay_ms: int) -> None:
        self.chain: Chain = write_inputs(tmp_path / "chain", 20)
        self.out = tmp_path / "regions"
        self.log = tmp_path / "workers.log"
        stubs = tmp_path / "stubs"
        stubs.mkdir()
        for name, line in STUBS.items():
            (stubs / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
            (stubs / name).chmod(0o755)
        self.env = {
            **os.environ,
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "STUB_LOG": str(self.log),
            "RECIPE": str(self.chain.recipe),
            "IMAGES": str(self.chain.images),
            "OUT": str(self.out),
            "MORE": f"--set micro_batch=2 --set grounder.options.delay_ms={delay_ms}",
        }

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", CLUSTERS / "slurm.sh"],
            cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def add_worker(self) -> None:
        subprocess.run(["sbatch", str(CLUSTERS / "slurm_worker.sh")], env=self.env, check=True, capture_output=True)

    def expected(self) -> str:
        fields = {"regions": {"bright": "disc"}, "grid_px": 64, "micro_batch": 2}
        return localize(recipe(**fields), images=self.chain.images, out=self.out.with_name("whole")).card.artifact_id

    def trying(self) -> bool:
        states = [path.read_text() for path in self.out.glob("journal/*.state")]
        return any('"trying": [' in state and '"trying": []' not in state for state in states)


@pytest.mark.slow
def test_the_slurm_scripts_outlive_workers_that_are_pre_empted(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, delay_ms=300)
    process = slurm.start()
    try:
        for _ in range(4):  # a row that killed three workers would be quarantined
            until(lambda: bool(of_run(slurm.out, "worker")) and slurm.trying(), process)
            (worker,) = of_run(slurm.out, "worker")
            for each in (*worker.children(recursive=True), worker):  # as a batch system does: all of the step
                with suppress(psutil.Error):
                    each.send_signal(signal.SIGTERM)
            psutil.wait_procs([worker], timeout=60)
            slurm.add_worker()
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
    finally:
        end(process, slurm.out)
    assert read_card(slurm.out).artifact_id == slurm.expected()
    assert "each image was tried" not in (slurm.out / "quarantine.jsonl").read_text()
    assert not of_run(slurm.out, "scheduler")


@pytest.mark.slow
def test_the_slurm_script_stops_in_time_and_continues(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, delay_ms=300)
    process = slurm.start()
    try:
        until(slurm.trying, process)
        process.terminate()  # sbatch --signal=B:TERM@120
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 75, said
        process = slurm.start()
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert "continuing: " in said
    finally:
        end(process, slurm.out)
    assert read_card(slurm.out).artifact_id == slurm.expected()


def end(process: "subprocess.Popen[str]", out: Path) -> None:
    """Leave nothing behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for what in ("worker", "scheduler"):
        for each in of_run(out, what):
            with suppress(psutil.Error):
                for child in each.children(recursive=True):
                    child.kill()
                each.kill()
