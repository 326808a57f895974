"""Weights that timm reads, as a start: from a folder, or by their name on timm's hub; every tensor, or an error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.backbones import CONFIG, WEIGHTS, Backbone, build, has_size, put_tensors
from shared.errors import ConfigError, CorruptError, InputMissingError
from stage3_finetune.config import FinetuneConfig

PREFIX = "timm:"
"""Before a name of timm's in ``--encoder``."""


@dataclass(frozen=True)
class Found:
    """An encoder with its weights.

    Attributes:
        backbone: Without a classifier, on the CPU.
        mean: Of each input channel.
        std: Likewise.
        source: Where the weights come from, without a path.
        told: What was kept and what was changed, for a log.
    """

    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    told: str


def read_folder(folder: Path, config: FinetuneConfig) -> Found:
    """Read ``config.json`` and ``model.safetensors`` as timm writes them; a classifier in them is left out.

    Args:
        folder: As ``timm.create_model("local-dir:FOLDER")`` takes it.
        config: Its ``channels`` and ``backbone_options`` count.

    Raises:
        CorruptError: A file is missing or unreadable, or a tensor is missing, unknown or of another shape.
        ConfigError: An architecture that timm does not know, or a number of channels that cannot be had.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        stored = json.loads((folder / CONFIG).read_bytes())
        state, name = load((folder / WEIGHTS).read_bytes()), stored["architecture"]
        cfg, args = stored["pretrained_cfg"], dict(stored.get("model_args") or {})
        given = int(args.pop("in_chans", None) or cfg["input_size"][0])
        args.pop("num_classes", None)
        mean, std, side = cfg["mean"], cfg["std"], int(args.get("img_size") or cfg["input_size"][-1])
        conv, classifiers = cfg.get("first_conv"), _listed(cfg.get("classifier"))
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
        raise CorruptError(
            f"{folder}: not a folder that timm reads: {type(error).__name__}: {error}",
            hint=f"it has {CONFIG} and {WEIGHTS}, as timm's save_for_hf writes them",
        ) from None
    if name.startswith("mwm-"):
        raise ConfigError(f"{folder}: a model with a head of its own, {name}", hint="give the encoder it was made from")
    channels = _channels(config, given)
    stride = {**args, **config.backbone_options}.pop("output_stride", None)
    args = {key: value for key, value in {**args, **config.backbone_options}.items() if key != "output_stride"}
    backbone = build(
        name, in_chans=channels, output_stride=stride, model_args=args, size_px=side if has_size(name) else None
    )
    kept = {key: value for key, value in state.items() if key.rpartition(".")[0] not in classifiers}
    told = f"{name}, all {len(kept)} tensors kept"
    if len(kept) < len(state):
        told += f" but the {len(state) - len(kept)} of its classifier"
    if channels != given:
        told += f", {given} channels made {channels}"
        kept |= _converted(kept, _listed(conv), channels, folder)
    put_tensors(backbone.model, kept, folder.name)
    return Found(backbone, *_colours(mean, std, channels), "a folder of timm's format", told)


def read_named(name: str, config: FinetuneConfig) -> Found:
    """Take weights that timm knows by name, from its cache or from the network.

    Args:
        name: ``NAME[.TAG]`` as ``timm.create_model`` takes it.
        config: As `read_folder`; an architecture that is built for one size is given its ``size_px``.

    Raises:
        ConfigError: No such name, or a number of channels that cannot be had.
        InputMissingError: timm has no weights of that name, or they cannot be had here.
    """
    import timm

    architecture, _, tag = name.partition(".")
    sized = has_size(architecture)
    known = timm.models.get_pretrained_cfg(architecture)
    tags = [item.partition(".")[2] for item in timm.list_pretrained(f"{architecture}.*")]
    if known is None or (tag and tag not in tags):
        raise InputMissingError(f"timm:{name}: timm has no such weights", hint=f"tags: {', '.join(tags) or 'none'}")
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg is not None
    channels = _channels(config, int(cfg.input_size[0]))
    args = {**config.backbone_options, **({"img_size": config.size_px} if sized else {})}
    stride = config.backbone_options.get("output_stride")
    backbone = build(  # first: settings that cannot be built are told as such, and nothing is fetched for them
        architecture,
        in_chans=channels,
        output_stride=stride,
        model_args={key: value for key, value in args.items() if key != "output_stride"},
        size_px=config.size_px if sized else None,
    )
    states = [_pretrained(name, channels, args, seed) for seed in (0, 1)]
    drawn = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    if drawn:  # timm fills up what weights lack
        raise CorruptError(f"timm:{name}: its weights lack {', '.join(drawn[:3])}: timm would draw them at random")
    put_tensors(backbone.model, states[0], name)
    told = f"all {len(states[0])} tensors kept"
    if channels != cfg.input_size[0]:
        told += f", {cfg.input_size[0]} channels made {channels}"
    full = f"{architecture}.{cfg.tag}" if cfg.tag else architecture
    return Found(backbone, *_colours(cfg.mean, cfg.std, channels), f"{PREFIX}{full}", told)


def _pretrained(name: str, channels: int, args: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """State of timm's model; what its weights do not give is drawn after the seed."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, pretrained=True, num_classes=0, in_chans=channels, **args)
        except RuntimeError as error:  # torch's word for tensors of other names or shapes
            told = " ".join(str(error).split())[:240]
            raise ConfigError(f"timm:{name}: its weights do not fit {json.dumps(args)}: {told}") from None
        except Exception as error:  # of urllib, requests, httpx, huggingface_hub, by what is installed
            told = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise InputMissingError(
                f"timm:{name}: its weights are not here and cannot be fetched: {type(error).__name__}: {told[:160]}",
                hint="fetch them where there is a network (timm's save_for_hf writes a folder) and give the folder",
            ) from None
    return dict(model.state_dict())


def _channels(config: FinetuneConfig, given: int) -> int:
    channels = given if config.channels == "auto" else config.channels
    if channels not in (1, 3) or (channels != given and (given, channels) != (3, 1)):
        asked = "auto" if config.channels == "auto" else str(config.channels)
        raise ConfigError(
            f"channels: {asked}, the weights are for {given}",
            hint="images have 1 or 3; weights for 3 can be made weights for 1",
        )
    return channels


def _converted(state: dict[str, Tensor], convs: tuple[str, ...], channels: int, folder: Path) -> dict[str, Tensor]:
    """First convolutions for another number of channels, as timm converts them: grey weighs as the sum of three."""
    from timm.models import adapt_input_conv

    names = [f"{conv}.weight" for conv in convs]
    if not names or not all(name in state for name in names):
        raise CorruptError(f"{folder}: {CONFIG} does not say which tensor takes the channels (first_conv)")
    return {name: adapt_input_conv(channels, state[name]) for name in names}


def _colours(mean: Any, std: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As given; for one channel from three their averages."""
    found = [tuple(float(value) for value in values) for values in (mean, std)]
    if len(found[0]) != channels:
        found = [(sum(values) / len(values),) * channels for values in found]
    return found[0], found[1]


def _listed(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
