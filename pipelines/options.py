"""What the commands share: their options, the recipe they read, what they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.errors import ConfigError, InputMissingError

RECIPES = Path(__file__).parent / "recipes"

Recipe = Annotated[str, typer.Argument(help="A built-in recipe's name, or the path of a YAML file.")]
Images = Annotated[Path, typer.Option(help="Folder of images, or a CSV or JSONL list of them.")]
Out = Annotated[Path, typer.Option(help="Folder of the run; the same folder again continues it.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="path.to.key=value over the recipe; repeatable.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check inputs, print the resolved settings, write nothing.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Keep an existing run aside and start anew.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Verbose = Annotated[bool, typer.Option("-v", help="Show tracebacks.")]
Quiet = Annotated[bool, typer.Option("-q", help="Talk less: warnings and errors only.")]


def read_config(model: Any, recipe: str, section: str | None, overrides: list[str] | None) -> Any:
    """Read a recipe, or one section of it, with ``--set`` over it.

    Args:
        model: The configuration class.
        recipe: A built-in recipe's name, or a path.
        section: Of the recipe; None: the whole.
        overrides: ``path.to.key=value`` below the section.

    Raises:
        InputMissingError: No such recipe or section.
        ConfigError: Every problem at once.
    """
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


def print_json(value: Any) -> None:
    """Print plain data as one JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def command_told() -> str:
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
