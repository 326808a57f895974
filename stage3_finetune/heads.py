"""Heads on an encoder beside timm's own classifier: attention over its tokens, and its nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn

from shared.backbones import Backbone
from shared.errors import ConfigError
from shared.rng import seed_key

_HEADS_MAX = 8


class Headed(nn.Module):
    """An encoder and a head of ours; not a timm module.

    Args:
        encoder: A timm module without a classifier.
        head: Takes its features.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the head's tensors in the state dict."""
        return tuple(sorted(name for name in self.state_dict() if name.startswith("head.")))


class AttentionHead(nn.Module):
    """A learned query pools the encoder's tokens by multi-head attention; a linear layer follows.

    Args:
        channels: Of a token.
        classes: Outputs.

    Source: the attentive probe of Chen et al., Context Autoencoder (IJCV 2023).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Parameter(torch.empty(1, 1, channels))
        self.attention = nn.MultiheadAttention(channels, gcd(_HEADS_MAX, channels), batch_first=True)
        self.fc = nn.Linear(channels, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, tokens: Float32[Tensor, "B L C"]) -> Float32[Tensor, "B K"]:
        """Logits."""
        normed = self.norm(tokens)
        pooled, _ = self.attention(self.query.expand(len(normed), -1, -1), normed, normed, need_weights=False)
        logits: Float32[Tensor, "B K"] = self.fc(pooled[:, 0])
        return logits


class Neighbours(nn.Module):
    """Votes of the nearest training images: by cosine, each counts exp(cosine / temperature).

    Args:
        k: How many vote.
        temperature: Above 0.

    Source: Wu et al., non-parametric instance discrimination (CVPR 2018); Caron et al., DINO (ICCV 2021).
    """

    features: Tensor
    targets: Tensor

    def __init__(self, k: int, temperature: float) -> None:
        super().__init__()
        self.k, self.temperature = k, temperature
        self.register_buffer("features", torch.empty(0, 0))
        self.register_buffer("targets", torch.empty(0, 0))

    def remember(self, features: Float32[Tensor, "N D"], targets: Float32[Tensor, "N K"]) -> None:
        """Keep the training images: features, and 1 for each class that they have."""
        self.features, self.targets = features.clone(), targets.clone()

    def forward(self, features: Float32[Tensor, "B D"]) -> Float32[Tensor, "B K"]:
        """Share of the votes that each class got."""
        return self.votes(features, (self.k,))[self.k]

    def votes(self, features: Float32[Tensor, "B D"], ks: tuple[int, ...]) -> dict[int, Float32[Tensor, "B K"]]:
        """`forward` for several numbers of neighbours, which are found once."""
        from sklearn.neighbors import NearestNeighbors

        index = NearestNeighbors(n_neighbors=max(ks), metric="cosine", algorithm="brute")
        distance, row = index.fit(self.features.cpu().numpy()).kneighbors(features.float().cpu().numpy())
        nearest = distance[:, :1].astype(np.float64)
        weight = np.exp((nearest - distance) / self.temperature)  # shares of votes are the same, and none is 0 / 0
        target = self.targets.cpu().numpy()[row]
        found = {}
        for k in ks:
            share = (weight[:, :k, None] * target[:, :k]).sum(axis=1) / weight[:, :k].sum(axis=1)[:, None]
            found[k] = torch.from_numpy(share.astype(np.float32)).to(features.device)
        return found


def put_classifier(model: Any, classes: int, seed: int) -> tuple[str, ...]:
    """Put timm's classifier, its weights a function of shape and seed, on a timm model.

    Returns:
        Names of its tensors.

    Raises:
        ConfigError: The architecture has no classifier to put, or would drop features for it.
    """
    before = set(model.state_dict())
    with _seeded(seed):
        try:
            model.reset_classifier(classes)
        except (AttributeError, TypeError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"the backbone takes no classifier: {type(error).__name__}: {error}") from None
        head = model.get_classifier()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
    after = set(model.state_dict())
    if dropped := sorted(before - after):
        raise ConfigError(f"a classifier for this backbone would drop {', '.join(dropped)}")
    if not after - before:
        raise ConfigError("the backbone takes no classifier")
    return tuple(sorted(after - before))


def put_attention(backbone: Backbone, classes: int, seed: int) -> Headed:
    """An attention head, its weights a function of shape and seed, on an encoder."""
    with _seeded(seed):
        return Headed(backbone.model, AttentionHead(backbone.channels[-1], classes))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's draws are those of a new head; its generator comes out as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_key("finetune/head", seed) % 2**63)
        yield
