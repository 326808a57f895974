"""``mwm list``: the parts that this installation has, and the artifacts in a folder. Imports no part.

Descriptions are the first lines of the parts' own docstrings, read from their source without running it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.machinery
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.options import RECIPES
from shared.artifact import CARD, read_card
from shared.errors import InputMissingError, MwmError
from shared.lease import LEASE, lease_holder
from shared.registry import Registry
from shared.workspace import SPEC


@dataclass(frozen=True)
class Part:
    """One name: what it does, and the distribution that brings it."""

    name: str
    description: str
    package: str


@dataclass(frozen=True)
class Found:
    """One artifact, or run that may become one.

    Attributes:
        path: Relative to the folder that was asked.
        kind: Of artifact.
        status: ``published``, ``unfinished``, ``locked`` (a live process writes) or ``corrupt``.
        id: First digits of its id; empty unless published.
        created: UTC.
        bytes: Of all its files, those of ``run/`` too.
    """

    path: str
    kind: str
    status: str
    id: str
    created: str
    bytes: int


def tables() -> dict[str, Registry]:
    """Every table of parts, by the plural of what it holds."""
    from pipelines.answers import WRITERS
    from pipelines.exporters import EXPORTERS, STORE_EXPORTERS
    from stage1_localize.grounders import GROUNDERS
    from stage1_localize.segmenters import SEGMENTERS
    from stage2_pretrain.kernels import IMPLS
    from stage2_pretrain.masking import POLICIES
    from stage2_pretrain.methods import METHODS
    from stage3_finetune.tasks import TASKS

    return {
        "grounders": GROUNDERS,
        "segmenters": SEGMENTERS,
        "policies": POLICIES,
        "samplers": IMPLS,
        "methods": METHODS,
        "tasks": TASKS,
        "exporters": EXPORTERS,
        "store_exporters": STORE_EXPORTERS,
        "writers": WRITERS,
    }


KINDS = (
    "recipes", "grounders", "segmenters", "policies", "samplers", "methods", "tasks", "exporters", "store_exporters",
    "writers",
)  # fmt: skip


def list_parts(kind: str) -> list[Part]:
    """The parts of one of `KINDS`, sorted by name."""
    if kind == "recipes":
        return [Part(path.stem, _comment(path), "mwm") for path in sorted(RECIPES.glob("*.yaml"))]
    table = tables()[kind]
    return [Part(name, describe(table[name]), table.package(name) or "mwm") for name in table]


def describe(home: str) -> str:
    """First line of a part's documentation, from ``"package.module:attribute"``: a part is a file, so its module's.

    Where the module says nothing, the attribute's; empty if that is silent too, or the source is not to be found.
    """
    module, _, attribute = home.partition(":")
    path = source_file(module)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8")) if path is not None else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return ""
    named = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == attribute
    ]
    texts = [ast.get_docstring(node) for node in (tree, *named)]
    return next((text.split("\n", 1)[0].strip() for text in texts if text), "")


def list_artifacts(folder: Path) -> list[Found]:
    """Every artifact below a folder, itself included, and every run on its way to one; by path.

    Raises:
        InputMissingError: No such folder.
    """
    if not folder.is_dir():
        near = difflib.get_close_matches(str(folder), KINDS, n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise InputMissingError(
            f"{folder}: neither a folder nor a kind of part", hint=f"{guess}Kinds: {', '.join(KINDS)}"
        )
    places = {path.parent for path in folder.rglob(CARD)} | {path.parents[1] for path in folder.rglob(SPEC)}
    return [_found(place, folder) for place in sorted(places)]


def _found(place: Path, root: Path) -> Found:
    name = place.relative_to(root).as_posix()
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and path.name != LEASE)
    if not (place / CARD).is_file():
        status = "unfinished" if lease_holder(place) is None else "locked"
        return Found(name, _kind_of_run(place), status, "", "", size)
    try:
        card = read_card(place)
    except MwmError as error:
        return Found(name, "unknown", error.kind, "", "", size)
    return Found(name, card.identity.kind, "published", card.artifact_id[:12], card.provenance.created, size)


def _kind_of_run(place: Path) -> str:
    try:
        kind = json.loads((place / SPEC).read_bytes())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
    return str(kind)


def _comment(recipe: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    first = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:first]).split(". ")[0].rstrip(".") + "."


def source_file(module: str) -> Path | None:
    """File of a module, found without importing it or the packages above it; None where there is none."""
    places: Any = None
    spec = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        try:
            spec = importlib.machinery.PathFinder.find_spec(name, places)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def as_dicts(items: list[Part] | list[Found]) -> list[dict[str, Any]]:
    """Plain JSON."""
    return [asdict(item) for item in items]


def part_lines(parts: list[Part], indent: str = "") -> Iterator[str]:
    """For a person; parts of other packages say so."""
    width = max((len(part.name) for part in parts), default=0)
    for part in parts:
        origin = "" if part.package == "mwm" else f" [{part.package}]"
        yield f"{indent}{part.name:<{width}}  {part.description}{origin}".rstrip()


def artifact_lines(found: list[Found]) -> Iterator[str]:
    """For a person: a table with a head."""
    from shared.forecast import size

    rows = [("path", "kind", "status", "id", "created", "size")]
    rows += [
        (item.path, item.kind, item.status, item.id or "-", item.created or "-", size(item.bytes)) for item in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
