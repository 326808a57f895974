"""Names of replaceable parts, bound late: a table maps a name to ``"module:attribute"``.

Strings keep ``mwm --help`` free of heavy imports and let a reader grep for a part's home. Other packages
add parts through entry points of the group that the table names, e.g. ``mwm.grounders``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from shared.errors import ConfigError


class Registry(Mapping[str, str]):
    """An immutable table of named parts.

    Args:
        what: Singular noun used in messages, e.g. ``"grounder"``; its plural names the entry-point group.
        table: Name -> ``"package.module:attribute"``.
    """

    def __init__(self, what: str, table: dict[str, str]) -> None:
        self.what = what
        self._table = table

    def __getitem__(self, name: str) -> str:
        return self._entries()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries()))

    def __len__(self) -> int:
        return len(self._entries())

    def package(self, name: str) -> str | None:
        """The distribution whose entry point adds ``name``; None for a part of the table itself."""
        if name in self._table:
            return None
        return next((point.dist.name for point in self._points() if point.name == name and point.dist), None)

    def load(self, name: str) -> Any:
        """Import and return the part called ``name``.

        Raises:
            ConfigError: Unknown name, with the nearest known one.
        """
        entries = self._entries()
        if name not in entries:
            near = difflib.get_close_matches(name, entries, n=1)
            guess = f"Did you mean '{near[0]}'? " if near else ""
            raise ConfigError(f"unknown {self.what} '{name}'", hint=f"{guess}Known: {', '.join(sorted(entries))}")
        module, _, attribute = entries[name].partition(":")
        return getattr(import_module(module), attribute)

    def _entries(self) -> dict[str, str]:
        return {**{point.name: point.value for point in self._points()}, **self._table}

    def _points(self) -> EntryPoints:
        plural = f"{self.what[:-1]}ies" if self.what.endswith("y") else f"{self.what}s"
        return entry_points(group=f"mwm.{plural}")
