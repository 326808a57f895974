"""What a grounder and a segmenter give each other: batches of images in, detections out.

A grounder answers *where might each region be*; a segmenter answers *which pixels*. Both see the same
`Batch`, whose `memo` lets two parts that need the same expensive encoding compute it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Float32, Int64

MAP_SIZE_PX = 256
"""Side of the square map frame. The whole image, whatever its aspect, is resampled to it (half-pixel centres)."""

T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """One region of interest: a name and the wordings that mean it (merged by ``max``)."""

    name: str
    texts: tuple[str, ...]


@dataclass
class Detections:
    """Answers for one image; n may be 0.

    Attributes:
        box_xyxy_px: Half-open boxes in pixels of the image as given, ``0 <= x0 < x1 <= W``.
        score: Confidence in [0, 1].
        region: Index into the regions that were asked.
        text: Index of the wording inside its region.
        probability: Per detection a map in the map frame with values in [0, 1], or None where the
            segmenter must make one.
    """

    box_xyxy_px: Float32[np.ndarray, "n 4"]
    score: Float32[np.ndarray, "n"]
    region: Int64[np.ndarray, "n"]
    text: Int64[np.ndarray, "n"]
    probability: list[Float32[np.ndarray, "256 256"] | None]

    def __len__(self) -> int:
        return len(self.score)

    @staticmethod
    def none() -> Detections:
        """Nothing found."""
        return Detections(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64), []
        )


@dataclass
class Batch:
    """Images that one task works on together.

    Attributes:
        images: Each float32 [C, H, W] in [0, 1], C 1 (grey) or 3 (RGB); sizes may differ.
        sample_ids: One id an image.
    """

    images: Sequence[Float32[np.ndarray, "C H W"]]
    sample_ids: Sequence[str] = ()
    _memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def memo(self, key: str, compute: Callable[[], T]) -> T:
        """Return ``compute()``, computed once per batch and key.

        Args:
            key: Digest of weights, preprocessing and numeric settings of what is computed.
            compute: Called at most once for this batch.
        """
        if key not in self._memo:
            self._memo[key] = compute()
        result: T = self._memo[key]
        return result


class Grounder(Protocol):
    """Finds regions by text. Classes also carry ``Options`` (a Strict config) and an integer ``version``."""

    version: int

    def check(self, regions: Sequence[Region]) -> None:
        """Raise PromptError for a prompt this grounder cannot serve, before any image is read."""
        ...

    def identity(self) -> dict[str, Any]:
        """JSON without floats that pins results: weight digests, thresholds as integers, preprocessing."""
        ...

    def locate(self, batch: Batch, regions: Sequence[Region]) -> list[Detections]:
        """One Detections an image, independent of the other images and regions asked."""
        ...


class Segmenter(Protocol):
    """Turns boxes into pixel probabilities. Classes also carry ``Options`` and an integer ``version``."""

    version: int

    def identity(self) -> dict[str, Any]:
        """JSON without floats that pins results."""
        ...

    def segment(self, batch: Batch, detections: Sequence[Detections]) -> list[Float32[np.ndarray, "n 256 256"]]:
        """Probability of each detection's pixels in the map frame, [0, 1]."""
        ...
