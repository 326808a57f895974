"""`fit_grounder`: labelled images in, a published head for `lite` out; the same call again continues."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.artifact import CARD, NOT_FOR_DIAGNOSIS, Artifact, publish, read_card, write_atomic
from shared.coco import Labelled
from shared.config import dump_yaml, failures_allowed
from shared.cores import cores
from shared.corpus import write_corpus
from shared.errors import DecodeError, DiskFullError, InterruptedRun, QuarantineError
from shared.lease import Lease
from shared.runlog import RunLog, scrub
from shared.signals import Signals
from shared.workspace import begin, set_aside
from stage1_localize.choose import choose, honest_scores, tries_without
from stage1_localize.fit_config import FitGrounderConfig
from stage1_localize.fit_plan import Plan, open_images, plan
from stage1_localize.fit_pool import run_tasks
from stage1_localize.fit_report import write_report
from stage1_localize.fit_tasks import EMBEDDINGS, FITS, embed, fit, read_fit, read_labelled, tried_of
from stage1_localize.grounders.lite_card import KIND, Card, Concept, build_head, pixels_sha256, write_folds, write_head

QUARANTINE = "quarantine.jsonl"
EMBEDDING_BYTES = 2_097_280


def fit_grounder(
    config: FitGrounderConfig, *, images: Path, labels: Path, out: Path, fresh: bool = False, command: str = ""
) -> Artifact:
    """Fit a head of `lite` on labelled images and publish it.

    Args:
        config: Words and settings.
        images: Folder of images, or a CSV or JSONL list of them; only those that the labels list are used.
        labels: COCO JSON: boxes, and outlines where there are any.
        out: The run's folder, which becomes the head; the same call on it continues, or is done at once.
        fresh: Keep an existing run aside and start anew.
        command: Command line for provenance, paths replaced by placeholders.

    Returns:
        The published head.

    Raises:
        UsageError: Labels, images or settings that do not fit (every fault of the labels is told at once).
        QuarantineError: More images failed than ``max_failures``.
        InterruptedRun: SIGTERM or SIGINT; the same call continues, finished embeddings and fits are kept.
        DiskFullError: No room; the same call continues.
        LockedError: Another process writes in ``out``.
    """
    ready = plan(config, images=images, labels=labels)
    out = out.resolve()
    done = (out / CARD).exists() and not fresh
    usable, failed = ([], {}) if done else open_images(labels, ready.labels)
    if fresh:
        set_aside(out)
    with Lease(out):
        status, card = begin(
            out, kind=KIND, inputs=ready.inputs, spec=ready.spec(), resolved=scrub(dump_yaml(ready.config)), fresh=fresh
        )
        if status != "done":
            with RunLog(out) as log, Signals() as signals:
                run = _Run(ready, usable, failed, out, log, signals, command)
                run.refuse_failures()
                run.compute()
                run.finish()
    return Artifact(out, card or read_card(out, KIND))


@dataclass
class _Run:
    """One call's way from labels to a card."""

    plan: Plan
    usable: Sequence[Labelled]
    failed: Mapping[str, DecodeError]
    out: Path
    log: RunLog
    signals: Signals
    command: str

    def refuse_failures(self) -> None:
        """End the run where too many images cannot be read."""
        total = len(self.plan.labels.images)
        allowed = failures_allowed(self.plan.config.max_failures, total)
        for reason, count in sorted(Counter(error.reason for error in self.failed.values()).items()):
            self.log.warn(f"{count} of {total} images quarantined: {reason}; see {QUARANTINE}")
        if len(self.failed) > allowed or not self.usable:
            raise QuarantineError(
                f"{self.out.name}: {len(self.failed)} of {total} images failed, max_failures allows {allowed}",
                hint="raise max_failures and run the same command",
            )

    def compute(self) -> None:
        """Embed every image once, then fit: once a fold, and once on all."""
        if not (self.out / "corpus" / CARD).exists():
            write_corpus(self.out / "corpus", self.plan.corpus, command=self.command)
        for text in self.plan.warnings:
            self.log.warn(text)
        tasks = self.plan.tasks(self.out, self.usable)
        todo = [task for task in tasks if read_fit(task) is None]
        if len(todo) < len(tasks):
            self.log.info(f"continuing: {len(tasks) - len(todo)} of {len(tasks)} fits are done")
        if not todo:
            return
        self._refuse_without_room()
        self._all("image embedded", embed, [(str(self.out), item) for item in self.usable])
        self.log.info(
            f"{len(tasks)} fits of {self.plan.settings.steps} steps: {len(tasks) - 1} folds to choose routes and "
            "score them, one on all images to keep"
        )
        self._all("fit", fit, todo, done=len(tasks) - len(todo))

    def finish(self) -> None:
        """Choose routes, score them, report, publish."""
        plan, tasks = self.plan, self.plan.tasks(self.out, self.usable)
        subject = plan.subject(self.out)
        tries: dict[str, list[Any]] = {name: [] for name in plan.wordings}
        heads = {}
        for task in tasks[:-1]:
            found = read_fit(task)
            assert found is not None
            heads[task.fold] = found[0]
            for name, rows in found[1].items():
                tries[name] += rows
        kept = read_fit(tasks[-1])
        assert kept is not None
        tried = tried_of(subject)
        concepts = {name: tried[name][choose(rows)] for name, rows in tries.items()}
        scores = {name: honest_scores(rows) for name, rows in tries.items()}
        card = self._card(concepts, scores, self.usable)
        folds = {}
        held_out = {}
        for task in tasks[:-1]:
            others = {name: tries_without(task.fold, rows) for name, rows in tries.items()}
            rules = {name: tried[name][choose(rows) if rows else 0] for name, rows in others.items()}
            folds[task.fold] = (self._card(rules, {}, task.train), heads[task.fold])
            for item in task.held_out:
                self._stop_if_asked()
                held_out[item.source.sample_id] = (task.fold, pixels_sha256(read_labelled(item).pixels))
        digests = write_head(self.out, card, kept[0]) | write_folds(self.out, folds, held_out)
        lines = [
            {"sample_id": name, "reason": error.reason, "stage": "read", "message": str(error)}
            for name, error in sorted(self.failed.items())
        ]
        write_atomic(self.out / QUARANTINE, "".join(json.dumps(line) + "\n" for line in lines).encode())
        write_report(
            self.out,
            card,
            {fold: build_head(state) for fold, state in heads.items()},
            tasks[:-1],
            quarantined=Counter(error.reason for error in self.failed.values()),
            warnings=self.log.warnings,
            stop=self._stop_if_asked,
        )
        publish(
            self.out,
            kind=KIND,
            inputs=plan.inputs,
            spec=plan.spec(),
            outputs={
                "images": len(self.usable),
                "quarantined": len(self.failed),
                "regions": [{"name": name, "route": concept.route} for name, concept in concepts.items()],
                **digests,
            },
            command=self.command,
            metrics=scores,
        )
        for state in (EMBEDDINGS, FITS):
            shutil.rmtree(self.out / state, ignore_errors=True)

    def _card(self, concepts: Mapping[str, Concept], scores: Mapping[str, Any], learnt: Sequence[Labelled]) -> Card:
        from importlib.metadata import version

        config, labels = self.plan.config, self.plan.labels
        names = ", ".join(concepts)
        silence = (
            "An image of the labels without an annotation of a category was taken to hold none of it."
            if config.exhaustive
            else "Where the labels say nothing of a category it was unknown: this head cannot say that it is absent."
        )
        return Card(
            name="lite, fitted",
            weights_sha256="",
            not_for_diagnosis=f"{NOT_FOR_DIAGNOSIS} A closed vocabulary: this head knows {names} and nothing else, "
            f"also not what the packaged head knows. {silence}",
            concepts=dict(concepts),
            foreign=self.plan.foreign,
            data={"labels": f"{len(learnt)} images of the user, under the user's terms"},
            fit={
                "things": dict(Counter(thing.region for item in learnt for thing in item.things)),
                "outlined": sorted(labels.outlined),
                **{key: value for key, value in self.plan.spec().items() if key not in ("regions", "foreign")},
                "scored": "by cross-validation over groups: every image was answered by a head that was fitted "
                "without its group, with a route and thresholds chosen without its fold; 95 % intervals by group. "
                "The head that is kept was fitted on all images."
                if scores
                else "a head of that cross-validation: its routes and thresholds were chosen on the other folds.",
                "software": {name: version(name) for name in ("torch", "transformers", "numpy")},
            },
            scores=dict(scores),
        )

    def _all(self, unit: str, function: Callable[[Any], Any], tasks: Sequence[Any], done: int = 0) -> None:
        total, workers = done + len(tasks), self.plan.config.workers
        for _ in run_tasks(
            function,
            tasks,
            workers=cores() if workers == "auto" else workers,
            stopped=lambda: self.signals.caught is not None,
        ):
            done += 1
            self.log.progress(done, total, unit)
        self._stop_if_asked()

    def _refuse_without_room(self) -> None:
        needed = len(self.usable) * EMBEDDING_BYTES
        free = shutil.disk_usage(self.out).free
        if free < needed and not (self.out / EMBEDDINGS).exists():
            raise DiskFullError(
                f"{self.out}: about {needed} bytes are needed for {len(self.usable)} embeddings, {free} are free",
                hint="make room, then run the same command",
            )

    def _stop_if_asked(self) -> None:
        if self.signals.caught is not None:
            embedded = len(os.listdir(self.out / EMBEDDINGS)) if (self.out / EMBEDDINGS).exists() else 0
            raise InterruptedRun(
                f"{self.out.name}: {self.signals.caught}; {embedded} embeddings and every finished fit are kept",
                hint="run the same command: it continues",
            )


def describe(route: str, scores: Mapping[str, Any]) -> str:
    """Route and scores of a region, with 95 % intervals and counts."""
    told = [
        f"{shown} {scores[key][0]:.2f} [{scores[key][1]:.2f}, {scores[key][2]:.2f}]"
        for key, shown in (("dice", "Dice"), ("precision", "box precision"), ("recall", "recall"), ("f1", "F1"))
        if key in scores
    ]
    counts = f"on {scores.get('images', 0)} held-out images of {scores.get('groups', 0)} groups"
    if "false_regions" in scores:
        counts += f"; found in {scores['false_regions'][0]:.0%} of {scores['images_without']} images without it"
    return f"route {route}; {', '.join(told)} {counts}"
