"""Configuration of `fit_grounder`. Loads nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from shared.config import Failures, Strict, runtime
from stage1_localize.config import one_or_many
from stage1_localize.prompts import parse_regions

Texts = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]


class FitGrounderConfig(Strict):
    """How a head is made from labels."""

    regions: dict[str, Texts] = Field(
        {}, description="Category of the labels -> text, or texts that mean it; default: its name."
    )
    exhaustive: bool = Field(
        True,
        description="An image of the labels without an annotation of a category holds none of it, as COCO means it; "
        "false: it is unknown there.",
    )
    turns: bool = Field(False, description="Images have no up (smears, tissue): quarter turns are as likely.")
    lateral: Literal["auto"] | Texts = Field(
        "auto",
        description="Categories that a mirrored image would falsify; auto: those with a left or right in a text.",
    )
    foreign: Texts = Field((), description="More texts that mean something else and are refused.")
    start: Literal["scratch", "packaged"] = Field(
        "scratch", description="Weights to begin with; packaged: the shipped head's, whose words are not kept either."
    )
    steps: int | Literal["auto"] = Field("auto", description="Optimiser steps of a fit; auto: by the number of images.")
    folds: int = Field(3, ge=2, le=10, description="Held-out parts, by group, that routes and scores are taken from.")
    seed: int = Field(0, ge=0, description="Seed of folds, initial weights and every draw.")
    max_failures: Failures = runtime(
        0.1, "Quarantined images allowed: a count, or a fraction below 1 of all; more end the run with exit 6.", ge=0
    )
    workers: int | Literal["auto"] = runtime("auto", "Worker processes; auto: one a core; 0: in this process.")

    @field_validator("regions")
    @classmethod
    def _normalised(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {region.name: region.texts for region in parse_regions(value)} if value else {}

    @field_validator("steps")
    @classmethod
    def _some_steps(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= 100_000:
            raise ValueError("expected 'auto' or 1 to 100000")
        return value

    @field_validator("workers")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 0 <= value <= 64:
            raise ValueError("expected 'auto' or 0 to 64")
        return value
