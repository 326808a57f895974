"""Strict configuration: frozen models, recipes with overrides, every problem at once, a digest.

Two levels only: a YAML recipe and ``path.to.key=value`` overrides. What ran is what is written to
``resolved.yaml``.
"""

from __future__ import annotations

import difflib
import hashlib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from shared.errors import ConfigError, InputMissingError


class Strict(BaseModel):
    """Base of every configuration: frozen, no unknown keys, defaults validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse ``true`` where a number is expected, which would pass for 1."""
        field = cls.model_fields.get(info.field_name or "")
        if field is not None and _holds_bool(value) and _is_number(field.annotation):
            raise ValueError("expected a number")
        return value


def _count_or_fraction(value: int | float) -> int | float:
    if isinstance(value, float) and value >= 1:
        raise ValueError("a fraction lies below 1; write a count without a decimal point")
    return value


Failures = Annotated[int | float, AfterValidator(_count_or_fraction)]
"""How many inputs may fail: a count, or a fraction below 1 of all."""


def failures_allowed(limit: int | float, count: int) -> int:
    """How many of ``count`` inputs may fail.

    >>> failures_allowed(0.1, 19), failures_allowed(3, 19)
    (1, 3)
    """
    return int(limit * count) if isinstance(limit, float) else limit


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def runtime(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes how a run goes but never its results; left out of `spec` and so of every id."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **constraints)


def load(model: type[ConfigT], recipe: Mapping[str, Any] | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Build a configuration from a recipe and ``path.to.key=value`` overrides.

    Args:
        model: The configuration class.
        recipe: A mapping, or the path of a YAML file.
        overrides: Strings ``path.to.key=value``; values are YAML. Applied in order.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: Lists every unknown key and every bad value at once.
        InputMissingError: The recipe file does not exist.
    """
    data = read_yaml(recipe) if isinstance(recipe, Path) else _copy(recipe)
    for override in overrides:
        apply_override(data, override)
    return validate(model, data)


def validate(model: type[ConfigT], data: Mapping[str, Any]) -> ConfigT:
    """Validate plain data as ``model``; ConfigError lists all problems."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        missing = next(
            (".".join(map(str, problem["loc"])) for problem in problems if problem["type"] == "missing"), None
        )
        hint = (
            f"write it into the recipe, or --set {missing}=... (a section: --set {missing}.NAME=...)"
            if missing
            else None
        )
        raise ConfigError("; ".join(_explain(model, problem) for problem in problems), hint=hint) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputMissingError: No such file.
        ConfigError: Not YAML, or not a mapping.
    """
    if not path.is_file():
        raise InputMissingError(f"recipe {path}: no such file", hint="'mwm list recipes' shows the built-in ones")
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_StrictLoader)
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path}: not text in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = (
            "one 'key: value' a line, those of a section indented alike, by spaces; quote text that holds ': ' or '#'"
        )
        raise ConfigError(f"recipe {path}{where}: not YAML: {problem}", hint=hint) from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(
            f"recipe {path}: expected sections with settings, found {found}", hint="'mwm init' writes a recipe"
        )
    return data


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.MarkedYAMLError(problem=f"'{name}' is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set ``path.to.key=value`` in nested plain data, in place.

    Raises:
        ConfigError: Without '=', or a path that runs through a scalar.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set '{override}': expected path.to.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set '{override}': the value is not YAML") from None
    node = data
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set '{override}': '{key}' is a value, not a section",
                hint=f"if it is a name, write it out first: --set '{key}={{name: {child}}}'",
            )
        node = child
    node[keys[-1]] = value


def spec(config: BaseModel) -> dict[str, Any]:
    """Plain JSON of the fields that decide results, floats as decimal strings (ids hold no float)."""
    return {
        name: _plain(getattr(config, name))
        for name, field in type(config).model_fields.items()
        if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("runtime"))
    }


def digest(value: Any) -> str:
    """sha256 (hex) of the RFC 8785 JSON of a configuration or of plain, float-free JSON."""
    import rfc8785

    return hashlib.sha256(rfc8785.dumps(_plain(value))).hexdigest()


def dump_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML, every key present, and no text (a path with spaces) cut into lines."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1 << 30)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return spec(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**53:
        return str(value)  # RFC 8785 has the integers of a double only
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def _explain(model: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    if problem["type"] == "extra_forbidden":
        names = list(_fields_at(model, problem["loc"][:-1]))
        near = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1)
        return f"{where}: unknown key." + (
            f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(names) or 'none'}"
        )
    if problem["type"] == "missing":
        return f"{where}: required, not given"
    value = problem.get("input")
    message = (
        problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected").split(", unable to")[0]
    )
    if isinstance(value, dict) and problem["type"] == "value_error":  # settings that clash: the message names them
        return f"{where}: {message}" if problem["loc"] else message
    found = "nothing" if value is None else repr(value)
    return f"{where}: {message} (found {found if len(found) <= 60 else found[:57] + '...'})"


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> Iterable[str]:
    current: type[BaseModel] | None = model
    for key in path:
        field = current.model_fields.get(str(key)) if current else None
        if field is None:
            continue  # union tags and list indices stand in the path too
        current = next(_models(field.annotation), None)
    return current.model_fields if current else ()


def _holds_bool(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_bool, value)))


def _is_number(annotation: Any) -> bool:
    """Whether numbers are all that a field of this type holds, apart from names and None."""
    kinds = set(_leaves(annotation))
    return bool(kinds & {int, float}) and not kinds & {bool, Any, object}


def _leaves(annotation: Any) -> Iterator[Any]:
    parts = () if get_origin(annotation) is Literal else get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, list, tuple, dict):
        for part in get_args(annotation):
            yield from _models(part)
