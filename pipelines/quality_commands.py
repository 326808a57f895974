"""The commands that ask how good regions are: against labels, and of wordings against one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import AsJson, Images, Quiet, Recipe, Set, Verbose, check_artifact, print_json, read_config


def score(
    store: Annotated[str, typer.Argument(help="Region store, PATH or PATH@sha256:... to pin it.")],
    labels: Annotated[Path, typer.Option(help="COCO JSON: boxes, and outlines where there are any.")],
    images: Annotated[
        Path | None, typer.Option(help="The store's images: for pictures, and to match names of DICOM files.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write report.html and scores.json in this folder.")] = None,
    map_: Annotated[
        list[str] | None, typer.Option("--map", help="region=category of the labels; repeatable, several unite.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Category whose places count neither way; repeatable.")
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="The labels name all there is: no annotation means not there.")
    ] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compare a region store with labels: Dice, boxes, coverage, calibration, with 95 % intervals."""
    from shared.images import find_sources
    from shared.regions import open_region_store
    from stage1_localize.score import score_store
    from stage1_localize.score_labels import join_labels
    from stage1_localize.score_report import as_dict, write_score

    check_artifact(store, "region-store")
    _refuse_out(out)
    opened = open_region_store(store)
    sources = find_sources(images) if images is not None else []
    truth = join_labels(opened, labels, sources=sources, mapping=map_ or (), ignore=ignore or (), exhaustive=exhaustive)
    for warning in truth.warnings:
        typer.echo(f"warning: {warning}", err=True)
    scores, measured = score_store(opened, truth, exhaustive=exhaustive)
    if out is not None:
        write_score(out, opened, truth, scores, measured, sources=sources, exhaustive=exhaustive)
    if as_json:
        return print_json(as_dict(opened, truth, scores, exhaustive))
    for region, found in scores.items():
        told = [f"{name} {_told(found[key])}" for key, name in _SHOWN.items() if key in found]
        told += [f"{found[key]} images {name}" for key, name in _COUNTED.items() if found[key]]
        alone = found["groups"] == 1
        told.append("one group: its intervals say nothing" if alone else f"{found['groups']} groups")
        typer.echo(f"{region}: {', '.join(told)}")
    if out is not None:
        typer.echo(f"where: {out}")
        typer.echo(f"next: open {out / 'report.html'}")
    return None


def wordings(
    images: Images,
    recipe: Recipe = "default",
    set_: Set = None,
    labels: Annotated[Path | None, typer.Option(help="COCO JSON with outlines: then each wording has a Dice.")] = None,
    map_: Annotated[
        list[str] | None, typer.Option("--map", help="region=category of the labels; repeatable, several unite.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=4096, help="Images to try, spread over the corpus.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images and of the intervals.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write report.html and wordings.json in this folder.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Compare wordings of a region, each asked alone: where they agree, and with labels which is right."""
    from shared.images import find_sources
    from stage1_localize.config import LocalizeConfig
    from stage1_localize.wordings import compare_wordings
    from stage1_localize.wordings_report import write_wordings

    config = read_config(LocalizeConfig, recipe, "localize", set_)
    _refuse_out(out)
    told, pictured = compare_wordings(
        config, find_sources(images), count=count, labels=labels, mapping=map_ or (), seed=seed
    )
    for warning in told["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if out is not None:
        write_wordings(out, told, pictured)
    if as_json:
        return print_json(told)
    for name, region in told["regions"].items():
        for text, row in region["wordings"].items():
            if "refused" in row:
                typer.echo(f"{name}: '{text}': refused; {row['hint'] or row['refused']}")
                continue
            dice = f", Dice {_told(row['dice'])}" if "dice" in row else ""
            typer.echo(f"{name}: '{text}': found in {row['found_share'][0]:.0%}, mean {row['mass'][0]:.4f}{dice}")
        for pair in region["pairs"]:
            agreed = f"Dice {_told(pair['dice'])}" if "dice" in pair else "neither finds anything"
            typer.echo(f"{name}: {' / '.join(map(repr, pair['wordings']))}: {agreed}")
    if out is not None:
        typer.echo(f"where: {out}")
        typer.echo(f"next: open {out / 'report.html'}")
    return None


_SHOWN = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "box precision",
    "recall": "recall",
    "average_precision": "average precision",
    "pixel_ece": "calibration error of pixels",
    "false_regions": "found where it is not",
}
_COUNTED = {"images": "with it", "images_without": "without it", "images_unknown": "unknown"}


def _told(triple: list[float]) -> str:
    return f"{triple[0]:.3f} ({triple[1]:.2f} to {triple[2]:.2f})"


def _refuse_out(out: Path | None) -> None:
    """A report is neither written into an artifact nor over one."""
    from shared.artifact import CARD
    from shared.errors import UsageError
    from shared.workspace import refuse_inside_artifact, refuse_unwritable

    if out is None:
        return
    refuse_unwritable(out)
    refuse_inside_artifact(out / "report.html")
    if (out / CARD).exists():
        raise UsageError(f"{out}: is a published artifact", hint="name another folder with --out")
