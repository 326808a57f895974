"""SparK: a convolutional encoder sees the visible patches only, a light UNet decoder draws the hidden ones.

Source: Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling (arXiv 2301.03580).
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared.backbones import Backbone
from shared.config import Strict
from shared.errors import ConfigError
from shared.rng import seed_key
from stage2_pretrain.methods.cells import Cells
from stage2_pretrain.methods.convolutional import EXECUTION, Execution, check_encoder, encode, locate, looked_at
from stage2_pretrain.methods.norm import BatchNorm2d
from stage2_pretrain.methods.pixel_method import PixelMethod
from stage2_pretrain.methods.pixels import patches
from stage2_pretrain.methods.sparse import Sites

_LEAN_FINEST = 4
"""Side in px of the positions that the lean decoder draws pixels from: the finest scale of an encoder."""


class SparKOptions(Strict):
    """Settings of SparK."""

    decoder_width: int = Field(
        256,
        ge=16,
        le=4096,
        description="Channels of the decoder's deepest level, a multiple of the encoder's stride, halved a level. "
        "768 in the paper; 384 or less is far faster.",
    )
    decoder: Literal["published", "lean"] = Field(
        "published",
        description="lean: no norms, one convolution a level, and pixels from the level of 4 px: several times less to "
        "compute, and not the paper's.",
    )
    patch_px: int | None = Field(
        None,
        ge=4,
        description="Side of a patch in px, the encoder's stride if not given. A smaller one can tell smaller regions: "
        "a position of the encoder is then active where any of its pixels is visible; execution=masked only.",
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
        stride, finest = backbone.stride, 1 if options.decoder == "published" else _LEAN_FINEST
        self.grid = check_encoder(backbone, size_px, options.execution)
        if stride & (stride - 1):
            raise ConfigError(f"backbone {backbone.name}: stride {stride}, expected a power of two")
        self.execution: Execution = options.execution
        self.backbone = backbone
        self.encoder = backbone.model
        self.finest = finest
        self.patch_px = options.patch_px or stride
        if stride % self.patch_px:
            raise ConfigError(f"method.patch_px: {self.patch_px}, expected a divisor of the encoder's stride {stride}")
        if self.patch_px < stride:
            if self.execution == "packed":
                raise ConfigError(
                    f"method.patch_px: {self.patch_px}, finer than the encoder's stride {stride}: expected "
                    "execution=masked",
                    hint="--set method.execution=masked, or a lower backbone_options.output_stride",
                )
            self.grid = (size_px // self.patch_px, size_px // self.patch_px)
        widths = [options.decoder_width >> level for level in range((stride // finest).bit_length())]
        if options.decoder_width % stride:
            raise ConfigError(f"decoder_width: {options.decoder_width}, expected a multiple of the stride {stride}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_key("spark", seed))
            self.densify = nn.ModuleList(
                _Densify(channels, options.decoder_width * reduction // stride)
                for channels, reduction in zip(backbone.channels, backbone.reductions, strict=True)
            )
            block = _UpBlock if options.decoder == "published" else _LeanBlock
            self.decoder = nn.ModuleList(block(before, after) for before, after in pairwise(widths))
            self.to_pixels = nn.Conv2d(widths[-1], backbone.in_chans * finest**2, 1)

    def features(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L P"]:
        """The decoder draws whole images: of a patch, its pixels."""
        return patches(self(image, visible), self.patch_px)

    def pixels(self, features: Float[Tensor, "*n P"]) -> Float[Tensor, "*n P"]:
        """As they are."""
        return features

    def attention(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
        """Where the encoder looks in the whole image: see `looked_at`."""
        looked, finer = looked_at(self.backbone, image), self.backbone.stride // self.patch_px
        if finer == 1:
            return looked
        coarse = looked.view(len(image), self.grid[0] // finer, -1)
        return coarse.repeat_interleave(finer, 1).repeat_interleave(finer, 2).flatten(1)

    def forward(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B C S S"]:
        """Draw every pixel, in units of its patch's own mean and deviation."""
        where = self.where(visible)
        decoded: Tensor | None = None
        levels = dict(zip(self.backbone.reductions, self.densify, strict=True))
        features = dict(zip(self.backbone.reductions, self.encode(image, where), strict=True))
        reduction = self.backbone.stride
        for block in (*self.decoder, self.to_pixels):
            if reduction in features:
                dense = levels[reduction](features[reduction], where)
                decoded = dense if decoded is None else decoded + dense
            decoded = block(decoded)
            reduction //= 2
        assert decoded is not None
        return decoded if self.finest == 1 else F.pixel_shuffle(decoded, self.finest)

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


class _LeanBlock(nn.Module):
    """Double the resolution by rearranged channels, then one convolution beside a shortcut; without norms.

    Source: ours; rearranged channels are those of sub-pixel convolution (arXiv 1609.05158).
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(before, 4 * after, 1)
        self.mix = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, feature: Float[Tensor, "B D h w"]) -> Float[Tensor, "B E h2 w2"]:
        """[B, before, h, w] to [B, after, 2h, 2w]."""
        wide = F.pixel_shuffle(self.up(feature), 2)
        output: Tensor = wide + self.mix(F.gelu(wide))
        return output


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
