"""The network of `lite`: text queries over image context give mask, centres, size and presence.

Image side: a frozen encoder's embedding (a cell is 4 px) and the padded pixels themselves, which carry the detail
that the embedding's grid loses. Text side: the sentence vector and word pieces of a frozen language model pass two
decoder layers over the 16 x 16 image context; the refined sentence vector is then compared with every pixel
(cf. Cheng et al., Mask2Former, CVPR 2022; centres and sizes as in Zhou et al., Objects as points, 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

EMBEDDING_CHANNELS = 256
TEXT_CHANNELS = 384
CELLS = 64
"""Side of the embedding grid, of the centre map and of the size map."""
MASK_CELLS = 128
"""Side of the mask logits; both grids cover the padded square input."""
EMBEDDING_SCALE = 10.0
"""The encoder's values spread by about 0.12; unscaled, the coordinates drown them."""
TEXT_SCALE = 8.0
PIXEL_FOLD = 2
"""Pixels a mask cell, along each side."""


@dataclass
class Features:
    """What all prompts of an image share: pixel features, context tokens, log size."""

    cells: Float[Tensor, "B c 64 64"]
    fine: Float[Tensor, "B f 128 128"]
    context: Float[Tensor, "B 256 c"]
    log_size: Float[Tensor, "B 2 64 64"]


@dataclass
class Answer:
    """Logits for K prompts of B images, and the log of width and height in cells at every cell."""

    mask: Float[Tensor, "B K 128 128"]
    centre: Float[Tensor, "B K 64 64"]
    presence: Float[Tensor, "B K"]
    log_size: Float[Tensor, "B 2 64 64"]


class LiteHead(nn.Module):
    """About 0.25 M parameters at the default widths.

    Args:
        channels: Width c of the trunk and of the text queries; a multiple of 8.
        fine_channels: Width f of the finer mask features; a multiple of 8.
    """

    def __init__(self, channels: int = 64, fine_channels: int = 32) -> None:
        super().__init__()
        c, f = channels, fine_channels
        self.trunk = Trunk(c)
        self.fine = Fine(c, f)
        self.text = nn.Sequential(nn.Linear(TEXT_CHANNELS, c), nn.GELU(), nn.Linear(c, c))
        self.kind = nn.Parameter(torch.randn(2, c) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(c, 4, 2 * c, 0.0, F.gelu, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.mask_query = nn.Linear(c, f + 1)
        self.centre_pixels = nn.Conv2d(c, c, 1)
        self.centre_query = nn.Linear(c, c + 1)
        self.presence = nn.Linear(c, 1)
        nn.init.constant_(self.centre_query.bias[-1:], -4.0)  # centres are rare; a flat start costs 200 steps

    def look(self, embedding: Float[Tensor, "B 256 64 64"], pixels: Float[Tensor, "B 3 256 256"]) -> Features:
        """Image features, before any text; ``pixels`` in [0, 1], padded as the encoder saw them."""
        cells, context, log_size = self.trunk(embedding)
        return Features(cells, self.fine(cells, pixels), context, log_size)

    def ask(self, seen: Features, tokens: Float[Tensor, "B K T 384"], filled: Bool[Tensor, "B K T"]) -> Answer:
        """Answer K prompts an image.

        Args:
            seen: From `look`.
            tokens: Unit sentence vector first, then the unit vectors of its word pieces.
            filled: True where a token is real; the rest pads.
        """
        batch, prompts, length, _ = tokens.shape
        text = self.text(tokens * TEXT_SCALE).reshape(batch * prompts, length, -1)
        text = torch.cat([text[:, :1] + self.kind[0], text[:, 1:] + self.kind[1]], dim=1)
        context = seen.context.repeat_interleave(prompts, dim=0)
        for layer in self.layers:
            text = layer(text, context, tgt_key_padding_mask=~filled.reshape(batch * prompts, length))
        query = text[:, 0].reshape(batch, prompts, -1)
        return Answer(
            mask=_compare(self.mask_query(query), seen.fine),
            centre=_compare(self.centre_query(query), self.centre_pixels(seen.cells)),
            presence=self.presence(query)[..., 0],
            log_size=seen.log_size,
        )


class Trunk(nn.Module):
    """Embedding and coordinates to cell features, context tokens and log size."""

    coordinates: Tensor

    def __init__(self, c: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(EMBEDDING_CHANNELS, c, 1)
        self.place = nn.Conv2d(2, c, 1, bias=False)
        self.norm = nn.GroupNorm(8, c)
        self.near = Separable(c, dilation=1)
        self.to_context = nn.Conv2d(c, c, 1)
        self.context_place = nn.Parameter(torch.randn(1, 256, c) * 0.02)
        self.attend = nn.TransformerEncoderLayer(c, 4, 2 * c, 0.1, F.gelu, batch_first=True, norm_first=True)
        self.from_context = nn.Conv2d(c, c, 1)
        self.wide = Separable(c, dilation=2)
        self.size = nn.Sequential(nn.Conv2d(c, c // 2, 1), nn.GELU(), nn.Conv2d(c // 2, 2, 1))
        line = torch.linspace(-1, 1, CELLS)
        y, x = torch.meshgrid(line, line, indexing="ij")
        self.register_buffer("coordinates", torch.stack([x, y])[None], persistent=False)

    def forward(self, embedding: Float[Tensor, "B 256 64 64"]) -> tuple[Tensor, Tensor, Tensor]:
        """Cell features [B, c, 64, 64], context [B, 256, c], log size [B, 2, 64, 64]."""
        x = F.gelu(self.norm(self.enter(embedding * EMBEDDING_SCALE) + 0.5 * self.place(self.coordinates)))
        x = self.near(x)
        coarse = F.avg_pool2d(self.to_context(x), 4)
        context = self.attend(coarse.flatten(2).transpose(1, 2) + self.context_place)
        told = self.from_context(context.transpose(1, 2).reshape(coarse.shape))
        x = x + F.interpolate(told, scale_factor=4.0, mode="bilinear", align_corners=False)
        x = self.wide(x)
        return x, context, self.size(x)


class Fine(nn.Module):
    """Cell features and pixels to mask features at twice the cells."""

    def __init__(self, c: int, f: int) -> None:
        super().__init__()
        self.grow = nn.Conv2d(c, 4 * f, 1)
        self.detail = nn.Conv2d(3 * PIXEL_FOLD**2, f, 3, padding=1)
        self.norm = nn.GroupNorm(8, f)
        self.mix = Separable(f, dilation=1, kernel=3)
        self.leave = nn.Conv2d(f, f, 1)

    def forward(
        self, cells: Float[Tensor, "B c 64 64"], pixels: Float[Tensor, "B 3 256 256"]
    ) -> Float[Tensor, "B f 128 128"]:
        """Features of every mask cell."""
        x = F.pixel_shuffle(self.grow(cells), 2) + self.detail(F.pixel_unshuffle(pixels - 0.5, PIXEL_FOLD))
        return self.leave(self.mix(F.gelu(self.norm(x))))


class Separable(nn.Module):
    """Residual depthwise convolution, norm, activation, pointwise convolution."""

    def __init__(self, c: int, *, dilation: int, kernel: int = 5) -> None:
        super().__init__()
        self.across = nn.Conv2d(c, c, kernel, padding=dilation * (kernel // 2), groups=c, dilation=dilation)
        self.norm = nn.GroupNorm(8, c)
        self.through = nn.Conv2d(c, c, 1)

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B c H W"]:
        """The same shape."""
        with torch.autocast("cpu", enabled=False):  # bf16 gradients of a dilated depthwise convolution overflow
            y = F.gelu(self.norm(self.across(x.float())))
        return x + self.through(y)


def _compare(query: Float[Tensor, "B K c1"], pixels: Float[Tensor, "B c H W"]) -> Float[Tensor, "B K H W"]:
    """Scaled dot product of each query with every pixel; the query's last value is its bias."""
    batch, channels, height, width = pixels.shape
    dot = torch.bmm(query[..., :-1], pixels.reshape(batch, channels, height * width))
    logits = dot * channels**-0.5 + query[..., -1:]
    return logits.reshape(batch, -1, height, width)
