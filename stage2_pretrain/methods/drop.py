"""Dropped paths where images are packed: one draw an image, as timm's, not one a patch or a batch."""

from __future__ import annotations

from jaxtyping import Float, Int64
from timm.layers.drop import DropPath
from torch import Tensor


def drop_path(
    drop: DropPath, feature: Float[Tensor, "T ..."], image: Int64[Tensor, "T"], images: int
) -> Float[Tensor, "T ..."]:
    """The feature, zero where its image's path is dropped.

    Args:
        drop: timm's module.
        feature: Of visible patches or tokens.
        image: Of each of them.
        images: Of the batch.
    """
    if drop.drop_prob == 0.0 or not drop.training:
        return feature
    kept = 1 - drop.drop_prob
    draws = feature.new_empty(images).bernoulli_(kept)
    if kept > 0.0 and drop.scale_by_keep:
        draws.div_(kept)
    return feature * draws[image].view(-1, *[1] * (feature.dim() - 1))
