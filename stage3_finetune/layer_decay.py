"""Layer-wise learning-rate decay: the deeper below the head, the slower an encoder's tensors move."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from torch import nn

_HEAD = "mwm_head"
"""No architecture's tensor: timm puts what it cannot place on top, and so tells which layer that is."""


def layer_scales(encoder: nn.Module, model: nn.Module, head: Collection[str], *, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter of a model.

    The layers are timm's (``group_matcher``; else runs of twelve tensors): ``decay ** n`` for the n-th below the head.
    What timm puts beside the head (a norm before the classifier) moves with it.

    Args:
        encoder: A timm module, anywhere inside ``model``: its parameters are known by identity.
        model: Everything that is trained.
        head: Names in ``model``'s state dict of tensors that the encoder did not bring.
        decay: In (0, 1].

    Returns:
        By name in ``model``.

    Source: Clark et al., ELECTRA (ICLR 2020); Bao et al., BEiT (ICLR 2022).
    """
    layers = _layers(encoder)
    top = layers[_HEAD]
    depth = {id(parameter): top - layers[name] for name, parameter in encoder.named_parameters()}
    return {
        name: 1.0 if name in head else decay ** depth.get(id(parameter), 0)
        for name, parameter in model.named_parameters()
    }


def _layers(encoder: Any) -> dict[str, int]:
    """Layer by name of parameter, from 0 at the stem to that of `_HEAD`."""
    from timm.models import group_parameters
    from timm.optim import auto_group_layers  # type: ignore[attr-defined]

    if not hasattr(encoder, "group_matcher"):
        layers = dict(auto_group_layers(encoder))
        return {**layers, _HEAD: max(layers.values())}
    names = [*(name for name, _ in encoder.named_parameters()), _HEAD]
    named: Any = SimpleNamespace(named_parameters=lambda: ((name, None) for name in names))
    found: dict[str, int] = group_parameters(named, encoder.group_matcher(coarse=False), reverse=True)
    return found
