"""What a study would cost, and the smallest difference that it could show: known before it runs. Nothing is written."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.dry_run import StandIn
from pipelines.study_config import ENCODER, StudyConfig
from pipelines.study_plan import Corpus, Run, architecture, fold_rows, plan, read_corpus, run_settings, write_fold
from pipelines.study_stats import expected_error, expected_smallest
from shared.artifact import CARD
from shared.forecast import Forecast, refuse_unusable
from shared.pseudonyms import unsalted
from shared.runlog import duration
from stage2_pretrain.config import PretrainConfig
from stage3_finetune.config import FinetuneConfig


@unsalted()
def rehearse_study(config: StudyConfig, *, out: Path, images: Path) -> dict[str, Forecast]:
    """Try one run of each kind on the first fold of each corpus, and multiply.

    Args:
        config: The study.
        out: Its folder; need not exist.
        images: Folder that its paths are relative to.

    Returns:
        A forecast a corpus; runs that are done cost nothing.

    Raises:
        MwmError: What the study would refuse before its first run is done.
    """
    refuse_unusable(out)
    return {name: _corpus(config, read_corpus(config, name, images), out, images) for name in config.corpora}


def power_line(config: StudyConfig, groups: int) -> str:
    """The smallest difference that a study could tell from none, by the pilot that its settings name."""
    error = expected_error(config.pilot_spread_milli / 1000, config.pilot_correlation_milli / 1000, groups)
    smallest = expected_smallest(error, config.folds * config.rounds, config.overlap)
    return (
        f"about {100 * smallest:.1f} points is the smallest difference that {groups} groups could show (80 % "
        f"power, 5 % level; a score varies by {config.pilot_spread_milli / 10:g} points over single groups, two arms' "
        f"correlate by {config.pilot_correlation_milli / 1000:g})"
    )


def _corpus(config: StudyConfig, corpus: Corpus, out: Path, images: Path) -> Forecast:
    settings, arms = config.corpora[corpus.name], config.arms_of(corpus.name)
    tried: dict[str, Forecast] = {}
    with tempfile.TemporaryDirectory(prefix="mwm-dry-run-") as place:
        folder = Path(place)
        rows = fold_rows(corpus, config, 0, 0)
        write_fold(corpus, rows, folder)
        training = sum(row.split == "train" for row in rows)
        first = next((name for name, arm in arms.items() if arm.pretrain is not None), None)
        if first is not None:
            _say(corpus, "localize")
            store, count = _store(config, corpus, out, images, tried)
            run = Run(corpus.name, 0, 0, first)
            if "localized" not in config.stores(corpus.name):
                tried.clear()  # the maps that were tried stand in for others
            if "cross-fitted" in config.stores(corpus.name):
                _say(corpus, "fit-grounder")
                _cross_fit(config, corpus, out, images, tried)
            _say(corpus, ENCODER)
            tried[ENCODER] = _pretrain(config, run, corpus, store, count and training, folder)
        for name in settings.endpoints:
            run = Run(corpus.name, 0, 0, first or next(iter(arms)))
            _say(corpus, name)
            tried[name] = _finetune(config, run, name, corpus, folder)
    ahead = {name: 1 for name, item in tried.items() if name not in (ENCODER, *settings.endpoints) and item.seconds}
    seconds = sum(tried[name].seconds for name in ahead)  # each on all cores, before the runs
    left = {name: 0 for name in tried if name not in ahead}
    for run in plan(config):
        if run.corpus != corpus.name:
            continue
        for made in config.made(run.corpus, run.arm):
            left[made] += not (run.folder(out) / made / CARD).is_file()
    seconds += sum(count * tried[name].seconds for name, count in left.items()) / config.jobs
    told = ", ".join(
        f"{count} x {name} of {duration(tried[name].seconds)}" for name, count in {**ahead, **left}.items() if count
    )
    groups = len({row.group for row in corpus.examples})
    return Forecast(
        out / corpus.name,
        "new" if seconds else "done",
        {"images": f"{len(corpus.examples)} in {groups} groups", "power": power_line(config, groups)},
        seconds=seconds,
        disk_bytes=sum(count * tried[name].disk_bytes for name, count in {**ahead, **left}.items()),
        memory_bytes=config.jobs * max(item.memory_bytes for item in tried.values()),
        how={
            "time": f"{told or 'nothing'} to do, {config.jobs} at a time",
            "disk": "all runs",
            "memory": "runs at a time",
        },
        warnings=sorted({line for item in tried.values() for line in item.warnings}),
    )


def _say(corpus: Corpus, tried: str) -> None:
    """Trials of a large study take minutes each."""
    print(f"{corpus.name}: trying {tried}", file=sys.stderr, flush=True)


def _store(
    config: StudyConfig, corpus: Corpus, out: Path, images: Path, tried: dict[str, Forecast]
) -> tuple[Any, int | None]:
    """The region store, or a stand-in of the images just tried and how many there would be."""
    from shared.regions import open_region_store
    from stage1_localize.rehearse import rehearse

    given = config.corpora[corpus.name].store
    if given is not None:
        return open_region_store(given), None
    folder = out / corpus.name / "regions"
    found = rehearse(config.localize_config(corpus.name), images=corpus.images, out=folder)
    tried["localize"] = found.forecast
    if found.forecast.standing == "done":
        return open_region_store(folder), None
    return StandIn(found), found.count


def _cross_fit(config: StudyConfig, corpus: Corpus, out: Path, images: Path, tried: dict[str, Forecast]) -> None:
    """Heads of folds, and the images once more by these."""
    from stage1_localize.fit_config import FitGrounderConfig
    from stage1_localize.fit_forecast import forecast
    from stage1_localize.rehearse import rehearse

    folder, outlines = out / corpus.name, images / (config.corpora[corpus.name].outlines or "")
    _, fitting = forecast(FitGrounderConfig(), images=corpus.images, labels=outlines, out=folder / "head")
    tried["fit-grounder"] = fitting
    if not (folder / "cross-fitted" / CARD).is_file():
        # A fitted head costs what the packaged one does, which may not know the words.
        again = config.localize_config(corpus.name, grounder="lite", regions={"tumour": "tumour"})
        tried["localize, cross-fitted"] = rehearse(again, images=corpus.images, out=folder / "none").forecast


def _pretrain(config: StudyConfig, run: Run, corpus: Corpus, store: Any, count: int | None, folder: Path) -> Forecast:
    from stage2_pretrain.rehearse import rehearse

    settings = run_settings(config, run, folder)[ENCODER]
    assert isinstance(settings, PretrainConfig)
    if count is not None:  # a stand-in holds a few samples only
        settings = settings.model_copy(update={"subset": None})
    found, _ = rehearse(settings, images=corpus.images, store=store, out=folder / "none", count=count)
    return found


def _finetune(config: StudyConfig, run: Run, endpoint: str, corpus: Corpus, folder: Path) -> Forecast:
    from stage3_finetune.rehearse import rehearse

    settings = run_settings(config, run, folder)[endpoint].model_copy(update=architecture(config))
    assert isinstance(settings, FinetuneConfig)
    labels = folder / "labels.csv"
    found, _ = rehearse(settings, images=corpus.images, labels=labels, encoder=None, out=folder / "none", planned=True)
    warnings = [line for line in found.warnings if "have no row" not in line]
    return replace(found, warnings=warnings)
