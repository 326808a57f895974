"""Run an unmodified timm ViT on the visible patches only, however many each image has.

The tokens of all images of a batch are one sequence [1, T, C], images one after another, each with its class and
register tokens first. What acts on a token alone (linear layers, norms, activations) then runs as it is; attention is
block-diagonal, each image within itself. Images stand in ascending order of their counts, so that those with as many
are neighbours and one batched attention takes them without a copy: on a CPU the fastest of the exact ways
(tests/benchmarks/vit). On a GPU xformers does all of them at once, if it is installed.

Source: MAE (arXiv 2111.06377) for an encoder of visible tokens; there every image has as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers.activations import GELU, QuickGELU
from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import LayerNorm, RmsNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from shared import ranks
from shared.errors import ConfigError, UsageError
from stage2_pretrain.methods.drop import drop_path

_HINT = "name a plain ViT of timm, e.g. vit_tiny_patch16_224, vit_small_patch16_224, vit_base_patch16_224"
_TOKENWISE = (
    *(nn.Sequential, Block, ResPostBlock, LayerScale, Mlp, GluMlp, SwiGLU, nn.Linear, nn.Identity, nn.Dropout),
    *(LayerNorm, nn.LayerNorm, RmsNorm, nn.RMSNorm, nn.GELU, GELU, QuickGELU, nn.ReLU, nn.SiLU, nn.Sigmoid),
)
"""Modules that act on each token alone, and those made of nothing but such, attention and dropped paths."""


class Tokens:
    """The visible tokens of one batch, in one sequence.

    Args:
        visible: True where the encoder sees the patch.
        prefix: Class and register tokens of each image.

    Attributes:
        lengths: Tokens of each image, in the order of the sequence; those without a token are left out.
        image: Image of each token of the sequence.
        prefix_slots: Where the first tokens of each image are in the sequence, [B, prefix].
        patch_slots: Where its patches are; ordered as ``visible[visible]`` is, image after image.

    Raises:
        UsageError: A batch without a visible patch in any process.
    """

    def __init__(self, visible: Bool[Tensor, "B L"], prefix: int) -> None:
        if not ranks.total(int(visible.sum())):
            raise UsageError("no patch of this batch is visible", hint="hide less, or use a finer grid")
        device = visible.device
        counts = visible.sum(1)
        order = counts.argsort(stable=True)
        sizes = counts[order] + prefix
        starts = torch.empty_like(sizes)
        starts[order] = sizes.cumsum(0) - sizes
        self.image = order.repeat_interleave(sizes)
        self.lengths = [size for size in sizes.tolist() if size]
        self.prefix_slots = starts[:, None] + torch.arange(prefix, device=device)
        rank = visible.long().cumsum(1) - 1 + prefix + starts[:, None]
        self.patch_slots = rank[visible]
        self.images = len(visible)

    def sequence(self, prefix: Float[Tensor, "p C"], patches: Float[Tensor, "n C"]) -> Float[Tensor, "1 T C"]:
        """Each image's first tokens, then its visible patches."""
        rows = patches.new_empty(len(self.image), patches.shape[1])
        first = prefix.to(patches.dtype).expand(self.images, *prefix.shape).flatten(0, 1)
        rows = rows.index_copy(0, self.prefix_slots.flatten(), first)
        return rows.index_copy(0, self.patch_slots, patches)[None]

    def attend(
        self, q: Float[Tensor, "T H K"], k: Float[Tensor, "T H K"], v: Float[Tensor, "T H K"], dropped: float
    ) -> Float[Tensor, "T H K"]:
        """Attention of every image within itself.

        Args:
            q: Queries, not scaled.
            k: Keys.
            v: Values.
            dropped: Share of attention weights to drop.
        """
        if not self.lengths:  # still a function of all three, so that their weights get gradients as in other processes
            return q + k + v
        if q.is_cuda and q.dtype != torch.float64 and _has_xformers():
            return _attend_at_once(q, k, v, self.blocks, dropped)
        return _attend_by_length(q, k, v, self.lengths, dropped)

    @cached_property
    def blocks(self) -> Any:
        """Which tokens see each other, for xformers."""
        from xformers.ops import fmha

        return fmha.attn_bias.BlockDiagonalMask.from_seqlens(self.lengths, device=self.image.device)


def check_vit(model: nn.Module, name: str, *, tokenwise: bool) -> nn.Module:
    """The model, if it is a plain ViT.

    Args:
        model: The encoder.
        name: timm's name of it, for messages.
        tokenwise: Also refuse what has no form on a sequence of visible tokens.

    Raises:
        ConfigError: Names the module and its type.
    """
    kind = type(model).__name__
    if type(model) is not VisionTransformer:
        raise ConfigError(f"backbone: {name} is a {kind}, expected a plain VisionTransformer", hint=_HINT)
    embed: Any = model.patch_embed
    if type(embed) is not PatchEmbed or len(set(embed.patch_size)) > 1:
        raise ConfigError(f"backbone: {name} cuts by a {type(embed).__name__}, expected square patches", hint=_HINT)
    if model.pos_embed is None:
        raise ConfigError(
            f"backbone: {name} has no position embedding, so that it can't tell one hidden patch from another"
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise ConfigError(
            f"backbone: {name} drops patches by itself, which is the policy's part", hint="patch_drop_rate=0"
        )
    for part in ("norm_pre", "blocks", "norm") if tokenwise else ():
        for key, child in getattr(model, part).named_modules(prefix=part):
            if type(child) not in (*_TOKENWISE, *_PACKED):
                raise ConfigError(
                    f"backbone: {key} of {name} is a {type(child).__name__}, which has no form on visible tokens alone",
                    hint=_HINT,
                )
    return model


@contextmanager
def one_sequence(model: nn.Module, tokens: Tokens) -> Iterator[None]:
    """Within the context the model's blocks take and give `Tokens.sequence`; it is left as it was found."""
    changed: list[nn.Module] = []
    try:
        for child in model.modules():
            if forward := _PACKED.get(type(child)):
                child.forward = partial(forward, child, tokens)
                changed.append(child)
        yield
    finally:
        for child in changed:
            del child.forward


def _attention(
    attention: Attention, tokens: Tokens, x: Tensor, attn_mask: None = None, is_causal: bool = False
) -> Float[Tensor, "1 T C"]:
    """timm's own, but for the mixing; a block passes no mask."""
    count = x.shape[1]
    q, k, v = attention.qkv(x).view(count, 3, attention.num_heads, attention.head_dim).unbind(1)
    q, k = attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype)
    dropped = attention.attn_drop.p if attention.training else 0.0
    mixed = attention.norm(tokens.attend(q, k, v, dropped).reshape(1, count, attention.attn_dim))
    if attention.gate is not None:
        mixed = mixed * attention.gate(x).sigmoid()
    output: Tensor = attention.proj_drop(attention.proj(mixed))
    return output


def _drop_path(drop: DropPath, tokens: Tokens, x: Tensor) -> Float[Tensor, "1 T C"]:
    return drop_path(drop, x[0], tokens.image, tokens.images)[None]


_PACKED: dict[type[nn.Module], Callable[..., Tensor]] = {Attention: _attention, DropPath: _drop_path}


def _attend_by_length(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], dropped: float) -> Tensor:
    """Images of as many tokens together; they are neighbours."""
    found = []
    begin = place = 0
    while place < len(lengths):
        length = lengths[place]
        images = lengths[place:].count(length)
        end = begin + images * length
        one, two, three = (rows[begin:end].unflatten(0, (images, length)).transpose(1, 2) for rows in (q, k, v))
        mixed = F.scaled_dot_product_attention(one, two, three, dropout_p=dropped)
        found.append(mixed.transpose(1, 2).flatten(0, 1))
        begin, place = end, place + images
    return torch.cat(found)


def _attend_at_once(q: Tensor, k: Tensor, v: Tensor, blocks: Any, dropped: float) -> Tensor:
    """All images in one launch."""
    from xformers.ops import fmha

    mixed: Tensor = fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=blocks, p=dropped)[0]
    return mixed


@cache
def _has_xformers() -> bool:
    return find_spec("xformers") is not None


def looked_at(model: Any, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
    """Attention of the class token in the last block to each patch of the whole image, the mean over heads.

    Of all patches together where there is no class token.

    Source: AttMask (arXiv 2203.12719).
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    for block in model.blocks[:-1]:
        x = block(x)
    last, prefix = model.blocks[-1], model.num_prefix_tokens
    mixing = last.attn
    rows = last.norm1(x) if isinstance(last, Block) else x
    q, k, _ = mixing.qkv(rows).unflatten(2, (3, mixing.num_heads, mixing.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = mixing.q_norm(q), mixing.k_norm(k)
    weights = (q @ k.transpose(-2, -1) * mixing.scale).softmax(-1)
    asking = weights[:, :, :1] if model.cls_token is not None else weights[:, :, prefix:]
    return asking.mean((1, 2))[:, prefix:]
