"""The command line: its commands by name, and what becomes of an error.

Data goes to stdout, talk to stderr. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import typer

from pipelines import predict_command, quality_commands, stage_commands, tool_commands
from pipelines.settings_help import settings_help
from shared.errors import DiskFullError, MwmError, UsageError
from shared.signals import sigterm_unwinds

app = typer.Typer(
    name="mwm",
    help="Mask What Matters: text-guided masked pretraining for medical images. Not for diagnosis.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

app.command(cls=settings_help("stage1_localize.config:LocalizeConfig"))(stage_commands.localize)
app.command(cls=settings_help("stage2_pretrain.config:PretrainConfig"))(stage_commands.pretrain)
app.command(cls=settings_help("stage3_finetune.config:FinetuneConfig"))(stage_commands.finetune)
app.command("fit-grounder", cls=settings_help("stage1_localize.fit_config:FitGrounderConfig"))(
    stage_commands.fit_grounder
)
app.command(cls=settings_help("pipelines.predict_config:PredictConfig"))(predict_command.predict)
app.command("run")(stage_commands.run_)
app.command()(tool_commands.audit)
app.command()(quality_commands.score)
app.command(cls=settings_help("stage1_localize.config:LocalizeConfig"))(quality_commands.wordings)
app.command()(tool_commands.inspect)
app.command()(tool_commands.repair)
app.command()(tool_commands.migrate)
app.command()(tool_commands.export)
app.command()(tool_commands.init)
app.command("list")(tool_commands.list_)
app.command()(tool_commands.doctor)


_USERS_PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip
"""Faults of the paths given, not of mwm."""


_TYPERS_INTERRUPT = 130
"""What Typer makes of KeyboardInterrupt."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; every user error is one line and a hint."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(lambda: _start(arguments), "-v" in arguments, "-q" in arguments))


def _start(arguments: list[str]) -> Any:
    if "" in arguments:  # as a path it would be the folder one stands in
        before = arguments[arguments.index("") - 1] if arguments.index("") else ""
        raise UsageError(
            f"{before or 'an argument'}: given, but empty", hint="a variable of the shell that is not set?"
        )
    result = app(arguments, standalone_mode=False)
    sys.stdout.flush()  # a reader that has left is noticed here, not while Python shuts down
    return result


def _run(command: Callable[[], Any], verbose: bool, quiet: bool) -> int:
    try:
        hushed = contextlib.redirect_stderr(_WarningsOnly(sys.stderr)) if quiet else contextlib.nullcontext()
        with sigterm_unwinds(), hushed:
            code = command()
        if code == _TYPERS_INTERRUPT:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except MwmError as error:
        return _report(error, verbose)
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted; the same command continues from what was saved, if anything was", err=True)
        return 75
    except SystemExit as left:  # click's own way with a reader that has left is an exit code of 1
        return 0 if isinstance(left.__context__, BrokenPipeError) else int(left.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _report(DiskFullError("the disk is full", hint="make room; the same command continues"), verbose)
        if error.errno in _USERS_PATHS:
            name = str(error.filename)
            shown = name if len(name) <= 200 else f"{name[:60]}...{name[-20:]} ({len(name)} characters)"
            return _report(UsageError(f"{shown}: {error.strerror}", hint="check the paths given"), verbose)
        return _bug(error, verbose)
    except Exception as error:
        # Typer's own usage errors have no public base class; this method is what they share.
        if hasattr(error, "format_message"):
            context = getattr(error, "ctx", None)
            word = f"{context.info_name} " if context is not None and context.parent is not None else ""
            return _report(UsageError(error.format_message(), hint=f"mwm {word}--help"), verbose)
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


if __name__ == "__main__":
    main()
