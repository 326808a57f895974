"""Hide what the encoder itself attends to: a control for the words."""

from __future__ import annotations

from typing import ClassVar, Literal

from stage2_pretrain.masking.hard import Hard


class Attention(Hard):
    """As `hard`, by where the teacher looks in the whole image instead of by how badly it draws.

    Source: AttMask (arXiv 2203.12719) hides the most attended tokens. A transformer's score is the attention of its
    class token in the last block, the mean over heads; of a network without one, the square of its deepest features
    summed over channels (attention transfer, arXiv 1612.03928).
    """

    strata: ClassVar[tuple[str, ...]] = ("attended", "rest")
    guide: ClassVar[Literal["loss", "attention"]] = "attention"
