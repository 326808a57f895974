"""The visible patches of a batch as a batch of their own: where they are, and what is around them."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from shared import ranks
from shared.errors import UsageError
from stage2_pretrain.methods.norm import normalise_rows


class Cells:
    """The visible patches of one batch.

    Args:
        visible: True where the encoder sees the patch.

    Attributes:
        visible: As given.
        count: T, visible patches of this process.
        image: Image of each cell, ascending.
        row: Its row in the grid.
        column: Its column.

    Raises:
        UsageError: A batch without a visible patch in any process.
    """

    def __init__(self, visible: Bool[Tensor, "B gh gw"]) -> None:
        self.visible = visible
        self.image, self.row, self.column = visible.nonzero(as_tuple=True)
        self.count = len(self.image)
        self.total = ranks.total(self.count)
        if not self.total:
            raise UsageError("no patch of this batch is visible", hint="hide less, or use a finer grid")
        self._kept: dict[tuple[int, ...], Any] = {}

    def cut(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "T C p p"]:
        """The pixels of the visible patches."""
        batch, channels, height, width = image.shape
        rows, columns = self.visible.shape[1:]
        parts = image.view(batch, channels, rows, height // rows, columns, width // columns)
        return parts.permute(0, 2, 4, 1, 3, 5)[self.image, self.row, self.column].contiguous(
            memory_format=torch.channels_last
        )

    def dense(self, feature: Float[Tensor, "T C t t"], fill: Tensor | None = None) -> Float[Tensor, "B C h w"]:
        """Every site in its place; elsewhere zero, or ``fill``, one value a channel."""
        batch, rows, columns = self.visible.shape
        side, channels = feature.shape[-1], feature.shape[1]
        place = self.places(side)
        count = batch * rows * columns * side * side
        if fill is None:
            spread = feature.new_zeros(count, channels)
        else:
            spread = fill.reshape(1, channels).to(feature.dtype).expand(count, channels)
        whole = spread.index_copy(0, place, flat(feature))
        return whole.view(batch, rows * side, columns * side, channels).permute(0, 3, 1, 2)

    def places(self, side: int) -> Int64[Tensor, "T*t*t"]:
        """Of each site, its row in a dense [B, h, w] flattened row by row."""
        key = (side,)
        if key not in self._kept:
            _, rows, columns = self.visible.shape
            step = torch.arange(side, device=self.image.device)
            y = (self.row * side)[:, None, None] + step[:, None]
            x = (self.column * side)[:, None, None] + step
            whole = ((self.image * rows * side)[:, None, None] + y) * (columns * side) + x
            self._kept[key] = whole.flatten()
        return self._kept[key]

    def halo(self, side: int, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the sites of every cell and of its surroundings come from.

        Returns:
            Of each of the ``(before + side + after) ** 2`` positions of a cell, its row among the sites of all cells,
            their number where hidden, one more outside of the image; which positions are other cells' sites; and
            those sites' rows.
        """
        key = (side, before, after)
        if key not in self._kept:
            batch, rows, columns = self.visible.shape
            device = self.image.device
            offset = torch.arange(-before, side + after, device=device)
            cell = torch.div(offset, side, rounding_mode="floor")
            within = offset - cell * side
            reach = max(-(-before // side), -(-after // side))
            hidden, outside = self.count, self.count + 1
            number = torch.full((batch, rows + 2 * reach, columns + 2 * reach), outside, device=device)
            number[:, reach : reach + rows, reach : reach + columns] = hidden
            number[self.image, self.row + reach, self.column + reach] = torch.arange(self.count, device=device)
            found = number[
                self.image[:, None, None],
                (self.row + reach)[:, None, None] + cell[:, None],
                (self.column + reach)[:, None, None] + cell,
            ]
            sites = found * (side * side) + within[:, None] * side + within
            last = self.count * side * side
            index = torch.where(found < hidden, sites, last + (found - hidden))
            border = torch.ones_like(index, dtype=torch.bool)
            border[:, before : before + side, before : before + side] = False
            border = (border & (index < last)).flatten()
            position = border.nonzero().squeeze(1)
            index = index.flatten()
            self._kept[key] = index, position, index[position]
        return self._kept[key]

    def norm(self, norm: nn.BatchNorm2d, feature: Float[Tensor, "T C t t"]) -> Float[Tensor, "T C t t"]:
        """BatchNorm; its statistics are over visible sites, in training those of all processes.

        Raises:
            UsageError: One visible site alone in training: no variance.
        """
        side = feature.shape[-1]
        if norm.training and self.total * side * side < 2:
            raise UsageError(
                f"a feature of {side}x{side} sites a patch has 1 visible site in the batch: no variance",
                hint="larger batch",
            )
        if norm.training and ranks.size() > 1:
            return unflat(normalise_rows(norm, flat(feature)), self.count, side)
        return type(norm).forward(norm, feature)

    def fill(self, feature: Float[Tensor, "T C t t"], token: Tensor) -> Float[Tensor, "B C h w"]:
        """A dense feature with ``token`` at hidden sites."""
        return self.dense(feature, token)


def flat(feature: Float[Tensor, "T C t t"]) -> Float[Tensor, "T*t*t C"]:
    """One row a site; no copy where channels are last in memory."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


def unflat(rows: Float[Tensor, "T*n*n C"], cells: int, side: int) -> Float[Tensor, "T C n n"]:
    """The inverse of `flat`, channels last in memory."""
    return rows.view(cells, side, side, rows.shape[1]).permute(0, 3, 1, 2)
