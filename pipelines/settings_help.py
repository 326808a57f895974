"""``--help`` ends with a command's settings, read from its configuration class: one source of text."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args

from typer.core import TyperCommand


def settings_help(config: str) -> type[TyperCommand]:
    """A command whose ``--help`` ends with its configuration keys, read from the config class itself."""

    class WithSettings(TyperCommand):
        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            module, _, name = config.partition(":")
            rows = list(_describe(getattr(import_module(module), name)))
            width = max(len(key) for key, _ in rows)
            formatter.write("\nSettings for a recipe or --set:\n")
            for key, text in rows:
                formatter.write(f"  {key:<{width}}  {text}\n")

    return WithSettings


def _describe(model: Any, prefix: str = "", given: Any = None) -> Iterator[tuple[str, str]]:
    """Key, description and default of every setting; ``given`` is an instance that stands as default."""
    for name, field in model.model_fields.items():
        default = getattr(given, name) if given is not None else field.get_default(call_default_factory=True)
        nested = next((part for part in (field.annotation, *get_args(field.annotation)) if _is_config(part)), None)
        if nested is not None:
            yield from _describe(nested, f"{prefix}{name}.", default if _is_config(type(default)) else None)
        else:
            shown = "required" if field.is_required() and given is None else _short(default)
            yield f"{prefix}{name}", f"{field.description or ''} [{shown}]"


def _is_config(part: Any) -> bool:
    return isinstance(part, type) and hasattr(part, "model_fields")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 32 else text[:29] + "..."
