"""FCMAE: a convolutional encoder sees the visible patches only, one ConvNeXt block draws the hidden ones.

Source: ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders (arXiv 2301.00808).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from shared.backbones import Backbone
from shared.config import Strict
from shared.rng import seed_key
from stage2_pretrain.methods.cells import Cells
from stage2_pretrain.methods.convolutional import EXECUTION, Execution, check_encoder, encode, locate, looked_at
from stage2_pretrain.methods.pixel_method import PixelMethod
from stage2_pretrain.methods.sparse import Sites


class FCMAEOptions(Strict):
    """Settings of FCMAE."""

    decoder_width: int = Field(512, ge=16, le=4096, description="Channels of the decoder; 512 in the paper.")
    decoder_depth: int = Field(1, ge=1, le=24, description="ConvNeXt blocks of the decoder; 1 in the paper.")
    norm_target: bool = Field(
        True, description="Draw each patch in units of its own mean and deviation; false: the pixels as they are."
    )
    execution: Execution = Field("packed", description=EXECUTION)


class FCMAE(PixelMethod):
    """Encoder, decoder and loss.

    Args:
        options: Settings.
        backbone: The encoder; its own module is trained, its state dict stays timm's.
        size_px: Side of the square images, a multiple of the encoder's stride.
        seed: Seed of the initial weights beside the encoder's.

    Raises:
        ConfigError: A size that the stride does not divide, or an encoder with a module that has no sparse form.
    """

    Options: ClassVar[type[Strict]] = FCMAEOptions
    version: ClassVar[int] = 1

    def __init__(self, options: FCMAEOptions, backbone: Backbone, *, size_px: int, seed: int) -> None:
        super().__init__()
        width = options.decoder_width
        self.grid = check_encoder(backbone, size_px, options.execution)
        self.execution: Execution = options.execution
        self.norm_target = options.norm_target
        self.backbone = backbone
        self.encoder = backbone.model
        self.patch_px = backbone.stride
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_key("fcmae", seed))
            self.project = nn.Conv2d(backbone.channels[-1], width, 1)
            self.token = nn.Parameter(torch.empty(1, width, 1, 1))
            self.decoder = nn.Sequential(
                *(ConvNeXtBlock(width, use_grn=True, ls_init_value=None) for _ in range(options.decoder_depth))
            )
            self.to_pixels = nn.Linear(width, self.patch_px**2 * backbone.in_chans)
            nn.init.normal_(self.token, std=0.02)
            for module in (self.project, self.to_pixels, *self.decoder.modules()):
                if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)

    def encode(self, image: Float[Tensor, "B C S S"], where: Sites | Cells) -> Tensor:
        """The deepest feature: with `Sites` [B, C, gh, gw], zero at hidden sites; with `Cells` [T, C, 1, 1]."""
        return encode(self.backbone, image, where)[-1]

    def features(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L D"]:
        """Features of every patch after the decoder's last block."""
        where = locate(visible, self.execution)
        dense = where.fill(self.project(self.encode(image, where)), self.token)
        decoded: Tensor = self.decoder(dense)
        return decoded.flatten(2).transpose(1, 2)

    def pixels(self, features: Float[Tensor, "*n D"]) -> Float[Tensor, "*n P"]:
        """One linear layer."""
        drawn: Tensor = self.to_pixels(features)
        return drawn

    def attention(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
        """Where the encoder looks in the whole image: see `looked_at`."""
        return looked_at(self.backbone, image)
