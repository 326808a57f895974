"""SimMIM: a ViT sees the whole image with a token at hidden patches, one linear layer draws their pixels.

Source: SimMIM: A Simple Framework for Masked Image Modeling (arXiv 2111.09886).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shared.backbones import Backbone
from shared.config import Strict
from shared.rng import seed_key
from stage2_pretrain.methods.pixel_method import PixelMethod
from stage2_pretrain.methods.tokens import check_vit, looked_at


class SimMIMOptions(Strict):
    """Settings of SimMIM: there are none."""


class SimMIM(PixelMethod):
    """Encoder, mask token, linear head and loss.

    Args:
        options: Settings.
        backbone: The encoder, a plain ViT; its own module is trained, its state dict stays timm's.
        size_px: Side of the square images, a multiple of the encoder's patch.
        seed: Seed of the initial weights beside the encoder's.

    Raises:
        ConfigError: A size that the patch does not divide, or an encoder that is no plain ViT.
    """

    Options: ClassVar[type[Strict]] = SimMIMOptions
    version: ClassVar[int] = 1
    norm_target = False
    measure = "absolute"

    def __init__(self, options: SimMIMOptions, backbone: Backbone, *, size_px: int, seed: int) -> None:
        super().__init__()
        model: Any = check_vit(backbone.model, backbone.name, tokenwise=False)
        self.backbone = backbone
        self.encoder: Any = model
        self.patch_px = backbone.stride
        self.grid = backbone.grid(size_px)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_key("simmim", seed))
            self.token = nn.Parameter(torch.empty(model.embed_dim))
            self.to_pixels = nn.Linear(model.embed_dim, self.patch_px**2 * backbone.in_chans)
            nn.init.trunc_normal_(self.token, std=0.02)
            nn.init.trunc_normal_(self.to_pixels.weight, std=0.02)
            nn.init.zeros_(self.to_pixels.bias)

    def features(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L C"]:
        """Features of every patch, timm's own but for the token; pixels of hidden patches are not read."""
        seen = visible.repeat_interleave(self.patch_px, 1).repeat_interleave(self.patch_px, 2)[:, None]
        with self._token_at(~visible):
            encoded: Tensor = self.encoder.forward_features(torch.where(seen, image, 0))
        return encoded[:, self.encoder.num_prefix_tokens :]

    def pixels(self, features: Float[Tensor, "*n D"]) -> Float[Tensor, "*n P"]:
        """One linear layer."""
        drawn: Tensor = self.to_pixels(features)
        return drawn

    def attention(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
        """Where the encoder looks in the whole image: see `looked_at`."""
        return looked_at(self.encoder, image)

    @contextmanager
    def _token_at(self, hidden: Bool[Tensor, "B gh gw"]) -> Iterator[None]:
        """Within the context the encoder embeds hidden patches as the token; it is left as it was found."""
        embed = self.encoder.patch_embed

        def embedded(image: Tensor) -> Tensor:
            rows = type(embed).forward(embed, image)  # [B, L, C], or [B, gh, gw, C] with dynamic_img_size
            return torch.where(hidden.view(*rows.shape[:-1], 1), self.token.to(rows.dtype), rows)

        embed.forward = embedded
        try:
            yield
        finally:
            del embed.forward
