"""The command line: a thin skin over `localize`, `pretrain`, `finetune`, `run_chain` and `audit`.

Data goes to stdout, talk to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from pipelines.settings_help import settings_help
from shared.errors import ConfigError, DiskFullError, InputMissingError, MwmError, UsageError

RECIPES = Path(__file__).parent / "recipes"


app = typer.Typer(
    name="mwm",
    help="Mask What Matters: text-guided masked pretraining for medical images. Not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

Recipe = Annotated[str, typer.Argument(help="A built-in recipe's name, or the path of a YAML file.")]
Images = Annotated[Path, typer.Option(help="Folder of images, or a CSV or JSONL list of them.")]
Out = Annotated[Path, typer.Option(help="Folder of the run; the same folder again continues it.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="path.to.key=value over the recipe; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check inputs, print the resolved settings, write nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Keep an existing run aside and start anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", help="Show tracebacks.")]
Quiet = Annotated[bool, typer.Option("-q", help="Talk less: warnings and errors only.")]


@app.command(cls=settings_help("stage1_localize.config:LocalizeConfig"))
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
    from stage1_localize.config import LocalizeConfig

    config = _config(LocalizeConfig, recipe, "localize", set_)
    if dry_run:
        from shared.images import find_sources

        return _dry_run(config, images=f"{len(find_sources(images))} found")
    from stage1_localize.job import localize as run

    done = _published(out, fresh)
    store = run(config, images=images, out=out, scheduler=scheduler, fresh=fresh, command=_command())
    _close(store.path, store.card, done, as_json, f"mwm pretrain --images ... --regions {out} --out ...")


@app.command(cls=settings_help("stage2_pretrain.config:PretrainConfig"))
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

    config = _config(PretrainConfig, recipe, "pretrain", set_)
    if dry_run:
        from shared.regions import open_region_store

        store = open_region_store(regions)
        return _dry_run(config, regions=f"{len(store.sample_ids)} samples, {', '.join(store.regions)}")
    from stage2_pretrain.train import pretrain as run

    done = _published(out, fresh)
    made = run(config, images=images, regions=regions, out=out, fresh=fresh, command=_command())
    _close(made.path, made.card, done, as_json, f"mwm finetune --images ... --labels ... --encoder {out} --out ...")


@app.command(cls=settings_help("stage3_finetune.config:FinetuneConfig"))
def finetune(
    images: Images,
    labels: Annotated[Path, typer.Option(help="CSV: sample_id, label, and optionally group and split.")],
    out: Out,
    encoder: Annotated[str | None, typer.Option(help="Encoder, PATH or PATH@sha256:...; none: from scratch.")] = None,
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

    config = _config(FinetuneConfig, recipe, "finetune", set_)
    if dry_run:
        if not labels.is_file():
            raise InputMissingError(f"--labels {labels}: no such file")
        return _dry_run(config, labels=str(labels))
    from stage3_finetune.train import finetune as run

    done = _published(out, fresh)
    made = run(config, images=images, labels=labels, encoder=encoder, out=out, fresh=fresh, command=_command())
    _close(made.path, made.card, done, as_json, f"open {made.path / 'report.html'}")


@app.command("run")
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
    from pipelines.chain import ChainConfig, run_chain

    config = _config(ChainConfig, recipe, None, set_)
    if dry_run:
        return _dry_run(config)
    out = out or Path("runs") / Path(recipe).stem
    summary = run_chain(config, out=out, images=images, labels=labels, fresh=fresh, command=_command())
    if as_json:
        _print_json(summary.as_dict())
    else:
        for line in summary.lines():
            typer.echo(line)


@app.command()
def audit(
    path: Annotated[Path, typer.Argument(help="An artifact, or a folder that holds artifacts.")],
    level: Annotated[str, typer.Option(help="integrity, masks, or all that this release can.")] = "integrity",
    regions: Annotated[Path | None, typer.Option(help="The region store of an encoder, if not beside it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also publish the audit as an artifact in this folder.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Check that artifacts are what was published, and redraw every witnessed mask."""
    from pipelines.audit import audit as run

    result = run(path, level=level, regions=regions, out=out, command=_command())
    if as_json:
        _print_json(result.as_dict())
    else:
        for line in result.lines():
            typer.echo(line)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact.")],
    sample: Annotated[
        str | None, typer.Option(help="A sample id of a region store: print what is known of it.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The store's images, to draw the sample.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG to draw the sample's region maps into.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Show what an artifact is, or one sample of a region store with its maps."""
    from pipelines.inspect import inspect_artifact, inspect_sample

    facts = inspect_artifact(path) if sample is None else inspect_sample(path, sample, images, out)
    if as_json:
        _print_json(facts)
    else:
        width = max(map(len, facts))
        for key, value in facts.items():
            typer.echo(f"{key:<{width}}  {value}")


@app.command()
def doctor(as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Check this installation and machine: versions, weights, cores, memory, disk, recipes."""
    from pipelines.doctor import examine

    checks = examine()
    if as_json:
        _print_json([check._asdict() for check in checks])
    else:
        for check in checks:
            typer.echo(f"{'ok  ' if check.ok else 'BAD '} {check.name:<14} {check.found}")
            if not check.ok:
                typer.echo(f"     {check.remedy}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; every user error is one line and a hint."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(lambda: app(arguments, standalone_mode=False), "-v" in arguments, "-q" in arguments))


def _run(command: Callable[[], Any], verbose: bool, quiet: bool) -> int:
    try:
        with contextlib.redirect_stderr(_WarningsOnly(sys.stderr)) if quiet else contextlib.nullcontext():
            code = command()
        return code if isinstance(code, int) else 0
    except MwmError as error:
        return _report(error, verbose)
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; the same command continues from the last saved state", err=True)
        return 75
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _report(DiskFullError("the disk is full", hint="make room; the same command continues"), verbose)
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EACCES, errno.EROFS):
            return _report(UsageError(f"{error.filename}: {error.strerror}", hint="check the paths given"), verbose)
        return _bug(error, verbose)
    except Exception as error:
        # Typer's own usage errors have no public base class; this method is what they share.
        if hasattr(error, "format_message"):
            return _report(UsageError(error.format_message(), hint="mwm COMMAND --help"), verbose)
        return _bug(error, verbose)


class _WarningsOnly(io.TextIOBase):
    """Stderr under ``-q``: lets whole lines through that begin with ``warning``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith("warning"):
                self._stream.write(line + "\n")
        return len(text)


def _report(error: MwmError, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    typer.echo(f"error[{error.kind}]: {error.message}", err=True)
    if error.hint:
        typer.echo(f"hint: {error.hint}", err=True)
    return error.exit_code


def _bug(error: BaseException, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    typer.echo(f"error[bug]: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", err=True)
    typer.echo("hint: this is a fault of mwm; run again with -v for the traceback and report it", err=True)
    return 1


def _config(model: Any, recipe: str, section: str | None, overrides: list[str] | None) -> Any:
    from shared.config import apply_override, read_yaml, validate

    data = read_yaml(recipe_path(recipe))
    if section is not None:
        if section not in data:
            raise InputMissingError(f"recipe {recipe}: has no section '{section}'")
        data = data[section] or {}
        if not isinstance(data, dict):
            raise ConfigError(f"recipe {recipe}: section '{section}': expected settings, found {data!r}")
    for override in overrides or ():
        apply_override(data, override)
    return validate(model, data)


def recipe_path(name: str) -> Path:
    """The file of a built-in recipe, or the given path.

    Raises:
        InputMissingError: Neither; names the built-in recipes.
    """
    for path in (RECIPES / f"{name}.yaml", Path(name)):  # a file called "tour" does not hide the tour
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise InputMissingError(f"recipe '{name}': no such file or built-in recipe", hint=f"built-in: {known}")


def _dry_run(config: Any, **facts: str) -> None:
    from shared.config import digest, dump_yaml

    typer.echo(dump_yaml(config), nl=False)
    for name, text in facts.items():
        typer.echo(f"{name}: {text}", err=True)
    typer.echo(f"settings sha256:{digest(config)[:16]}; dry run, nothing written", err=True)


def _published(out: Path, fresh: bool) -> bool:
    return not fresh and (out / "artifact.json").is_file()


def _close(path: Path, card: Any, done: bool, as_json: bool, following: str) -> None:
    """The closing lines of a stage: what, where, digest, skipped, what next."""
    outputs = card.identity.outputs
    if as_json:
        return _print_json({"path": str(path), "artifact_id": card.artifact_id, "outputs": outputs})
    counts = ", ".join(f"{key} {value}" for key, value in outputs.items() if isinstance(value, int))
    typer.echo(f"{'already done' if done else 'made'}: {card.identity.kind} ({counts or 'complete'})")
    typer.echo(f"where: {path}")
    typer.echo(f"digest: sha256:{card.artifact_id}")
    typer.echo(f"skipped: {outputs.get('quarantined', 0)} inputs quarantined")
    typer.echo(f"next: {following}")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _command() -> str:
    """The command line for provenance, with everything that may be a path or a name replaced by a placeholder."""
    words, arguments = ["mwm"], iter(sys.argv[1:])
    for word in arguments:
        option, equals, value = word.partition("=")
        if option == "--set":
            words += ["--set", value if equals else next(arguments, "")]
        elif word.startswith("-"):
            words.append(option)
            if equals or option in ("--level", "--scheduler") or option.removeprefix("--") in _PATHS:
                value = value if equals else next(arguments, "")
                words.append(value if option == "--level" else f"<{option.removeprefix('--')}>")
        elif len(words) == 1 or (RECIPES / f"{word}.yaml").is_file():
            words.append(word)
        else:
            words.append("<path>")
    return " ".join(words)


_PATHS = ("images", "regions", "labels", "encoder", "out", "sample")


if __name__ == "__main__":
    main()
