"""`mwm run` of a study: localize each corpus once, then every arm on every fold, then what it all says.

Each run is one of mwm's own commands in a process of its own: `run/commands.txt` lists them, and each can be repeated
by hand. The same command again continues; whole folds come first, and after each the report says what is complete.
"""

from __future__ import annotations

import ctypes
import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import rfc8785
import yaml

from pipelines.study_config import ENCODER, StudyConfig
from pipelines.study_plan import Corpus, Run, fold_folder, fold_rows, plan, read_corpus, run_settings, write_fold
from shared.artifact import CARD, Artifact, open_artifact, write_atomic
from shared.config import dump_yaml
from shared.config import spec as config_spec
from shared.errors import InterruptedRun, MwmError, SpecMismatchError
from shared.lease import Lease
from shared.runlog import scrub
from shared.signals import Signals
from shared.workspace import refuse_other, set_aside

VERSION = 1
"""Raised when an equal study gives other results."""
COMMANDS = "run/commands.txt"
_SPEC = "run/study.json"
_DEATH_SIGNAL = 1
"""``PR_SET_PDEATHSIG`` of Linux."""


class RunFailedError(MwmError):
    """A run of a study ended with an error; its exit code is the study's."""

    kind = "run-failed"

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


@dataclass
class Children:
    """Commands that are running; told to stop together."""

    stopping: threading.Event = field(default_factory=threading.Event)
    running: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, arguments: Sequence[str]) -> None:
        """Run one command of mwm to its end.

        Raises:
            InterruptedRun: It was stopped.
            RunFailedError: It failed; with its own message.
        """
        with self.lock:
            if self.stopping.is_set():
                raise InterruptedRun("stopped before a run began")
            child = subprocess.Popen(
                [sys.executable, "-m", "pipelines", *arguments, "-q", "--json"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=_end_with_parent,
            )
            self.running.add(child)
        _, told = child.communicate()
        with self.lock:
            self.running.discard(child)
        # One told before it answers signals dies of this one, and has nothing to save.
        if child.returncode == InterruptedRun.exit_code or (
            self.stopping.is_set() and child.returncode == -signal.SIGTERM
        ):
            raise InterruptedRun("a run was interrupted; its state is saved")
        if child.returncode:
            lines = [line for line in told.splitlines() if line.startswith(("error", "hint"))]
            message = lines[0].partition(": ")[2] if lines else f"exit code {child.returncode}"
            hint = next((line.partition(": ")[2] for line in lines if line.startswith("hint")), None)
            code = child.returncode if child.returncode > 0 else 1
            raise RunFailedError(f"mwm {arguments[0]}: {message}", hint=hint, exit_code=code)

    def stop(self) -> None:
        """Tell every command to save its state and end, and let none begin."""
        with self.lock:
            self.stopping.set()
            for child in self.running:
                child.send_signal(signal.SIGTERM)


def _end_with_parent() -> None:  # a study that is killed must not leave runs that hold its folders
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGTERM)


@dataclass(frozen=True)
class Step:
    """One command: what it makes, and where."""

    out: Path
    arguments: tuple[str, ...]

    @property
    def done(self) -> bool:
        """Whether its artifact is published."""
        return (self.out / CARD).is_file()


def run_study(config: StudyConfig, *, out: Path, images: Path, fresh: bool = False, command: str = "") -> Artifact:
    """Run or continue a study, and publish what is complete.

    Args:
        config: The study.
        out: Its folder: a folder a corpus, round, fold and arm, and ``study``, the artifact.
        images: Folder that its paths are relative to.
        fresh: Keep an existing folder aside and start anew.
        command: Command line for provenance.

    Returns:
        The published study. Runs that are not complete are named in it.

    Raises:
        MwmError: What a stage refuses; RunFailedError, when one fails.
        InterruptedRun: SIGTERM or SIGINT; runs have saved their states.
    """
    from pipelines.study_summary import publish_study

    corpora = {name: read_corpus(config, name, images) for name in config.corpora}
    if fresh:
        set_aside(out)
    spec = study_spec(config, corpora)
    with Lease(out):
        spec = _grown(out, spec)
        stores = {name: _stores(config, corpus, images, out) for name, corpus in corpora.items()}
        paths = {name: found for name, (found, _) in stores.items()}
        _refuse_others(config, out, paths)
        write_atomic(out / _SPEC, rfc8785.dumps(spec))
        write_atomic(out / "run/study.yaml", scrub(dump_yaml(config)).encode())
        children = Children()
        for corpus in corpora.values():
            for round_ in range(config.rounds):
                for fold in range(config.folds):
                    rows = fold_rows(corpus, config, round_, fold)
                    write_fold(corpus, rows, fold_folder(out, corpus.name, round_, fold))
        steps = {
            run: _steps(config, run, out, corpora[run.corpus].images, stores[run.corpus][0]) for run in plan(config)
        }
        made = [step for _, own in stores.values() for step in own]
        made += [step for own in steps.values() for step in own]
        write_atomic(out / COMMANDS, "".join(map(_told, made)).encode())
        for (_, name), runs in groupby(steps, lambda run: (run.round, run.corpus)):
            for step in stores[name][1]:
                if not step.done:
                    _say(f"{name}: {step.arguments[0]}, {len(corpora[name].sources)} images, into {step.out.name}")
                    _stoppable(children, step)
                    _refuse_others(config, out, paths)  # runs that are there may be of another store than this
            own = {run: steps[run] for run in runs}
            _run_all(own, children, config.jobs, lambda: publish_study(config, out, command))
        return publish_study(config, out, command)


def study_spec(config: StudyConfig, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
    """What the folds and stores of a folder depend on; what runs depend on beside them stands on their cards."""
    return {
        "version": VERSION,
        "folds": {"folds": config.folds, "seed": config.seed, "val_milli": config.val_milli},
        "corpora": {
            name: {
                "labels": corpus.sha256,
                "localize": None if config.corpora[name].store else config_spec(config.localize_config(name)),
                "outlines": corpus.outlines_sha256,
            }
            for name, corpus in corpora.items()
        },
    }


def _grown(out: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """What the folder will hold: arms, endpoints, corpora and rounds may come to it, not other folds or stores."""
    (out / "run").mkdir(exist_ok=True)
    path = out / _SPEC
    if not path.exists():
        return spec
    found = json.loads(path.read_bytes())
    kept = {
        name: told
        for name, told in found.get("corpora", {}).items()
        if any((out / name).glob(f"*/{CARD}")) or any((out / name).glob(f"round-*/fold-*/*/*/{CARD}"))
    }
    known = {**spec, "corpora": {name: told for name, told in spec["corpora"].items() if name in kept}}
    there = {**found, "corpora": {name: told for name, told in kept.items() if name in known["corpora"]}}
    if there != known:
        refuse_other(out, {"spec": there}, {"spec": known}, True)
    return {**spec, "corpora": {**kept, **spec["corpora"]}}


def _refuse_others(config: StudyConfig, out: Path, stores: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse runs that were made of other settings, stores or rows than this study would make them of."""
    from pipelines.study_check import run_differences, store_differences
    from pipelines.study_summary import run_cards

    ids = {
        (name, kind): open_artifact(path, "region-store")[1].artifact_id
        for name, own in stores.items()
        for kind, path in own.items()
        if path == config.corpora[name].store or (Path(path) / CARD).is_file()  # its own may be yet to come
    }
    cards = {run: run_cards(config, run, out) for run in plan(config)}
    for folder, difference in chain(store_differences(config, out), run_differences(config, cards, out, ids)):
        raise SpecMismatchError(
            f"{folder}: not of this study: {difference}",
            hint="restore the setting, name another folder with --out, or remove that folder to make the run again",
        )


def _stores(config: StudyConfig, corpus: Corpus, images: Path, out: Path) -> tuple[dict[str, str], list[Step]]:
    """Region stores by name, as arms ask for them; and what makes them."""
    settings = config.corpora[corpus.name]
    listed, folder, outlines = images / settings.images, out / corpus.name, images / (settings.outlines or "")
    found: dict[str, str] = {}
    steps: list[Step] = []

    def localized(name: str, **parts: Any) -> str:
        recipe = _recipe(folder / f"{name}.yaml", "localize", config.localize_config(corpus.name, **parts))
        store = str(folder / name)
        steps.append(Step(Path(store), ("localize", recipe, "--images", str(listed), "--out", store)))
        return store

    wanted = config.stores(corpus.name)
    if "localized" in wanted:
        found["localized"] = localized("regions") if settings.store is None else settings.store
    if "cross-fitted" in wanted:
        head = str(folder / "head")
        places = ("--images", str(listed), "--labels", str(outlines.resolve()), "--out", head)
        steps.append(Step(Path(head), ("fit-grounder", *places)))
        grounder = {"name": "lite", "options": {"head": head, "cross_fitted": True}}
        found["cross-fitted"] = localized("cross-fitted", grounder=grounder)
    if "oracle" in wanted:
        grounder = {"name": "oracle", "options": {"labels": str(outlines.resolve())}}
        found["oracle"] = localized("oracle", grounder=grounder, segmenter="none")
    return found, steps


def _steps(config: StudyConfig, run: Run, out: Path, images: Path, stores: dict[str, str]) -> list[Step]:
    """The commands of one run: an encoder, then a model for each endpoint."""
    arm, fold, folder = config.arms[run.arm], fold_folder(out, run.corpus, run.round, run.fold), run.folder(out)
    steps = []
    for made, settings in run_settings(config, run, fold).items():
        stage = "pretrain" if made == ENCODER else "finetune"
        places = ["--images", str(images), "--out", str(folder / made)]
        if stage == "pretrain":
            places += ["--regions", stores[arm.store]]
        else:
            places += ["--labels", str(fold / "labels.csv")]
            places += [] if arm.pretrain is None else ["--encoder", str(folder / ENCODER)]
        recipe = _recipe(folder / f"{stage if made == ENCODER else made}.yaml", stage, settings)
        steps.append(Step(folder / made, (stage, recipe, *places)))
    return steps


def _recipe(path: Path, section: str, config: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {section: yaml.safe_load(dump_yaml(config))}
    write_atomic(path, yaml.safe_dump(body, sort_keys=False, allow_unicode=True).encode())
    return str(path)


def _told(step: Step) -> str:
    return shlex.join(("mwm", *step.arguments)) + "\n"


def _run_all(steps: dict[Run, list[Step]], children: Children, jobs: int, after_fold: Callable[[], Any]) -> None:
    """Run what is not done, so many runs at a time; the first failure stops the others."""
    waiting = iter([run for run, own in steps.items() if not all(step.done for step in own)])
    total, done = len(steps), sum(all(step.done for step in own) for own in steps.values())
    _say(f"{next(iter(steps)).corpus}: {done} of {total} runs are done")
    left: dict[tuple[int, int], int] = {}
    for run, own in steps.items():
        if not all(step.done for step in own):
            left[run.round, run.fold] = left.get((run.round, run.fold), 0) + 1
    with Signals() as signals, ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[None], Run] = {}
        try:
            while True:
                while len(running) < jobs and (following := next(waiting, None)) is not None:
                    running[pool.submit(_one, steps[following], children)] = following
                if not running:
                    return
                ready, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                if signals.caught:
                    raise InterruptedRun(f"stopped by {signals.caught}; runs have saved their states")
                for future in ready:
                    run = running.pop(future)
                    future.result()
                    done += 1
                    left[run.round, run.fold] -= 1
                    _say(f"run {done}/{total}: {run.corpus}, round {run.round}, fold {run.fold}, {run.arm}")
                    if not left[run.round, run.fold]:
                        after_fold()
        except BaseException:
            children.stop()
            raise


def _one(steps: Sequence[Step], children: Children) -> None:
    for step in steps:
        if not step.done:
            children.run(step.arguments)


def _stoppable(children: Children, step: Step) -> None:
    with Signals() as signals, ThreadPoolExecutor(1) as pool:
        future = pool.submit(children.run, step.arguments)
        while not wait([future], timeout=1.0).done:
            if signals.caught:
                children.stop()
        future.result()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
