"""The commands that look at artifacts and at the installation: a thin skin over `audit`, `inspect` and `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer

from pipelines.options import AsJson, Quiet, Verbose, check_exportable, command_told, print_json, refuse_file


def audit(
    path: Annotated[Path, typer.Argument(help="An artifact, or a folder that holds artifacts.")],
    level: Annotated[str, typer.Option(help="integrity, masks, maps (needs --images), or all.")] = "integrity",
    regions: Annotated[Path | None, typer.Option(help="The region store of an encoder, if not beside it.")] = None,
    images: Annotated[Path | None, typer.Option(help="What a store was made from, to make its maps again.")] = None,
    nonce: Annotated[str | None, typer.Option(help="Your own word; it draws the rows [a fresh one, printed].")] = None,
    rows: Annotated[str | None, typer.Option(help="Rows whose maps are made again, or 'all' [299].")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A localize setting that named a file elsewhere; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also publish the audit as an artifact in this folder.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Check that artifacts are what was published; redraw every witnessed mask; make a sample of maps again."""
    from pipelines.audit import audit as run

    refuse_file(path)
    again = _again(level, images, nonce, rows, set_, quiet)
    result = run(path, level=level, regions=regions, out=out, command=command_told(), again=again)
    if as_json:
        print_json(result.as_dict())
    else:
        for line in result.lines():
            typer.echo(line)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _again(
    level: str, images: Path | None, nonce: str | None, rows: str | None, set_: list[str] | None, quiet: bool
) -> Any:
    """How maps are made again, or None."""
    from pipelines.audit_maps import Again, fresh_nonce, rows_asked
    from shared.errors import UsageError

    if images is None or level not in ("maps", "all"):
        given = {"--images": images, "--nonce": nonce, "--rows": rows, "--set": set_}
        named = [name for name, value in given.items() if value]
        if named:
            raise UsageError(f"{', '.join(named)}: for --level maps or all, with --images")
        return None
    how = Again(images, nonce or fresh_nonce(), rows_asked(rows), tuple(set_ or ()))
    if quiet:
        return how
    from dataclasses import replace

    from shared.runlog import RunLog

    log = RunLog(Path())  # not entered: it talks, and writes nothing
    return replace(how, progress=lambda done, total: log.progress(done, total, "row made again"))


def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact; with --sample also a chain's folder.")],
    sample: Annotated[str | None, typer.Option(help="Sample id of a region store or an encoder.")] = None,
    epoch: Annotated[int | None, typer.Option(help="With an encoder: draw its mask of this epoch again [-1].")] = None,
    view: Annotated[int | None, typer.Option(help="Which draw of the epoch [0].")] = None,
    images: Annotated[Path | None, typer.Option(help="The store's images, for a picture.")] = None,
    regions: Annotated[Path | None, typer.Option(help="The encoder's region store, if not beside it.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG: image, regions, window, coverage, hidden patches.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what an artifact is, or one sample with its regions and its mask at an epoch, drawn again."""
    from pipelines.inspect import inspect_artifact, inspect_sample
    from shared.errors import DriftError, UsageError

    same = True
    refuse_file(path)
    if sample is None:
        if any(value is not None for value in (epoch, view, images, regions, out)):
            raise UsageError("--epoch, --view, --images, --regions and --out need --sample")
        facts = inspect_artifact(path)
    else:
        facts, same = inspect_sample(path, sample, images=images, regions=regions, epoch=epoch, view=view, out=out)
    if as_json:
        print_json(facts)
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            typer.echo(f"{key:<{width}}  {value}")
    if not same:
        raise DriftError(f"sample {sample!r}: {facts['witness']}", hint="mwm audit PATH --level masks checks them all")


def repair(
    store: Annotated[Path, typer.Argument(help="A damaged region store; it is left as it is.")],
    images: Annotated[Path, typer.Option(help="What it was made from; images of damaged rows are opened.")],
    out: Annotated[Path, typer.Option(help="Folder of the new store; the same folder again continues.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A localize setting that named a file elsewhere; repeatable.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Make a whole region store from a damaged one: good rows are copied, damaged ones made again; exit 3 if these
    are not what was published."""
    from stage1_localize.repair import lines
    from stage1_localize.repair import repair as run

    refuse_file(store)
    done = run(store, images=images, out=out, overrides=set_ or (), command=command_told())
    if as_json:
        print_json(done.as_dict())
    else:
        for line in lines(done):
            typer.echo(line)
    if done.store is not None and done.store.card.artifact_id != done.store.card.provenance.supersedes:
        raise typer.Exit(3)


def migrate(
    store: Annotated[Path, typer.Argument(help="A region store of an older version; it is left as it is.")],
    out: Annotated[Path, typer.Option(help="Folder of the new store; the same folder again continues.")],
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write an older region store anew at this release's version; maps are copied to the bit."""
    from stage1_localize.repair import migrate as run

    refuse_file(store)
    made = run(store, out=out, command=command_told())
    if as_json:
        return print_json({"path": made and str(made.path), "artifact_id": made and made.card.artifact_id})
    if made is None:
        return typer.echo("nothing to migrate: the store is of the current version")
    typer.echo(f"made: region-store {made.card.identity.kind_version} ({len(made)} rows, maps as they were)")
    typer.echo(f"where: {made.path}")
    typer.echo(f"digest: sha256:{made.card.artifact_id} (supersedes {(made.card.provenance.supersedes or '')[:12]})")
    typer.echo(f"next: mwm audit {quote(str(out))}")
    return None


def export(
    artifact: Annotated[
        str, typer.Argument(help="A region store, an encoder or a model, PATH or PATH@sha256:... to pin it.")
    ],
    to: Annotated[
        str,
        typer.Option(help="Of a region store: coco, png, nifti or nnunet. Of the others: timm, huggingface or onnx."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; absent or empty.")],
    images: Annotated[Path | None, typer.Option(help="The store's images, for nifti, nnunet and overlays.")] = None,
    regions: Annotated[Path | None, typer.Option(help="The region store of an encoder, if not beside it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: a setting of a store's format; repeatable.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Write an artifact in a form that others read; it is loaded back and compared first."""
    from pipelines.exporters import EXPORTERS, STORE_EXPORTERS
    from shared.errors import UsageError
    from shared.registry import Registry

    if to not in EXPORTERS and to not in STORE_EXPORTERS:
        Registry("exporter", {**EXPORTERS, **STORE_EXPORTERS}).load(to)  # which names the nearest of all
    if to in STORE_EXPORTERS:
        if regions is not None:
            raise UsageError(f"--to {to}: --regions names an encoder's store", hint="give the store itself")
        return _export_regions(artifact, to, out, images, set_ or (), as_json)
    if images is not None or set_:
        raise UsageError("--images and --set are for exports of region stores", hint=f"{', '.join(STORE_EXPORTERS)}")
    from pipelines.export import export as run

    check_exportable(artifact)
    made = run(artifact, to=to, out=out, regions=regions)
    if made.missing is not None:
        typer.echo(f"warning: {made.missing}: the model card says less (--regions)", err=True)
    if as_json:
        return print_json(made.as_dict())
    typer.echo(f"made: {made.to} export of the {made.kind} ({', '.join(made.files)})")
    typer.echo(f"where: {made.path}")
    typer.echo(f"digest: sha256:{made.artifact_id} (of the {made.kind})")
    typer.echo(f"compared: {'; '.join(made.lines)}")
    typer.echo(f"next: {made.path / 'README.md'} says how to load it; state there the licence of your data")
    return None


def _export_regions(
    artifact: str, to: str, out: Path, images: Path | None, settings: Sequence[str], as_json: bool
) -> None:
    from pipelines.export_regions import export_regions

    check_exportable(artifact, "region-store")
    made = export_regions(artifact, to=to, out=out, images=images, settings=settings)
    if as_json:
        return print_json(made.as_dict())
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in made.left_out.items())
    typer.echo(f"made: {to} export of {made.samples:,} samples ({', '.join(made.files)})")
    typer.echo(f"where: {made.path}")
    typer.echo(f"digest: sha256:{made.artifact_id} (of the region store)")
    typer.echo(f"compared: {'; '.join(made.lines)}")
    typer.echo(f"skipped: {skipped or 'nothing'}")
    typer.echo(f"next: {made.path / 'README.md'} says what is where")
    return None


def doctor(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Check this installation and machine for what is known to go wrong; exit 1 if something needed is bad."""
    from pipelines.doctor import examine

    checks = examine()
    if as_json:
        print_json([check.as_dict() for check in checks])
    else:
        for check in checks:
            for line in check.lines():
                typer.echo(line)
    if any(check.state == "BAD" for check in checks):
        raise typer.Exit(1)


def list_(
    what: Annotated[
        str | None,
        typer.Argument(help="A kind of part, e.g. policies (default: all kinds), or a folder."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """List what this installation can do; with a folder, the artifacts in it and what became of them."""
    from pipelines.listing import KINDS, artifact_lines, as_dicts, list_artifacts, list_parts, part_lines

    if what is not None and what not in KINDS:
        found = list_artifacts(Path(what))
        if as_json:
            return print_json(as_dicts(found))
        for line in artifact_lines(found):
            typer.echo(line)
        return None
    kinds = KINDS if what is None else (what,)
    parts = {kind: list_parts(kind) for kind in kinds}
    if as_json:
        return print_json({kind: as_dicts(items) for kind, items in parts.items()})
    for kind, items in parts.items():
        if what is None:
            typer.echo(f"{kind}:")
        for line in part_lines(items, "  " if what is None else ""):
            typer.echo(line)
    return None


def init(
    out: Annotated[Path, typer.Option(help="Recipe to write; must not exist.")] = Path("recipe.yaml"),
    images: Annotated[
        Path | None, typer.Option(help="Your images: some are opened, to choose sensible values.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Your labels: the recipe then finetunes too.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write a commented recipe for your own images."""
    from pipelines.starter import write_recipe

    corpus = write_recipe(out, images, labels)
    if as_json:
        return print_json({"recipe": out.as_posix(), "found": corpus.lines() if corpus else []})
    for line in corpus.lines() if corpus else ():
        typer.echo(line)
    typer.echo(f"made: {out}")
    given = f"--images {quote(str(images)) if images else '...'}{f' --labels {quote(str(labels))}' if labels else ''}"
    typer.echo(f"next: name your regions in it; then mwm run {quote(str(out))} {given} --dry-run")
    return None
