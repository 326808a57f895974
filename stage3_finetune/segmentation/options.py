"""Settings of semantic segmentation. Importing this loads no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shared.config import Strict


class SegmentOptions(Strict):
    """Settings of the task."""

    values: dict[str, int | tuple[int, ...]] = Field(
        default_factory=dict,
        description="Class name -> its value, or values, in the target files; 0 is background. Empty: every value "
        "found in them is a class named 'value N'.",
    )
    ignore: tuple[int, ...] = Field((), description="Values of pixels that count neither way, in training and scores.")
    dice_weight_milli: int = Field(1000, ge=0, le=100_000, description="Weight of the Dice loss, in thousandths.")
    cross_entropy_weight_milli: int = Field(
        1000, ge=0, le=100_000, description="Weight of the cross-entropy of the pixels, in thousandths."
    )
    dice_over: Literal["batch", "image"] = Field(
        "batch",
        description="What the Dice loss sums its pixels over before it divides: all images of a batch (steadier where "
        "many images lack a class), or each image.",
    )
    width: int = Field(
        16,
        ge=8,
        le=128,
        multiple_of=8,
        description="Channels of the decoder at full size; doubled at each scale down to 16 times as many.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SegmentOptions:
        given = [value for values in self.named().values() for value in values]
        every = [*given, *self.ignore]
        if any(not 1 <= value <= 65535 for value in every):
            raise ValueError("values and ignore: expected 1 to 65535; 0 is background")
        if len(set(every)) < len(every):
            raise ValueError("values and ignore: one value twice")
        if any(not name.strip() or name.strip() != name or name == "background" for name in self.values):
            raise ValueError("values: a name is empty, has white space around it, or is 'background'")
        if not all(self.named().values()):
            raise ValueError("values: a class without a value")
        if not self.dice_weight_milli + self.cross_entropy_weight_milli:
            raise ValueError("dice_weight_milli and cross_entropy_weight_milli: one must be above 0")
        return self

    def named(self) -> dict[str, tuple[int, ...]]:
        """Class -> its values."""
        return {name: (value,) if isinstance(value, int) else value for name, value in self.values.items()}
