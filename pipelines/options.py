"""What the commands share: their options, the recipe they read, what they print."""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from shared.errors import ConfigError, IncompatibleError, InputMissingError, UsageError

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
        InputMissingError: No such recipe.
        ConfigError: No such section; else every problem at once.
    """
    from shared.config import apply_override, read_yaml, validate

    data = read_yaml(recipe_path(recipe))
    if section is not None:
        if section not in data:
            near = difflib.get_close_matches(section, [str(key) for key in data], n=1)
            flat = [key for key in data if key in model.model_fields]
            hint = f"it has '{near[0]}': did you mean that?" if near else f"sections in it: {', '.join(map(str, data))}"
            if flat:
                hint = f"its settings stand at the top: put them below '{section}:', indented"
            raise ConfigError(f"recipe {recipe}: has no section '{section}'", hint=hint)
        data = data[section] or {}
        if not isinstance(data, dict):
            raise ConfigError(f"recipe {recipe}: section '{section}': expected settings, found {data!r}")
    for override in overrides or ():
        _check_place(model, section, override)
        apply_override(data, override)
    return validate(model, data)


def _check_place(model: Any, section: str | None, override: str) -> None:
    """Refuse ``--set`` that takes one command's settings for another's: with the section, or without it."""
    first, _, rest = override.partition(".")
    if section is not None and first == section and section not in model.model_fields:
        raise ConfigError(f"--set '{override}': 'mwm {section}' sets its own section", hint=f"--set '{rest}'")
    if section is None and (key := override.split("=")[0].split(".")[0].strip()) not in model.model_fields:
        homes = [
            name
            for name, field in model.model_fields.items()
            if any(key in getattr(part, "model_fields", ()) for part in (field.annotation, *get_args(field.annotation)))
        ]
        if homes:
            raise ConfigError(
                f"--set '{override}': '{key}' stands in a section", hint=f"--set '{' or '.join(homes)}.{override}'"
            )


def check_artifact(reference: str, kind: str) -> None:
    """Refuse what is no artifact of a kind, and say where one may be; the stage itself checks the rest.

    Raises:
        IncompatibleError: A folder of artifacts, or one of another kind.
        InputMissingError: No such folder, or a pin that is not written as one.
    """
    from shared.artifact import CARD, read_card
    from shared.workspace import SPEC

    makers = {"region-store": "localize", "encoder": "pretrain", "model": "finetune"}
    path = Path(reference.partition("@sha256:")[0])
    if not path.exists() and "@" in path.name:
        raise InputMissingError(f"{path}: no such folder", hint="a pin is written PATH@sha256:DIGITS")
    if not path.is_dir():
        return
    if not (path / CARD).exists() and not (path / SPEC).exists():
        inside = {card.parent.name: read_card(card.parent).identity.kind for card in sorted(path.glob(f"*/{CARD}"))}
        fitting = [name for name, found in inside.items() if found == kind]
        hint = (
            f"it holds one: {path / fitting[0]}"
            if fitting
            else f"'mwm {makers[kind]}' makes {'an' if kind == 'encoder' else 'a'} {kind}"
        )
        raise IncompatibleError(f"{path}: not an artifact: it has no {CARD}", hint=hint)
    if (path / CARD).exists() and (found := read_card(path).identity.kind) != kind:
        raise IncompatibleError(
            f"{path}: found kind '{found}', expected kind '{kind}'",
            hint=f"'mwm {makers[kind]}' makes {'an' if kind == 'encoder' else 'a'} {kind}",
        )


def check_exportable(reference: str, kind: str = "encoder") -> None:
    """Refuse a file or a folder of artifacts where one to export is expected, and say where one may be."""
    path = Path(reference.partition("@sha256:")[0])
    refuse_file(path)
    if not (path / "artifact.json").is_file():
        check_artifact(reference, kind)


def refuse_file(path: Path) -> None:
    """Raise UsageError for a file where an artifact's folder is expected."""
    if path.is_file():
        raise UsageError(
            f"{path}: a file, expected the folder of an artifact", hint="'mwm list FOLDER' shows those in it"
        )


def is_study(recipe: str) -> bool:
    """Whether a recipe is one of `mwm run` on several corpora."""
    from shared.config import read_yaml

    return "corpora" in read_yaml(recipe_path(recipe))


def recipe_path(name: str) -> Path:
    """The file of a built-in recipe, or the given path.

    Raises:
        InputMissingError: Neither; names the built-in recipes.
    """
    for path in (RECIPES / f"{name}.yaml", Path(name)):  # a file called "tour" does not hide the tour
        if path.is_file():
            return path
    if Path(name).is_dir():
        raise UsageError(f"recipe '{name}': a folder, expected a YAML file or a built-in recipe")
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
            key, sign, setting = (value if equals else next(arguments, "")).partition("=")
            words += ["--set", key + sign + ("<path>" if re.search(r"[/\\]", setting) else setting)]
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
