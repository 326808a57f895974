"""A U-Net decoder on an encoder's pyramid, up to the image's own size.

Sources: U-Net (arXiv 1505.04597) for the joining of scales; the pyramid that transposed convolutions make of a plain
ViT's one scale is ViTDet's (arXiv 2203.16527). Group norm (arXiv 1803.08494) throughout: what it does depends neither
on the size of a batch nor on whether the encoder is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from shared.backbones import Backbone
from shared.rng import seed_key

_FINEST = 4
_GROUPS = 8
_MOST = 16


class SegmentationModel(nn.Module):
    """An encoder with a decoder; weights of the decoder are a function of its shape and the seed.

    Args:
        backbone: Its model is the encoder.
        outputs: Channels of the answer.
        width: Channels at full size.
        seed: Of the decoder's weights.
    """

    def __init__(self, backbone: Backbone, outputs: int, *, width: int, seed: int) -> None:
        super().__init__()
        self.encoder = backbone.model
        self._backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_key("finetune/head", seed) % 2**63)
            self.decoder = Decoder(backbone.channels, backbone.reductions, backbone.in_chans, outputs, width)

    def forward(self, image: Float[Tensor, "B C S S"]) -> Float[Tensor, "B O S S"]:
        """Logits of every pixel."""
        return self.decoder(image, self._backbone.features(image))


class Decoder(nn.Module):
    """From features, finest first, to one answer a pixel.

    Each step doubles the size, joins the encoder's features of that scale, and convolves twice. Finer than the
    encoder's finest scale (4 px) there is only the image itself, convolved twice at full size.

    Args:
        channels: Of each of the encoder's scales.
        reductions: Pixels per position of each, ascending.
        in_chans: Of the image.
        outputs: Channels of the answer.
        width: Channels at full size.
    """

    def __init__(
        self, channels: Sequence[int], reductions: Sequence[int], in_chans: int, outputs: int, width: int
    ) -> None:
        super().__init__()
        wide = [width * min(_MOST, reduction) for reduction in reductions]
        self.lifts = nn.ModuleList()
        if len(reductions) == 1:
            doublings = [count for count in range(6, 0, -1) if reductions[0] / 2**count >= _FINEST - 1]
            sizes = [width * max(_FINEST, min(_MOST, int(reductions[0] / 2**count))) for count in doublings]
            self.lifts.extend(_lift(channels[0], out, count) for out, count in zip(sizes, doublings, strict=True))
            channels, wide = [*sizes, channels[0]], [*sizes, wide[0]]
        self.deepest = _convolve(channels[-1], wide[-1], 1)
        self.joins = nn.ModuleList(
            _twice(wide[place + 1] + channels[place], wide[place]) for place in range(len(wide) - 1)
        )
        self.at_full = _twice(in_chans, width)
        self.to_half = _twice(wide[0], 2 * width)
        self.to_full = _twice(3 * width, width)
        self.answer = nn.Conv2d(width, outputs, 1)

    def forward(self, image: Float[Tensor, "B C S S"], features: Sequence[Tensor]) -> Float[Tensor, "B O S S"]:
        """Logits of every pixel."""
        scales = [*(lift(features[0]) for lift in self.lifts), *features]
        now: Tensor = self.deepest(scales[-1])
        for join, finer in zip(reversed(self.joins), reversed(scales[:-1]), strict=True):
            now = join(torch.cat([_sized(now, finer.shape[-2:]), finer], dim=1))
        height, width = image.shape[-2:]
        now = self.to_half(_sized(now, (-(-height // 2), -(-width // 2))))
        now = self.to_full(torch.cat([_sized(now, (height, width)), self.at_full(image)], dim=1))
        answer: Tensor = self.answer(now)
        return answer


def _sized(features: Tensor, size: Sequence[int]) -> Tensor:
    return interpolate(features, size=tuple(size), mode="bilinear", align_corners=False)


def _convolve(before: int, after: int, side: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, side, padding=side // 2, bias=False), nn.GroupNorm(_GROUPS, after), nn.ReLU()
    )


def _twice(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(_convolve(before, after, 3), _convolve(after, after, 3))


def _lift(before: int, after: int, doublings: int) -> nn.Sequential:
    """Transposed convolutions that double the size so many times."""
    steps: list[nn.Module] = []
    for number in range(doublings):
        steps.append(nn.ConvTranspose2d(before if number == 0 else after, after, 2, stride=2, bias=False))
        steps += [nn.GroupNorm(_GROUPS, after), nn.ReLU()]
    return nn.Sequential(*steps)
