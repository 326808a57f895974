"""One pyramid of features from any encoder: what detectors read.

Several scales get a feature pyramid network (Lin 2017); a single one, as of a ViT, the simple feature pyramid of ViTDet
(Li 2022): the map is enlarged by transposed convolutions, or shrunk by pooling, to strides of 4 to 32 px.
"""

from __future__ import annotations

from collections import OrderedDict

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from shared.backbones import Backbone
from shared.errors import ConfigError

_STRIDES = (4, 8, 16, 32)
ENCODER = "encoder."
"""Prefix of the encoder's own tensors in a pyramid's state dict."""


class Pyramid(nn.Module):
    """An encoder and the pyramid on top; what torchvision calls a backbone.

    Args:
        backbone: The encoder.
        width: Channels of every level.

    Attributes:
        encoder: The encoder's own module.
        strides: Pixels per position of each level, ascending; one more is pooled from the last for proposals.
        out_channels: The width.

    Raises:
        ConfigError: Strides that are no powers of two: anchors would not lie where the features are.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        odd = [stride for stride in backbone.reductions if stride & (stride - 1)]
        if odd:
            raise ConfigError(
                f"backbone {backbone.name}: features of stride {odd[0]} px; detection needs powers of two",
                hint="a ViT with patch_size 8 or 16",
            )
        self.encoder = backbone.model
        self._backbone = backbone
        self.out_channels = width
        if len(backbone.reductions) > 1:
            self.strides: tuple[int, ...] = backbone.reductions
            self.top = FeaturePyramidNetwork(list(backbone.channels), width, extra_blocks=LastLevelMaxPool())
        else:
            self.strides = _STRIDES
            self.top = _Simple(backbone.channels[0], backbone.reductions[0], width)

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        """Levels by their number, finest first, and ``pool``; ``image`` is normalised."""
        features = self._backbone.features(image)
        return self.top(OrderedDict((str(place), feature) for place, feature in enumerate(features)))


class _Simple(nn.Module):
    """Levels of `_STRIDES` from one map of this stride."""

    def __init__(self, channels: int, stride: int, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(channels, stride, target, width) for target in _STRIDES)

    def forward(self, features: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        (feature,) = features.values()
        made = OrderedDict((str(place), level(feature)) for place, level in enumerate(self.levels))
        made["pool"] = max_pool2d(made[str(len(self.levels) - 1)], 1, 2)
        return made


def _level(channels: int, stride: int, target: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while stride > target:
        layers += [nn.ConvTranspose2d(channels, channels // 2, 2, 2), LayerNorm2d(channels // 2), nn.GELU()]
        channels, stride = channels // 2, stride // 2
    if stride < target:
        layers.append(nn.MaxPool2d(target // stride))
    layers += [nn.Conv2d(channels, width, 1, bias=False), LayerNorm2d(width)]
    layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)]
    return nn.Sequential(*layers)
