"""What a frozen encoder makes of the images of a part: computed once an image, kept while the run lasts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from shared.loader import load_ahead
from stage3_finetune.contracts import Batch, Example
from stage3_finetune.data import Part, Working

Item = tuple[Float32[Tensor, "C S S"], Any, Any, Working]


class FeaturePart:
    """A `Part` whose batches hold features instead of images.

    The encoder sees the images in blocks that follow from the table alone, so features are the same to the bit
    whatever batches ask for them, and after an interruption.

    Args:
        part: Of images as they are.
        embed: What the encoder makes of a batch of them; on the CPU, without gradients.
        block: Images that go through the encoder together.
        memory_bytes: Features that need more lie in an unnamed file.
        folder: Where that file would be.
        workers: Processes that load images.
    """

    def __init__(
        self,
        part: Part,
        embed: Callable[[Float32[Tensor, "B C S S"]], Tensor],
        *,
        block: int,
        memory_bytes: int,
        folder: Path,
        workers: int = 0,
    ) -> None:
        self.examples: tuple[Example, ...] = part.examples
        self._part, self._embed, self._block, self._workers = part, embed, block, workers
        self._memory, self._folder = memory_bytes, folder
        self._values: np.ndarray[Any, Any] | None = None
        self._about: dict[int, tuple[Any, Any, tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def bytes_an_image(self) -> float:
        """Size of an image's features; 0 before any."""
        return 0.0 if self._values is None else self._values.nbytes / len(self)

    def fill(self, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compute what is missing of all; ``told`` hears after each block how many images are done, and of how many."""
        self._compute(range(len(self)), told)

    def batches(self, order: Iterable[tuple[int, list[int]]], *, workers: int = 0) -> Generator[Batch, None, None]:
        """Hand out batches as `Part.batches`; ``workers`` were told before."""
        for epoch, indices in order:
            self._compute(indices, lambda done, total: None)
            assert self._values is not None
            placed, truth, sizes = zip(*(self._about[index] for index in indices), strict=True)
            yield Batch(
                torch.empty((len(indices), 0, 0, 0)),
                self._part.targets.collate(placed),
                tuple(self.examples[index].sample_id for index in indices),
                truth,
                sizes,
                epoch=epoch,
                features=torch.from_numpy(self._values[indices]),
            )

    def _compute(self, indices: Iterable[int], told: Callable[[int, int], None]) -> None:
        firsts = sorted({index // self._block * self._block for index in indices if index not in self._about})
        if not firsts:
            return
        blocks = [list(range(first, min(first + self._block, len(self)))) for first in firsts]
        total = sum(map(len, blocks))
        done = 0
        loaded = load_ahead(partial(_load, self._part), blocks, workers=self._workers)
        for block, items in zip(blocks, loaded, strict=True):
            found = self._embed(torch.stack([item[0] for item in items])).numpy()
            if self._values is None:
                self._values = self._room((len(self), *found.shape[1:]))
            self._values[block] = found
            self._about |= {index: (*item[1:3], item[3].size_px) for index, item in zip(block, items, strict=True)}
            done += len(block)
            told(done, total)

    def _room(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if 4 * int(np.prod(shape)) <= self._memory:
            return np.empty(shape, np.float32)
        where = self._folder if self._folder.is_dir() else None
        with tempfile.TemporaryFile(dir=where) as file:  # the map keeps it; nothing is left behind
            return np.memmap(file, np.float32, "w+", shape=shape)


def _load(part: Part, block: list[int]) -> list[Item]:
    """Outside of the class: a loader process gets the images' part alone, not the encoder."""
    return [part.item(index, 0) for index in block]
