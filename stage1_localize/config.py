"""Configuration of stage 1. Loads neither torch, dask nor zarr; parts are looked up when a job starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shared.config import Failures, Strict, runtime
from shared.config import spec as spec_of
from shared.errors import ConfigError
from stage1_localize.contracts import MAP_SIZE_PX, Region
from stage1_localize.prompts import parse_regions


def one_or_many(value: Any) -> Any:
    """A bare text is a list of one."""
    return (value,) if isinstance(value, str) else value


class PartConfig(Strict):
    """A replaceable part by name, with its own options; a bare name means its defaults."""

    name: str = Field(description="Name in the registry; 'mwm list' shows them.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of that part; unknown keys are errors.")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class LocalizeConfig(Strict):
    """Text prompts and parts of a region store."""

    regions: dict[str, Annotated[tuple[str, ...], BeforeValidator(one_or_many)]] = Field(
        description="Region name -> text, or list of texts that mean the same region."
    )
    grounder: PartConfig = Field(PartConfig(name="lite"), description="Part that finds regions by text.")
    segmenter: PartConfig = Field(PartConfig(name="lite_medsam"), description="Part that turns boxes into pixels.")
    grid_px: int = Field(
        MAP_SIZE_PX, ge=16, le=1024, multiple_of=4, description="Side of the stored maps in px, image's own frame."
    )
    micro_batch: int = Field(8, ge=1, le=256, description="Images a model call, at most; part of the identity.")
    max_failures: Failures = runtime(
        0.1, "Quarantined images allowed: a count, or a fraction below 1 of all; more end the run with exit 6.", ge=0
    )
    workers: int | Literal["auto"] = runtime(
        "auto", "Worker processes; auto: one a core (a GPU, where parts use cuda); 0: in this process, no Dask."
    )

    @field_validator("regions")
    @classmethod
    def _normalised(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {region.name: region.texts for region in parse_regions(value)}

    @field_validator("workers")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 0 <= value <= 4096:
            raise ValueError("expected 'auto' or 0 to 4096")
        return value

    def asked(self) -> tuple[Region, ...]:
        """The regions in the order of the recipe; the K axis of the store."""
        return tuple(Region(name, texts) for name, texts in self.regions.items())


def part_options(kind: str, part: PartConfig, cls: Any) -> Any:
    """Validate a part's options with the class that owns them.

    Args:
        kind: ``grounder`` or ``segmenter``, for messages.
        part: From the recipe.
        cls: The part's class; ``cls.Options`` is its strict configuration.

    Raises:
        ConfigError: Every unknown key and bad value at once.
    """
    from shared.config import validate

    try:
        return validate(cls.Options, part.options)
    except ConfigError as error:
        raise ConfigError(f"{kind}.options of '{part.name}': {error.message}", hint=error.hint) from None


def describe_part(part: PartConfig, options: Strict, built: Any) -> Mapping[str, Any]:
    """What a part contributes to the specification: name, version, options and its own identity."""
    return {
        "name": part.name,
        "version": int(built.version),
        "options": spec_of(options),
        "identity": built.identity(),
    }
