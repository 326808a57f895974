"""What a writer of predictions is given, and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from shared.images import Source


@dataclass(frozen=True)
class Place:
    """An image that was predicted.

    Attributes:
        row: Its place among all images, from 0.
        source: Where it is.
        size_px: Height and width as it was read: the frame of its answer.
    """

    row: int
    source: Source
    size_px: tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """What is to be written.

    Attributes:
        folder: Exists, and is empty.
        classes: Names in order.
        kind: Of the answers, as `stage3_finetune.contracts.Task` has it.
        several: Whether an image may have several classes (answers of kind ``probability``).
        model: Artifact id of the model.
        sources: Every image.
    """

    folder: Path
    classes: tuple[str, ...]
    kind: str
    several: bool
    model: str
    sources: Sequence[Source]


class Writer(Protocol):
    """What `pipelines.answers.WRITERS` names; built before an image is read."""

    kinds: ClassVar[tuple[str, ...]]

    def __init__(self, asked: Asked) -> None: ...

    def refuses(self, source: Source) -> str | None:
        """Why an image cannot be written in this form, or None."""
        ...

    def put(self, place: Place, answer: Any) -> None:
        """Take an answer; images come in the order of ``asked.sources``."""
        ...

    def skip(self, source: Source) -> None:
        """An image that has no answer."""
        ...

    def close(self) -> None:
        """Finish the files.

        Raises:
            DriftError: Read back, a file is something else.
        """
        ...

    def notes(self) -> str:
        """Markdown for the folder's README: what lies where."""
        ...
