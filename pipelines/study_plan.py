"""Folds of a study that never cut through a group, the lists that its stages read, and the runs that it is made of."""

from __future__ import annotations

import csv
import io
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.study_config import ENCODER, StudyConfig
from shared.artifact import file_sha256, write_atomic
from shared.backbones import resolve_options
from shared.config import digest, validate
from shared.errors import ConfigError
from shared.images import Source, find_sources
from stage1_localize.contracts import Region
from stage2_pretrain.config import PretrainConfig
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.contracts import Example, Targets
from stage3_finetune.labels import by_group, drawn_order, split_by_group


@dataclass(frozen=True)
class Corpus:
    """A corpus as it was found.

    Attributes:
        name: In the study.
        examples: Labelled rows, sorted by id.
        images: The list of images.
        sources: Images, by id.
        targets: The labels as the task reads them.
        labels: Where the labels are.
        outlines_sha256: Of the file of outlines; None without one.
        column: Name of the column that holds the label.
        cells: What stands in that column, by id.
    """

    name: str
    examples: tuple[Example, ...]
    images: Path
    sources: dict[str, Source]
    targets: Targets
    labels: Path
    outlines_sha256: str | None
    column: str
    cells: dict[str, str]

    @property
    def sha256(self) -> str:
        """Digest of ids, labels and groups."""
        return digest([[row.sample_id, row.label, row.group] for row in self.examples])


@dataclass(frozen=True)
class Run:
    """One arm on one fold: an encoder, and one model an endpoint."""

    corpus: str
    round: int
    fold: int
    arm: str

    def folder(self, out: Path) -> Path:
        """Where it is kept."""
        return fold_folder(out, self.corpus, self.round, self.fold) / self.arm

    def seed(self, config: StudyConfig) -> int:
        """Of everything that is drawn in it; alike in all arms."""
        return config.seed + self.round * config.folds + self.fold


def fold_folder(out: Path, corpus: str, round_: int, fold: int) -> Path:
    """Where the lists and runs of a fold are kept."""
    return out / corpus / f"round-{round_}" / f"fold-{fold}"


def plan(config: StudyConfig) -> list[Run]:
    """Every run, whole folds at a time, one corpus after another: what is done first can be compared first.

    A round of one corpus says more than single folds of several, of which none could resolve anything.
    """
    return [
        Run(corpus, round_, fold, arm)
        for round_ in range(config.rounds)
        for corpus in config.corpora
        for fold in range(config.folds)
        for arm in config.arms_of(corpus)
    ]


def run_settings(config: StudyConfig, run: Run, fold: Path) -> dict[str, PretrainConfig | FinetuneConfig]:
    """Settings of what a run makes, in order: the study's own, the arm's over them, and the run's seed.

    Args:
        config: The study.
        run: One arm on one fold.
        fold: Folder of the fold's lists.
    """
    arm, endpoints = config.arms[run.arm], config.corpora[run.corpus].endpoints
    found: dict[str, PretrainConfig | FinetuneConfig] = {}
    for made in config.made(run.corpus, run.arm):
        if made == ENCODER:
            own = {"seed": run.seed(config), "subset": str((fold / "train.csv").resolve())}
            settings = {**config.pretrain.model_dump(mode="json"), **(arm.pretrain or {}), **own}
            found[made] = PretrainConfig.model_validate(settings)
            continue
        settings = {**config.finetune.model_dump(mode="json"), **endpoints[made].finetune, "seed": run.seed(config)}
        if arm.pretrain is None:
            settings |= architecture(config)
        found[made] = FinetuneConfig.model_validate(settings)
    return found


def architecture(config: StudyConfig) -> dict[str, Any]:
    """The encoder of a study, as a model from scratch is told of it."""
    options = resolve_options(config.pretrain.backbone, config.pretrain.backbone_options)
    return {"backbone": config.pretrain.backbone, "backbone_options": options, "channels": config.pretrain.channels}


def read_corpus(config: StudyConfig, name: str, images: Path) -> Corpus:
    """Find a corpus and check that it can be cut into folds.

    Args:
        config: The study.
        name: Of the corpus.
        images: Folder that the study's paths are relative to.

    Raises:
        MwmError: What a stage would refuse; ConfigError: labels with parts of their own, or groups too few.
    """
    corpus = config.corpora[name]
    labels = images / corpus.labels
    sources = {source.sample_id: source for source in find_sources(images / corpus.images)}
    targets = _targets(config, name, labels, sources)
    names = {source.known_as: key for key, source in sources.items() if source.known_as is not None}
    examples, grouped = targets.read({key: source.group for key, source in sources.items()}, names)
    if not grouped:
        raise ConfigError(f"corpus {name}: not every row has a group", hint="a study is split by groups: name them")
    if examples[0].split is not None:
        raise ConfigError(f"corpus {name}: labels with parts of their own", hint="a study makes folds: drop 'split'")
    if missing := [row.sample_id for row in examples if row.sample_id not in sources]:
        shown = "" if names else f", as {missing[0]!a}"  # where ids are pseudonyms, it may be a patient's name
        raise ConfigError(f"corpus {name}: {len(missing)} labelled samples are not among the images{shown}")
    column, cells = _cells(labels, names)
    ordered = tuple(sorted(examples, key=lambda row: row.sample_id))
    outlines = None if corpus.outlines is None else file_sha256(images / corpus.outlines)
    if corpus.outlines is not None and "cross-fitted" in config.stores(name):
        _refuse_unfit(config.localize_config(name).asked(), images / corpus.images, images / corpus.outlines)
    return Corpus(name, ordered, images / corpus.images, sources, targets, labels, outlines, column, cells)


def _refuse_unfit(regions: Sequence[Region], images: Path, outlines: Path) -> None:
    """Refuse what a head fitted on the outlines would refuse, an hour later: other words, images that they lack."""
    from stage1_localize.fit_config import FitGrounderConfig
    from stage1_localize.fit_plan import plan
    from stage1_localize.grounders.lite_text import fold

    ready = plan(FitGrounderConfig(), images=images, labels=outlines)
    known = {text for texts in ready.wordings.values() for text in texts}
    if unknown := [text for region in regions for text in region.texts if fold(text) not in known]:
        raise ConfigError(
            f"{outlines.name}: '{unknown[0]}' is no category of these outlines, which cross-fitted regions learn from",
            hint=f"ask for {', '.join(ready.wordings)}",
        )
    listed = {row.sample_id for row in ready.corpus}
    if missing := [source.sample_id for source in find_sources(images) if source.sample_id not in listed]:
        raise ConfigError(
            f"{outlines.name}: {len(missing)} images of {images.name} are not listed; cross-fitted regions need all",
            hint="list them, without annotations where they hold nothing",
        )


def _targets(config: StudyConfig, name: str, labels: Path, sources: dict[str, Source]) -> Targets:
    """The labels of a corpus as its task reads them: one task a corpus."""
    from stage3_finetune.tasks import TASKS

    asked = [
        {**config.finetune.model_dump(), **endpoint.finetune} for endpoint in config.corpora[name].endpoints.values()
    ]
    tasks = sorted({str(settings["task"]) for settings in asked})
    if len(tasks) > 1:
        raise ConfigError(f"corpus {name}: endpoints of several tasks, {', '.join(tasks)}; one is expected")
    if labels.suffix.lower() != ".csv":
        raise ConfigError(
            f"corpus {name}: labels {labels.name}: a study takes a table, with the column 'target' for files"
        )
    task = TASKS.load(tasks[0])
    targets: Targets = task.Targets(labels, options=validate(task.Options, asked[0]["options"]), sources=sources)
    return targets


def folds_of(examples: Sequence[Example], targets: Targets, *, folds: int, seed: int) -> dict[str, int]:
    """Put whole groups into folds, each stratum about alike: the next group goes where fewest of its stratum are.

    Raises:
        ConfigError: A stratum has fewer groups than there are folds.
    """
    members = by_group(examples)
    fold: dict[str, int] = {}
    for groups in drawn_order(members, targets.strata, "study/folds", seed):
        if len(groups) < folds:
            stratum = targets.strata(members[groups[0]][0])
            raise ConfigError(f"{stratum!a}: {len(groups)} groups, fewer than {folds} folds")
        sizes = [0] * folds
        for group in sorted(groups, key=lambda name: -len(members[name])):  # stable: large ones first, then as drawn
            chosen = min(range(folds), key=lambda place: (sizes[place], place))
            fold[group] = chosen
            sizes[chosen] += len(members[group])
    return fold


def fold_rows(corpus: Corpus, config: StudyConfig, round_: int, fold: int) -> list[Example]:
    """The rows of a corpus with the parts that they have in a fold."""
    seed = config.seed + round_
    place = folds_of(corpus.examples, corpus.targets, folds=config.folds, seed=seed)
    tested = [replace(row, split="test") for row in corpus.examples if place[row.group] == fold]
    others = [row for row in corpus.examples if place[row.group] != fold]
    # Its "test" is our val: nothing is tested here.
    rest = split_by_group(
        others, corpus.targets.strata, val_milli=0, test_milli=config.val_milli, seed=seed * config.folds + fold
    )
    parts = {"train": "train", "test": "val"}
    return sorted(
        [*tested, *(replace(row, split=parts[str(row.split)]) for row in rest)], key=lambda row: row.sample_id
    )


def write_fold(corpus: Corpus, rows: Sequence[Example], folder: Path) -> None:
    """Write ``train.csv``, the samples that pretraining may see, and ``labels.csv`` with the parts."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "train.csv", ("sample_id",), ((row.sample_id,) for row in rows if row.split == "train"))
    cells = {
        row.sample_id: Path(os.path.relpath(corpus.labels.parent / corpus.cells[row.sample_id], folder)).as_posix()
        if corpus.column == "target"
        else corpus.cells[row.sample_id]
        for row in rows
    }
    columns = ("sample_id", corpus.column, "group", "split")
    lines = ((row.sample_id, cells[row.sample_id], row.group, str(row.split)) for row in rows)
    _write(folder / "labels.csv", columns, lines)


def _cells(labels: Path, names: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The column of the label, and its cells by sample id; the table has been checked before."""
    rows = list(csv.DictReader(io.StringIO(labels.read_text(encoding="utf-8-sig"))))
    column = next(name for name in ("label", "labels", "target") if name in rows[0])
    key = "sample_id" if "sample_id" in rows[0] else "image"
    given = {unicodedata.normalize("NFC", row[key]): row[column] for row in rows}
    return column, {names.get(name, name): cell for name, cell in given.items()}


def _write(path: Path, columns: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
