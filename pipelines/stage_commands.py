"""The commands that make artifacts: a thin skin over the stages' functions and `run_chain`."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from pipelines.options import (
    AsJson,
    DryRun,
    Fresh,
    Images,
    Out,
    Quiet,
    Recipe,
    Set,
    Verbose,
    check_artifact,
    command_told,
    is_study,
    print_json,
    read_config,
)
from shared.errors import UsageError


def localize(
    images: Images,
    out: Out,
    recipe: Recipe = "default",
    scheduler: Annotated[str | None, typer.Option(help="Dask scheduler address or file; default: local.")] = None,
    set_: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Text prompts and images -> region store: a probability map per image and region."""
    _refuse_torchrun("localize")
    from stage1_localize.config import LocalizeConfig

    config = read_config(LocalizeConfig, recipe, "localize", set_)
    if dry_run:
        from pipelines.dry_run import tell
        from stage1_localize.rehearse import rehearse

        tried = rehearse(config, images=images, out=out, scheduler=scheduler, fresh=fresh)
        return tell(tried.config, {"localize": tried.forecast}, as_json)
    from stage1_localize.job import localize as run

    done = _published(out, fresh)
    store = run(config, images=images, out=out, scheduler=scheduler, fresh=fresh, command=command_told())
    _close(store.path, store.card, done, as_json, f"mwm pretrain --images ... --regions {quote(str(out))} --out ...")


def pretrain(
    images: Images,
    regions: Annotated[str, typer.Option(help="Region store, PATH or PATH@sha256:... to pin it.")],
    out: Out,
    recipe: Recipe = "default",
    set_: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Images + a frozen region store -> encoder."""
    from stage2_pretrain.config import PretrainConfig

    config = read_config(PretrainConfig, recipe, "pretrain", set_)
    check_artifact(regions, "region-store")
    if dry_run:
        _refuse_torchrun("pretrain --dry-run")
        from pipelines.dry_run import tell
        from shared.regions import open_region_store
        from stage2_pretrain.rehearse import rehearse

        store = open_region_store(regions)
        forecast, resolved = rehearse(config, images=images, store=store, out=out, fresh=fresh)
        return tell(resolved, {"pretrain": forecast}, as_json)
    from stage2_pretrain.train import pretrain as run

    done = _published(out, fresh)
    made = run(config, images=images, regions=regions, out=out, fresh=fresh, command=command_told())
    from shared.ranks import speaks

    if speaks():  # under torchrun the command runs in each process
        following = f"mwm finetune --images ... --labels ... --encoder {quote(str(out))} --out ..."
        _close(made.path, made.card, done, as_json, following)


def finetune(
    images: Images,
    labels: Annotated[
        Path, typer.Option(help="CSV: sample_id, label (or labels, target), optionally group, split; or COCO.")
    ],
    out: Out,
    encoder: Annotated[
        str | None,
        typer.Option(help="Encoder, PATH or PATH@sha256:...; a folder that timm reads; timm:NAME; none: from scratch."),
    ] = None,
    recipe: Recipe = "default",
    set_: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Encoder + labels -> model and its scores on a test part that is touched once."""
    from stage3_finetune.config import FinetuneConfig

    config = read_config(FinetuneConfig, recipe, "finetune", set_)
    if encoder is not None and not encoder.startswith("timm:") and not (Path(encoder) / "config.json").is_file():
        check_artifact(encoder, "encoder")
    if dry_run:
        _refuse_torchrun("finetune --dry-run")
        from pipelines.dry_run import tell
        from stage3_finetune.rehearse import rehearse

        forecast, resolved = rehearse(config, images=images, labels=labels, encoder=encoder, out=out, fresh=fresh)
        return tell(resolved, {"finetune": forecast}, as_json)
    from stage3_finetune.train import finetune as run

    done = _published(out, fresh)
    made = run(config, images=images, labels=labels, encoder=encoder, out=out, fresh=fresh, command=command_told())
    _close(made.path, made.card, done, as_json, f"open {made.path / 'report.html'}")


def fit_grounder(
    images: Images,
    labels: Annotated[Path, typer.Option(help="COCO JSON: boxes, and outlines where there are any.")],
    out: Out,
    settings: Annotated[Path | None, typer.Argument(help="YAML file of settings; default: all defaults.")] = None,
    set_: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """COCO boxes or outlines -> head: new words for the grounder 'lite', from some thirty labelled images."""
    _refuse_torchrun("fit-grounder")
    from shared.config import load
    from stage1_localize.fit_config import FitGrounderConfig

    config = load(FitGrounderConfig, settings or {}, set_ or ())
    if dry_run:
        from pipelines.dry_run import tell
        from stage1_localize.fit_forecast import forecast

        resolved, expected = forecast(config, images=images, labels=labels, out=out, fresh=fresh)
        return tell(resolved, {"fit-grounder": expected}, as_json)
    from stage1_localize.fit_job import describe
    from stage1_localize.fit_job import fit_grounder as run

    done = _published(out, fresh)
    made = run(config, images=images, labels=labels, out=out, fresh=fresh, command=command_told())
    pinned = f"{out}@sha256:{made.card.artifact_id[:16]}"
    following = f"mwm localize ... --set grounder.name=lite --set grounder.options.head={quote(pinned)}"
    _close(made.path, made.card, done, as_json, following)
    for region in () if as_json else made.card.identity.outputs["regions"]:
        scores = made.card.provenance.metrics[region["name"]]
        typer.echo(f"{region['name']}: {describe(region['route'], scores)}")


def run_(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Option(help="Folder of the whole chain [runs/RECIPE].")] = None,
    images: Annotated[Path | None, typer.Option(help="Images, where the recipe does not bring its own.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Labels, where the recipe does not bring its own.")] = None,
    set_: Set = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole recipe: localize, pretrain, finetune, audit, report. 'mwm run tour' shows it all."""
    _refuse_torchrun("run")
    if is_study(recipe):
        if labels is not None:
            raise UsageError("--labels: a study names the labels of each corpus in its recipe", hint="drop it")
        return _study(recipe, out, images, set_, dry_run, fresh, as_json)
    from pipelines.chain import ChainConfig, run_chain

    config = read_config(ChainConfig, recipe, None, set_)
    out = out or Path("runs") / Path(recipe).stem
    if dry_run:
        from pipelines.dry_run import rehearse_chain, tell

        return tell(config, rehearse_chain(config, out=out, images=images, labels=labels, fresh=fresh), as_json)
    _published(out, fresh)
    summary = run_chain(config, out=out, images=images, labels=labels, fresh=fresh, command=command_told())
    if as_json:
        print_json(summary.as_dict())
    else:
        for line in summary.lines():
            typer.echo(line)


def _study(
    recipe: str,
    out: Path | None,
    images: Path | None,
    set_: list[str] | None,
    dry_run: bool,
    fresh: bool,
    as_json: bool,
) -> None:
    from pipelines.study_config import StudyConfig
    from shared.errors import InputMissingError

    config = read_config(StudyConfig, recipe, None, set_)
    out = out or Path("runs") / Path(recipe).stem
    if images is None or not images.is_dir():
        told = "not given" if images is None else f"{images}: no such folder"
        raise InputMissingError(f"--images: {told}", hint="the folder that holds the lists and labels of the study")
    if dry_run:
        from pipelines.dry_run import tell
        from pipelines.study_forecast import rehearse_study

        return tell(config, rehearse_study(config, out=out, images=images), as_json)
    from pipelines.study import run_study

    _published(out, fresh)
    made = run_study(config, out=out, images=images, fresh=fresh, command=command_told())
    _close(made.path, made.card, False, as_json, f"open {made.path / 'report.html'}")
    for claim, said in [] if as_json else made.card.provenance.metrics["claims"].items():
        typer.echo(f"{claim}: {said}")


def _refuse_torchrun(what: str) -> None:
    if "WORLD_SIZE" in os.environ:  # else torch need not be imported
        from shared import ranks

        ranks.refuse(what)


def _published(out: Path, fresh: bool) -> bool:
    from shared.workspace import refuse_unwritable

    done = not fresh and (out / "artifact.json").is_file()
    if not done:
        refuse_unwritable(out)
    return done


def _close(path: Path, card: Any, done: bool, as_json: bool, following: str) -> None:
    """The closing lines of a stage: what, where, digest, skipped, what next."""
    outputs = card.identity.outputs
    if as_json:
        return print_json({"path": str(path), "artifact_id": card.artifact_id, "outputs": outputs})
    counts = ", ".join(f"{key} {value}" for key, value in outputs.items() if isinstance(value, int))
    typer.echo(f"{'already done' if done else 'made'}: {card.identity.kind} ({counts or 'complete'})")
    typer.echo(f"where: {path}")
    typer.echo(f"digest: sha256:{card.artifact_id}")
    typer.echo(f"skipped: {outputs.get('quarantined', 0)} inputs quarantined")
    typer.echo(f"next: {following}")
