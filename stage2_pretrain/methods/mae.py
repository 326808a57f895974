"""MAE: a ViT sees the visible patches only, a light transformer draws the hidden ones.

Source: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from shared.backbones import Backbone
from shared.config import Strict
from shared.errors import ConfigError
from shared.rng import seed_key
from stage2_pretrain.methods.pixel_method import PixelMethod
from stage2_pretrain.methods.pixels import patches
from stage2_pretrain.methods.tokens import Tokens, check_vit, looked_at, one_sequence


class MAEOptions(Strict):
    """Settings of MAE."""

    decoder_width: int = Field(
        256, ge=16, le=4096, description="Channels of the decoder, a multiple of 4 and of its heads; 512 in the paper."
    )
    decoder_depth: int = Field(4, ge=1, le=48, description="Blocks of the decoder; 8 in the paper.")
    decoder_heads: int = Field(8, ge=1, le=64, description="Attention heads of a decoder's block; 16 in the paper.")
    norm_target: bool = Field(
        True, description="Draw each patch in units of its own mean and deviation; false: the pixels as they are."
    )
    positions: Literal["sincos", "learned"] = Field(
        "sincos",
        description="Position embedding of the encoder. sincos: fixed sines, as published; finetuning may change "
        "them. learned: timm's, learned where a patch is visible, so hardly where a policy mostly hides.",
    )


class MAE(PixelMethod):
    """Encoder, decoder and loss.

    Args:
        options: Settings.
        backbone: The encoder, a plain ViT; its own module is trained, its state dict stays timm's.
        size_px: Side of the square images, a multiple of the encoder's patch.
        seed: Seed of the initial weights beside the encoder's.

    Raises:
        ConfigError: Sizes that do not divide each other, or an encoder that has no form on visible tokens alone.
    """

    Options: ClassVar[type[Strict]] = MAEOptions
    version: ClassVar[int] = 1

    def __init__(self, options: MAEOptions, backbone: Backbone, *, size_px: int, seed: int) -> None:
        super().__init__()
        width, heads = options.decoder_width, options.decoder_heads
        model: Any = check_vit(backbone.model, backbone.name, tokenwise=True)
        if width % 4 or width % heads:
            raise ConfigError(f"method.decoder_width: {width}, expected a multiple of 4 and of {heads} heads")
        self.backbone = backbone
        self.encoder: Any = model
        self.patch_px = backbone.stride
        self.grid = backbone.grid(size_px)
        self.norm_target = options.norm_target
        self.prefix = model.num_prefix_tokens
        if options.positions == "sincos":
            self._fix_positions()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_key("mae", seed))
            self.embed = nn.Linear(model.embed_dim, width)
            self.token = nn.Parameter(torch.empty(width))
            self.decoder = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(options.decoder_depth)))
            self.norm = nn.LayerNorm(width)
            self.to_pixels = nn.Linear(width, self.patch_px**2 * backbone.in_chans)
            nn.init.normal_(self.token, std=0.02)
            for module in (self.embed, self.to_pixels, *self.decoder.modules()):
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        self.places: Tensor
        self.register_buffer("places", sincos(self.grid, width), persistent=False)

    def encode(self, image: Float[Tensor, "B C S S"], tokens: Tokens, visible: Bool[Tensor, "B L"]) -> Tensor:
        """What timm's own network makes of each image's first tokens and visible patches, [1, T, C].

        Args:
            image: Pixels; those of hidden patches are not read.
            tokens: Of the visible patches.
            visible: True where the encoder sees the patch.
        """
        model = self.encoder
        weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
        cut = patches(image, self.patch_px)[visible]
        rows = model.patch_embed.norm(F.linear(cut, weight.permute(0, 2, 3, 1).flatten(1), bias))
        first = torch.cat([token[0] for token in (model.cls_token, model.reg_token) if token is not None] or [rows[:0]])
        places = model.pos_embed[0]
        if not model.no_embed_class:
            first, places = first + places[: self.prefix], places[self.prefix :]
        rows = rows + places[visible.nonzero()[:, 1]]
        with one_sequence(model, tokens):
            x = model.norm_pre(model.pos_drop(tokens.sequence(first, rows)))
            encoded: Tensor = model.norm(model.blocks(x))
        return encoded

    def features(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L D"]:
        """Features of every patch after the decoder's last block."""
        seen = visible.flatten(1)
        tokens = Tokens(seen, self.prefix)
        rows = self.embed(self.encode(image, tokens, seen)[0])
        whole = self.token.to(rows.dtype).expand(seen.numel(), -1)
        whole = whole.index_copy(0, seen.flatten().nonzero()[:, 0], rows[tokens.patch_slots])
        placed = whole.view(*seen.shape, -1) + self.places
        decoded: Tensor = self.decoder(torch.cat([rows[tokens.prefix_slots], placed], 1))
        return decoded[:, self.prefix :]

    def pixels(self, features: Float[Tensor, "*n D"]) -> Float[Tensor, "*n P"]:
        """The last norm and one linear layer."""
        drawn: Tensor = self.to_pixels(self.norm(features))
        return drawn

    def attention(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
        """Where the encoder looks in the whole image: see `looked_at`."""
        return looked_at(self.encoder, image)

    def _fix_positions(self) -> None:
        """Sines in timm's own parameter, zero for the first tokens; a plain, learnable parameter wherever it is loaded.

        Learned positions would be learned where patches are visible: a policy that hides regions would leave those of
        the middle of the image behind, and finetuning sees every patch.
        """
        positions = self.encoder.pos_embed
        with torch.no_grad():
            positions.zero_()
            positions[0, -(self.grid[0] * self.grid[1]) :] = sincos(self.grid, positions.shape[2])
        positions.requires_grad_(False)


def sincos(grid: tuple[int, int], width: int) -> Float[Tensor, "L width"]:
    """Positions on a grid: sines and cosines of the row in one half of the channels, of the column in the other.

    Source: MAE; wavelengths from 2 pi to 10000 * 2 pi patches, as in Attention Is All You Need (arXiv 1706.03762).

    Args:
        grid: Rows and columns.
        width: Channels, a multiple of 4.
    """
    pace = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * pace for axis in axes]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1).float()
