"""A CSV of probabilities, one line an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pipelines.answers.contract import Asked, Place
from pipelines.exportable_store import table
from shared.images import Source

FILE = "predictions.csv"
_SURE = 0.5


class CsvFile:
    """See the module."""

    kinds: ClassVar[tuple[str, ...]] = ("probability",)

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._rows: list[tuple[object, ...]] = []

    def refuses(self, source: Source) -> str | None:
        """None: every image has a line."""
        return None

    def put(self, place: Place, answer: Any) -> None:
        """Nine digits bring every float32 back to the bit."""
        numbers = [f"{float(value):.9g}" for value in answer]
        self._rows.append((place.source.sample_id, self._predicted([float(value) for value in answer]), *numbers))

    def skip(self, source: Source) -> None:
        """Nothing."""

    def close(self) -> None:
        """Write the file."""
        columns = ("sample_id", "predicted", *(f"p {name}" for name in self._asked.classes))
        with table(self._asked.folder / FILE, *columns) as put:
            for row in self._rows:
                put(*row)

    def notes(self) -> str:
        """What the columns are."""
        named = f"every class of probability {_SURE} or more" if self._asked.several else "the most probable class"
        return (
            f"`{FILE}`: a line an image. `predicted` is {named}; `p NAME` the probability of a class, [0, 1]. "
            "Probabilities of a network are not calibrated by themselves: .9 does not say that nine of ten are right."
        )

    def _predicted(self, probability: Sequence[float]) -> str:
        if self._asked.several:
            rows = zip(self._asked.classes, probability, strict=True)
            return "; ".join(name for name, value in rows if value >= _SURE)
        return self._asked.classes[max(range(len(probability)), key=lambda k: (probability[k], -k))]
