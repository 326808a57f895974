"""A convolutional encoder that sees the visible patches only, packed or masked: what SparK and FCMAE share."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from shared.backbones import Backbone
from stage2_pretrain.methods.cells import Cells
from stage2_pretrain.methods.packed import check_packed, packed
from stage2_pretrain.methods.sparse import Sites, check_sparse, sparse

Execution = Literal["packed", "masked"]
EXECUTION = (
    "packed: the encoder computes visible patches only. masked: it computes all of them and multiplies, as "
    "published; the same function, for encoders that have no packed form, and slower."
)


def check_encoder(backbone: Backbone, size_px: int, execution: Execution) -> tuple[int, int]:
    """The grid of patches, each as large as the encoder's stride.

    Raises:
        ConfigError: A size that the stride does not divide, or an encoder with a module that has no such form.
    """
    (check_packed if execution == "packed" else check_sparse)(backbone.model)
    return backbone.grid(size_px)


def locate(visible: Bool[Tensor, "B gh gw"], execution: Execution) -> Sites | Cells:
    """What the encoder may see, as it is computed; a process without a visible patch keeps step with the others."""
    return Cells(visible) if execution == "packed" and visible.any() else Sites(visible)


def encode(backbone: Backbone, image: Float[Tensor, "B C S S"], where: Sites | Cells) -> list[Tensor]:
    """Features of every scale of the encoder, finest first.

    Returns:
        With `Sites`: [B, C, h, w], zero at hidden sites. With `Cells`: [T, C, t, t], the visible patches alone.
    """
    if isinstance(where, Cells):
        with packed(backbone.model, where):
            return backbone.features(where.cut(image))
    with sparse(backbone.model, where):
        return backbone.features(where.multiply(image))


def looked_at(backbone: Backbone, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
    """Where the encoder looks in the whole image: squares of its deepest features, summed over channels.

    Source: Paying More Attention to Attention (arXiv 1612.03928), activation-based attention.
    """
    return backbone.features(image)[-1].square().sum(1).flatten(1)
