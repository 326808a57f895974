"""SparK: a convolutional encoder sees the visible patches only, a light UNet decoder draws the hidden ones.

Source: Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling (arXiv 2301.03580).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shared import ranks
from shared.backbones import Backbone
from shared.config import Strict
from shared.errors import ConfigError, UsageError
from shared.rng import seed_key
from stage2_pretrain.methods.norm import BatchNorm2d
from stage2_pretrain.methods.packed import Cells, check_packed, packed
from stage2_pretrain.methods.sparse import Sites, check_sparse, sparse

_EPS = 1e-6
"""Added to the variance of a patch, so that a constant patch stays finite."""


class SparKOptions(Strict):
    """Settings of SparK."""

    decoder_width: int = Field(
        256,
        ge=16,
        le=4096,
        description="Channels of the decoder's deepest level, a multiple of the encoder's stride, halved a level. "
        "768 in the paper; 384 or less is far faster.",
    )
    execution: Literal["packed", "masked"] = Field(
        "packed",
        description="packed: the encoder computes visible patches only. masked: it computes all of them and "
        "multiplies, as published; the same function, for encoders that have no packed form, and slower.",
    )


class SparK(nn.Module):
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
        if size_px % stride:
            raise ConfigError(f"size_px: {size_px} is no multiple of the encoder's stride {stride}")
        if 2**levels != stride:
            raise ConfigError(f"backbone {backbone.name}: stride {stride}, expected a power of two")
        self.packed = options.execution == "packed"
        (check_packed if self.packed else check_sparse)(backbone.model)
        self.backbone = backbone
        self.encoder = backbone.model
        self.patch_px = stride
        self.grid = (size_px // stride, size_px // stride)
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
        hidden = ~visible.flatten()
        count = ranks.total(int(hidden.sum()))
        if not count:
            raise UsageError("no patch of this batch is hidden: nothing to learn", hint="hide more")
        predicted = patches(self(image, visible), self.patch_px).flatten(0, 1)[hidden]
        target = normalise(patches(image, self.patch_px).flatten(0, 1))[0][hidden]
        if ranks.size() == 1:
            return {"loss": F.mse_loss(predicted, target)}
        return {"loss": F.mse_loss(predicted, target, reduction="sum") / (count * target.shape[1])}

    def errors(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Float[Tensor, "B L"]:
        """What `loss` is the mean of, for every patch; that of a visible one is no measure."""
        target = normalise(patches(image, self.patch_px))[0]
        return F.mse_loss(patches(self(image, visible), self.patch_px), target, reduction="none").mean(-1)

    def attention(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B L"]:
        """Where the encoder looks in the whole image: squares of its deepest features, summed over channels."""
        return self.backbone.features(image)[-1].square().sum(1).flatten(1)

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
        return Cells(visible) if self.packed and visible.any() else Sites(visible)

    def encode(self, image: Float[Tensor, "B C S S"], where: Sites | Cells) -> list[Tensor]:
        """Features of every scale of the encoder, finest first.

        Returns:
            With `Sites`: [B, C, h, w], zero at hidden sites. With `Cells`: [T, C, t, t], the visible patches alone.
        """
        if isinstance(where, Cells):
            with packed(self.encoder, where):
                return self.backbone.features(where.cut(image))
        with sparse(self.encoder, where):
            return self.backbone.features(where.multiply(image))

    @torch.no_grad()
    def reconstruct(self, image: Float[Tensor, "B C S S"], visible: Bool[Tensor, "B gh gw"]) -> Tensor:
        """The image with its hidden patches drawn, at each patch's true mean and variance; for pictures."""
        training = self.training
        self.eval()
        try:
            predicted = patches(self(image, visible), self.patch_px)
        finally:
            self.train(training)
        true = patches(image, self.patch_px)
        _, mean, deviation = normalise(true)
        seen = visible.flatten(1)[:, :, None]
        return unpatch(torch.where(seen, true, predicted * deviation + mean), self.patch_px, image.shape[1], self.grid)


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


def patches(image: Float[Tensor, "B C S S"], patch_px: int) -> Float[Tensor, "B L P"]:
    """Pixels of each patch: patches row by row, then the pixels of a patch row by row, channels last.

    >>> patches(torch.arange(16.0).view(1, 1, 4, 4), 2)[0].tolist()
    [[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0], [8.0, 9.0, 12.0, 13.0], [10.0, 11.0, 14.0, 15.0]]
    """
    batch, channels, height, width = image.shape
    rows, columns = height // patch_px, width // patch_px
    cut = image.reshape(batch, channels, rows, patch_px, columns, patch_px).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, rows * columns, patch_px * patch_px * channels)


def unpatch(cut: Float[Tensor, "B L P"], patch_px: int, channels: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patches`."""
    parts = cut.reshape(len(cut), *grid, patch_px, patch_px, channels).permute(0, 5, 1, 3, 2, 4)
    return parts.reshape(len(cut), channels, grid[0] * patch_px, grid[1] * patch_px)


def normalise(cut: Float[Tensor, "*L P"]) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch by its mean and deviation (unbiased variance plus 1e-6); also returns those two."""
    mean = cut.mean(-1, keepdim=True)
    deviation = (cut.var(-1, keepdim=True, unbiased=True) + _EPS).sqrt()
    return (cut - mean) / deviation, mean, deviation
