"""A model folder: what timm reads as it is, classes included, or with a head of ours an encoder and that head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared.artifact import write_atomic
from shared.backbones import CONFIG, WEIGHTS, Backbone, build, put_tensors
from shared.errors import CorruptError, MwmError
from stage3_finetune.heads import Headed


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input: squashed to a square, then normalised.

    Attributes:
        size_px: Side of the square.
        channels: 1 or 3.
        mean: Subtracted from each channel of an image in [0, 1].
        std: Then divided by.
    """

    size_px: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def export_model(
    model: nn.Module,
    folder: Path,
    *,
    backbone: Backbone,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads: weights, classes, input.

    A `Headed` model is none of timm's: its architecture is named so that timm refuses it instead of filling it up with
    random weights.

    Args:
        model: A timm model with its classifier, or `Headed`.
        folder: Created if absent.
        backbone: The encoder in it.
        classes: Names in the order of the outputs; timm hands them on as ``label_names``.
        preprocessing: Stored in timm's terms.
        about: What timm does not ask for: the task, its head.
    """
    headed = isinstance(model, Headed)
    timm_model: Any = model.encoder if headed else model
    config = describe(backbone, preprocessing)
    if headed:
        config["architecture"] = f"mwm-{(about or {})['head']}:{backbone.name}"
    config["pretrained_cfg"] |= {
        "num_classes": len(classes),
        "fixed_input_size": bool(timm_model.pretrained_cfg.get("fixed_input_size", False)),
        "crop_pct": 1.0,
        "first_conv": timm_model.pretrained_cfg.get("first_conv"),
        "classifier": timm_model.pretrained_cfg.get("classifier"),
    }
    config |= {"num_classes": len(classes), "num_features": timm_model.num_features, "label_names": list(classes)}
    write_model(model, folder, config if about is None else {**config, "mwm": dict(about)})


def describe(backbone: Backbone, preprocessing: Preprocessing) -> dict[str, Any]:
    """What a configuration says of the encoder and its input, in timm's terms; `described` reads it."""
    side, channels = preprocessing.size_px, preprocessing.channels
    return {
        "architecture": backbone.name,
        "model_args": {"in_chans": channels, **backbone.args},
        "pretrained_cfg": {
            "input_size": [channels, side, side],
            "interpolation": "bilinear",
            "crop_mode": "squash",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
        },
    }


def described(config: Mapping[str, Any]) -> tuple[Backbone, Preprocessing]:
    """The encoder, with random weights, and its input, as a configuration of `describe` or `export_model` has them.

    Raises:
        KeyError, TypeError, ValueError: It has not; see `told_as_corrupt`.
    """
    stored, args = config["pretrained_cfg"], dict(config["model_args"])
    channels, side, _ = stored["input_size"]
    preprocessing = Preprocessing(side, channels, tuple(stored["mean"]), tuple(stored["std"]))
    args.pop("in_chans")
    stride = args.pop("output_stride", None)
    return build(config["architecture"], in_chans=channels, output_stride=stride, model_args=args), preprocessing


def write_model(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    """Write a configuration and every tensor, as they are, on any device; the folder is created if absent."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_atomic(folder / WEIGHTS, save(state, metadata={"format": "pt"}))


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_model` wrote.

    Raises:
        CorruptError: A file is missing or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    with told_as_corrupt(folder):
        try:
            return json.loads((folder / CONFIG).read_bytes()), load((folder / WEIGHTS).read_bytes())
        except (OSError, RecursionError, SafetensorError) as error:
            raise CorruptError(f"{folder.name}: {type(error).__name__}: {error}") from None


def take_weights(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Put stored tensors into a model, every one of them, and set it to predict.

    Raises:
        CorruptError: A tensor is missing, unknown or of another shape.
    """
    put_tensors(model, state, folder.name)
    model.eval()


@contextmanager
def told_as_corrupt(folder: Path) -> Iterator[None]:
    """Turn what a configuration lacks, or has in another form, into the error that says so."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, MwmError):
            raise
        raise CorruptError(f"{folder.name}: {CONFIG}: {type(error).__name__}: {error}") from None
