"""Encoders by name, on timm: build, list their scales, export so that timm itself loads them back.

An architecture with weights for each position (a ViT) is built for one size of image, ``img_size`` among its arguments;
a fully convolutional one takes any.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from shared.artifact import write_atomic
from shared.errors import ConfigError, CorruptError, InputMissingError
from shared.rng import seed_key

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FINEST = 4
"""Scales finer than this are stems: half-made features that no published method reads."""


@dataclass
class Backbone:
    """A timm model without its classifier, and what is needed to build it again.

    Attributes:
        model: Plain timm module; its state dict is timm's own.
        name: timm's name of the architecture.
        in_chans: Channels of the input.
        output_stride: Pixels per position of the deepest feature, or None for the architecture's own.
        model_args: Further arguments of ``timm.create_model``, JSON.
        reductions: Pixels per position of each distinct scale from 4 up, ascending.
        channels: Channels of the last feature at each of these scales.
        indices: timm's index of these features.
    """

    model: nn.Module
    name: str
    in_chans: int
    output_stride: int | None
    model_args: dict[str, Any]
    reductions: tuple[int, ...]
    channels: tuple[int, ...]
    indices: tuple[int, ...] = field(repr=False)

    @property
    def stride(self) -> int:
        """Pixels per position of the deepest feature."""
        return self.reductions[-1]

    @property
    def args(self) -> dict[str, Any]:
        """Arguments of ``timm.create_model`` beside channels and classes."""
        return {**({} if self.output_stride is None else {"output_stride": self.output_stride}), **self.model_args}

    def grid(self, size_px: int) -> tuple[int, int]:
        """Positions of the deepest feature of an image, rows and columns.

        Raises:
            ConfigError: The stride does not divide the size.
        """
        if size_px % self.stride:
            raise ConfigError(f"size_px: {size_px} is no multiple of the encoder's stride {self.stride}")
        return size_px // self.stride, size_px // self.stride

    def features(self, image: Tensor) -> list[Tensor]:
        """The last feature map of every distinct scale, finest first.

        Args:
            image: [B, C, S, S], S a multiple of `stride`.

        Returns:
            One [B, channels[i], S / reductions[i], S / reductions[i]] a scale.
        """
        forward: Any = self.model.forward_intermediates
        return list(forward(image, indices=list(self.indices), intermediates_only=True))


def build(
    name: str,
    *,
    in_chans: int,
    output_stride: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    size_px: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Build an encoder with random weights that are a function of its arguments and the seed alone.

    Args:
        name: A name that ``timm.create_model`` knows, without a pretrained tag.
        in_chans: Input channels, 1 or more.
        output_stride: 8, 16 or 32 for architectures that can dilate, or None.
        model_args: Further JSON arguments of ``timm.create_model``.
        size_px: Side of the images, for an architecture that is built for one size; None: as ``model_args`` or timm
            have it.
        seed: Seed of the initial weights; torch's global generator is left as it was.

    Raises:
        ConfigError: Unknown name, or arguments or a size that the architecture does not take.
    """
    import timm

    sized = has_size(name)
    args = dict(model_args or {})
    if sized and size_px is not None and args.setdefault("img_size", size_px) != size_px:
        raise ConfigError(
            f"backbone_options.img_size: {args['img_size']}, but size_px is {size_px}",
            hint="leave img_size out: it is size_px",
        )
    extra: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_key("backbone", seed))
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **extra, **args)
        except (TypeError, AssertionError, NotImplementedError, RuntimeError) as error:
            shown = json.dumps({**extra, **args})
            hint = "a ViT takes patch_size instead" if sized and "output_stride" in str(error) else None
            raise ConfigError(f"backbone '{name}' cannot be built with {shown}: {error}", hint=hint) from None
    reductions, channels, indices = _scales(name, model)
    built = Backbone(model, name, in_chans, output_stride, args, reductions, channels, indices)
    if sized and size_px is not None:
        built.grid(size_px)  # timm cuts off what is left over
    return built


def has_size(name: str) -> bool:
    """Whether an architecture is built for one size of image.

    Raises:
        ConfigError: Unknown name.
    """
    import timm

    if name not in timm.list_models():
        near = _near(name, timm.list_models())
        raise ConfigError(f"unknown backbone '{name}'", hint=f"Did you mean {near}?" if near else None)
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.fixed_input_size:
        return False
    kind = get_type_hints(timm.model_entrypoint(name)).get("return")
    return kind is not None and "img_size" in inspect.signature(kind).parameters


def resolve_options(name: str, options: Mapping[str, Any] | str) -> dict[str, Any]:
    """Arguments of an architecture for pretraining, ``auto`` replaced: a convolutional one then has patches of 16 px.

    Raises:
        ConfigError: Unknown name.
    """
    if not isinstance(options, str):
        return dict(options)
    return {} if has_size(name) else {"output_stride": 16}


def resize(backbone: Backbone, size_px: int) -> Backbone:
    """The same encoder for images of another size; position embeddings are interpolated by timm.

    Raises:
        ConfigError: The stride does not divide the size, or the architecture can't be resized.
    """
    if backbone.model_args.get("img_size", size_px) == size_px:
        return backbone
    backbone.grid(size_px)
    model: Any = backbone.model
    try:
        model.set_input_size((size_px, size_px))
    except (AttributeError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"size_px: {size_px}, but {backbone.name} is built for {backbone.model_args['img_size']} px: {error}"
        ) from None
    return replace(backbone, model_args={**backbone.model_args, "img_size": size_px})


def export_encoder(
    backbone: Backbone, folder: Path, *, size_px: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Write a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads as it is.

    Args:
        backbone: What to write; values are stored as they are, on any device.
        folder: Created if absent.
        size_px: Side of the images it was trained on.
        mean: Subtracted from each channel of an image in [0, 1].
        std: Then divided by.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    model: Any = backbone.model
    cfg = dict(model.pretrained_cfg)
    config = {
        "architecture": backbone.name,
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": {"in_chans": backbone.in_chans, **backbone.args},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [backbone.in_chans, size_px, size_px],
            "pool_size": [size_px // backbone.stride] * 2,
            "fixed_input_size": bool(cfg.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(mean),
            "std": list(std),
            "first_conv": cfg.get("first_conv"),
            "classifier": cfg.get("classifier"),
        },
    }
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_atomic(folder / WEIGHTS, save(state, metadata={"format": "pt"}))


def load_encoder(folder: Path) -> Backbone:
    """Read what `export_encoder` wrote, every tensor or an error.

    Raises:
        InputMissingError: No such folder.
        CorruptError: A file is missing or unreadable, or a tensor is missing, unknown or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not folder.is_dir():
        raise InputMissingError(f"{folder}: no such encoder folder")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        args = dict(config["model_args"])
        name, in_chans, stride = config["architecture"], args.pop("in_chans"), args.pop("output_stride", None)
        state = load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CorruptError(f"{folder.name}: not an encoder: {type(error).__name__}: {error}") from None
    backbone = build(name, in_chans=in_chans, output_stride=stride, model_args=args)
    put_tensors(backbone.model, state, folder.name)
    return backbone


def put_tensors(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put stored tensors into a model, every one of them.

    Args:
        model: Built as the stored one was.
        state: By the names of its state dict.
        source: Where they come from, for messages.

    Raises:
        CorruptError: A tensor is missing, unknown or of another shape.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise CorruptError(
                f"{source}: tensor {key}: shape {found.get(key, 'absent')}, expected {expected.get(key, 'absent')}"
            )
    model.load_state_dict(state)


def _scales(name: str, model: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if not hasattr(model, "feature_info") or not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"backbone '{name}' tells no feature maps", hint="name a timm architecture with feature_info")
    last: dict[int, tuple[int, int]] = {}
    for index, info in enumerate(model.feature_info):
        if info["reduction"] >= _FINEST:
            last[int(info["reduction"])] = (int(info["num_chs"]), index)
    reductions = tuple(sorted(last))
    return reductions, tuple(last[r][0] for r in reductions), tuple(last[r][1] for r in reductions)


def _near(name: str, known: Sequence[str]) -> str:
    import difflib

    return ", ".join(difflib.get_close_matches(name, known, n=3))
