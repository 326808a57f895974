"""Settings of `mwm predict`. Importing this loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from shared.config import Failures, Strict


class PredictConfig(Strict):
    """How a model is applied; what it does to an image stands in the model itself."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to compute.")
    threads: int | Literal["auto"] = Field("auto", description="CPU threads; auto: the cores this process may use.")
    batch_size: int = Field(16, ge=1, le=4096, description="Images at once.")
    max_failures: Failures = Field(
        0.1,
        ge=0,
        description="Images allowed to be quarantined: a count, or a fraction below 1 of all; more, or all of them, "
        "end the run with exit 6.",
    )

    @field_validator("threads")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("expected 'auto' or 1 and more")
        return value
