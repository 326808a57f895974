"""What a task is: how its labels are read, learnt, predicted, kept and scored. One file a task, one line to name it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from shared.backbones import Backbone
from shared.config import Strict
from shared.report import Section
from stage3_finetune.export import Preprocessing
from stage3_finetune.intervals import Interval


@dataclass(frozen=True)
class Example:
    """One row: a sample, its label, the group it belongs to and its part (None: not yet split).

    The label is the class's name, or whatever text tells one truth from another: the digest of an outline's file.
    """

    sample_id: str
    label: str
    group: str
    split: str | None = None


@dataclass(frozen=True)
class View:
    """The window of an image that the model sees, as shares of its height and width in [0, 1].

    Attributes:
        top: Upper edge.
        left: Left edge.
        bottom: Lower edge, above ``top``.
        right: Right edge, above ``left``.
        flip: Whether the window is mirrored left to right after it is cut.
    """

    top: float
    left: float
    bottom: float
    right: float
    flip: bool


WHOLE = View(0.0, 0.0, 1.0, 1.0, False)
"""The whole image as it is."""


@dataclass(frozen=True)
class Batch:
    """Samples that go through the model together.

    Attributes:
        image: In [0, 1].
        target: What the task learns from, as its targets' ``collate`` made it.
        sample_ids: Who they are.
        truth: What the labels say of each image, in the frame of the image as it was read.
        sizes_px: Height and width of each image as it was read.
        spacing_mm: Rows and columns' spacing of each image, None where its file does not tell; empty: not known.
        epoch: What draws of a batch are named after, beside its samples.
        features: What a frozen encoder made of the images, where it was kept (`Probing`); ``image`` is then empty.
    """

    image: Float32[Tensor, "B C S S"]
    target: Any
    sample_ids: tuple[str, ...]
    truth: tuple[Any, ...]
    sizes_px: tuple[tuple[int, int], ...]
    spacing_mm: tuple[tuple[float, float] | None, ...] = ()
    epoch: int = 0
    features: Float32[Tensor, "B ..."] | None = None


class Targets(Protocol):
    """The labels of a task. Goes to loader processes.

    Constructed as ``Targets(path, options=..., sources=...)``: what ``--labels`` names, the task's settings, and where
    each image is.
    """

    def read(
        self, known: Mapping[str, str | None], names: Mapping[str, str] | None = None
    ) -> tuple[list[Example], bool]:
        """The rows in their order, and whether every one has a group; arguments as `labels.read_table`."""
        ...

    def classes(self, examples: Sequence[Example], asked: Sequence[str] | None) -> tuple[str, ...]:
        """Class names in order; ``asked`` is what the settings say. Everything that is wrong is told at once."""
        ...

    def check(self, examples: Sequence[Example], classes: Sequence[str]) -> None:
        """Refuse split rows that cannot be learnt from: a class that no training row has."""
        ...

    def strata(self, example: Example) -> str:
        """Rows of one stratum are spread alike over the parts and over a share of the labels."""
        ...

    def load(self, example: Example, classes: Sequence[str], size_px: tuple[int, int]) -> Any:
        """The truth of an image of this height and width."""
        ...

    def place(self, truth: Any, view: View, side_px: int) -> Any:
        """The truth in the model's frame: a square of this side that shows the view."""
        ...

    def collate(self, placed: Sequence[Any]) -> Any:
        """The target of a batch."""
        ...


class Scores(Protocol):
    """Scores of one part."""

    def named(self) -> dict[str, Interval]:
        """Scores in [0, 1], the main one first."""
        ...

    def lines(self) -> list[str]:
        """Text for a log; the last line says what the intervals stand on."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for a card's metrics."""
        ...

    def sections(self) -> list[Section]:
        """What the report shows beside the named scores."""
        ...

    @property
    def note(self) -> str:
        """How to read the scores, beyond how intervals are made."""
        ...


class Predictions(Protocol):
    """What a model said of some rows, with the truth it is scored against: scores need nothing else."""

    suffix: ClassVar[str]
    examples: tuple[Example, ...]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One table of several."""
        ...

    def part(self, split: str) -> Self:
        """Those of one part."""
        ...

    @property
    def sha256(self) -> str:
        """Digest of ids and answers; no float enters it unrounded."""
        ...

    @property
    def truth_sha256(self) -> str:
        """Digest of what they are scored against: id, group, part and truth of every row."""
        ...

    def write(self, path: Path) -> None:
        """Write in one piece; `load` gives the same back, to the bit."""
        ...

    @classmethod
    def load(cls, path: Path) -> Self:
        """As it stands on disk; CorruptError where that is none."""
        ...

    def scores(self, *, seed: int, resamples: int) -> Scores:
        """Scores with intervals that resample groups; ValueError without a row."""
        ...

    def measures(self) -> dict[str, Callable[[Int64[np.ndarray, "R N"]], Float[np.ndarray, "R"]]]:
        """Scores by name, of R weighted copies of the rows; NaN where undefined."""
        ...

    def glance(self) -> tuple[tuple[float, ...], dict[str, float]]:
        """How good they are (the greater tuple is the better model), and scalars to log, without intervals."""
        ...

    def pictures(self, read: Callable[[str], Float32[np.ndarray, "C H W"]]) -> list[Section]:
        """What the report shows of single images; ``read`` gives the pixels of a sample as they were read."""
        ...


Answers = Predictions
"""Inside `Task`, whose attribute has the same name."""


class Task(Protocol):
    """A head on an encoder.

    Constructed as ``Task(options, backbone, classes=..., preprocessing=..., seed=...)``.

    Attributes:
        Options: Its settings.
        version: Raised when equal inputs and settings give other results.
        Targets: Its labels.
        Predictions: What it says.
        kind: What an answer of `predict` is: ``probability``, float32 [K] over the classes; ``labels``, with a
            ``label`` uint8 [H, W] in the frame of the image as it was read, 0 for background and k + 1 for class k;
            ``instances``, with ``box_xyxy_px`` [n, 4] in that frame, half-open, ``score`` [n], ``label`` [n] (class k
            as k), and perhaps ``runs``, n lists of COCO run lengths.
        classes: Names in order.
        preprocessing: Of its input.
        model: Everything that is trained or kept.
        head: Names of the tensors in the model's state dict that the encoder did not bring.
    """

    Options: ClassVar[type[Strict]]
    version: ClassVar[int]
    Targets: ClassVar[type[Any]]
    Predictions: ClassVar[type[Any]]
    kind: ClassVar[Literal["probability", "labels", "instances"]]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    model: nn.Module
    head: tuple[str, ...]

    def __init__(
        self, options: Any, backbone: Backbone, *, classes: Sequence[str], preprocessing: Preprocessing, seed: int
    ) -> None: ...

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars of a step with ``loss``; the model is in training."""
        ...

    def predict(self, batch: Batch) -> Sequence[Any]:
        """One answer an image; the model's mode is the caller's, gradients are off."""
        ...

    def collect(self, examples: Sequence[Example], answers: Sequence[Any]) -> Answers:
        """Answers of whole rows as predictions."""
        ...

    def export(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which others load."""
        ...

    @classmethod
    def restore(cls, folder: Path) -> Self:
        """What `export` wrote, ready to predict.

        Raises:
            CorruptError: A file is missing or unreadable, or a tensor is missing, unknown or of another shape.
        """
        ...


@runtime_checkable
class Probing(Protocol):
    """A task whose frozen encoder need see an image only once; ``loss`` and ``predict`` then take `Batch.features`."""

    @property
    def keeps_features(self) -> bool:
        """Whether features of an image stay the same while the encoder is frozen and images are not augmented."""
        ...

    @property
    def probe(self) -> nn.Module:
        """What takes the features, inside the model: then it alone is trained, saved and walked over in each step."""
        ...

    def embed(self, image: Float32[Tensor, "B C S S"]) -> Tensor:
        """Features of images in [0, 1], one row an image, any shape."""
        ...


@runtime_checkable
class Remembering(Probing, Protocol):
    """A task that may learn without a step, from the features of every training image."""

    @property
    def remembers(self) -> bool:
        """Whether it learns so."""
        ...

    def remember(self, train: Iterable[Batch], val: Iterable[Batch]) -> dict[str, int]:
        """Learn; returns what it chose, for the card. Without a val part ``val`` is empty."""
        ...


@runtime_checkable
class Settling(Protocol):
    """A task class whose options follow from the labels, or decide other settings."""

    @staticmethod
    def settle(options: Any, config: Any, targets: Any) -> tuple[Any, Any]:
        """Options and settings with these resolved; ConfigError where they clash. ``targets`` have been read."""
        ...
