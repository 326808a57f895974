"""SparK: a convolutional encoder sees the visible patches only, a light UNet decoder draws the hidden ones.

Source: Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling (arXiv 2301.03580).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from shared.backbones import Backbone
from shared.config import Strict
from shared.errors import ConfigError
from shared.rng import seed_key
from stage2_pretrain.methods.cells import Cells
from stage2_pretrain.methods.convolutional import EXECUTION, Execution, check_encoder, encode, locate, looked_at
from stage2_pretrain.methods.norm import BatchNorm2d
from stage2_pretrain.methods.pixel_method import PixelMethod
from stage2_pretrain.methods.pixels import count_hidden, error, patches, target
from stage2_pretrain.methods.sparse import Sites


class SparKOptions(Strict):
    """Settings of SparK."""

    decoder_width: int = Field(
        256,
        ge=16,
        le=4096,
        description="Channels of the decoder's deepest level, a multiple of the encoder's stride, halved a level. "
        "768 in the paper; 384 or less is far faster.",
    )
    execution: Execution = Field("packed", description=EXECUTION)


class SparK(PixelMethod):
    """Encoder, densifying layers, decoder and loss.

    Args:
        options: Settings.
        backbone: The encoder; its own module is trained, its state dict stays timm's.
        size_px: Side of the square images, a multiple of the encoder's stride.
        seed: Seed of the initial weights beside the encoder's.

    Raises:
        ConfigError: A size that the stride does not divide, a stride that is no power of two, or an
            encoder with a module that has no sparse form.
    """

    Options: ClassVar[type[Strict]] = SparKOptions
    version: ClassVar[int] = 2

    def __init__(self, options: SparKOptions, backbone: Backbone, *, size_px: int, seed: int) -> None:
        super().__init__()
        stride = backbone.stride
        levels = int(math.log2(stride))
        self.grid = check_encoder(backbone, size_px, options.execution)
        if 2**levels != stride:
            raise ConfigError(f"backbone {backbone.name}: stride {stride}, expected a power of two")
        self.execution: Execution = options.execution
        self.backbone = backbone
        self.encoder = backbone.model
        self.patch_px = stride
        widths = [options.decoder_width >> level for level in range(levels + 1)]
        if options.decoder_width % stride:
            raise ConfigError(f"decoder_width: {options.decoder_width}, expected a multiple of the stride {stride}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_key("spark", seed))
            self.densify = nn.ModuleList(
                _Densify(channels, options.decoder_width * reduction // stride)
                for channels, reduction in zip(backbone.channels, backbone.reductions, strict=True)
            )
            self.decoder = nn.ModuleList(_UpBlock(before, after) for before, after in pairwise(widths))
            self.to_pixels = nn.Conv2d(widths[-1], backbone.in_chans, 1)

    def loss(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> dict[str, Tensor]:
        """Mean squared error of the hidden patches, each normalised by its own mean and variance.

        Of several processes, each gives its part: their sum is the mean over the hidden patches of all.

        Args:
            image: Pixels; those of hidden patches reach the target only.
            visible: True where the encoder sees the patch.

        Raises:
            UsageError: A batch without a hidden, or without a visible patch.
        """
        count = count_hidden(visible)
        predicted = self.predict(image, visible)[~visible.flatten(1)]
        return {"loss": error(predicted, target(image, visible, normalised=True), count)}

    def predict(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L P"]:
        """Pixels of every patch."""
        return patches(self(image, visible), self.patch_px)

    def attention(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
        """Where the encoder looks in the whole image: see `looked_at`."""
        return looked_at(self.backbone, image)

    def forward(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B C S S"]:
        """Draw every pixel, in units of its patch's own mean and deviation."""
        where = self.where(visible)
        decoded: Tensor | None = None
        levels = dict(zip(self.backbone.reductions, self.densify, strict=True))
        features = dict(zip(self.backbone.reductions, self.encode(image, where), strict=True))
        reduction = self.patch_px
        for block in self.decoder:
            if reduction in features:
                dense = levels[reduction](features[reduction], where)
                decoded = dense if decoded is None else decoded + dense
            decoded = block(decoded)
            reduction //= 2
        drawn: Tensor = self.to_pixels(decoded)
        return drawn

    def where(self, visible: Bool[Tensor, "B gh gw"]) -> Sites | Cells:
        """What the encoder may see, as it is computed; a process without a visible patch keeps step with the others."""
        return locate(visible, self.execution)

    def encode(self, image: Float[Tensor, "B C S S"], where: Sites | Cells) -> list[Tensor]:
        """Features of every scale of the encoder, finest first.

        Returns:
            With `Sites`: [B, C, h, w], zero at hidden sites. With `Cells`: [T, C, t, t], the visible patches alone.
        """
        return encode(self.backbone, image, where)


class _Densify(nn.Module):
    """Normalise the visible sites, put one learned token at the hidden ones, project."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.token = nn.Parameter(torch.empty(1, channels, 1, 1))
        nn.init.trunc_normal_(self.token, std=0.02)
        self.project = nn.Conv2d(channels, width, 1)

    def forward(self, feature: Tensor, where: Sites | Cells) -> Float[Tensor, "B D h w"]:
        """Dense features for the decoder, from what `SparK.encode` gives."""
        projected: Tensor = self.project(where.fill(where.norm(self.norm, feature), self.token))
        return projected


class _UpBlock(nn.Module):
    """Double the resolution, then two convolutions."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(before, before, 4, stride=2, padding=1)
        self.convs = nn.Sequential(
            nn.Conv2d(before, before, 3, padding=1, bias=False),
            BatchNorm2d(before),
            nn.ReLU6(inplace=True),
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            BatchNorm2d(after),
        )

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E h2 w2"]:
        """[B, before, h, w] to [B, after, 2h, 2w]."""
        output: Tensor = self.convs(self.up(feature))
        return output
