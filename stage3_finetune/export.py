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
from shared.backbones import CONFIG, WEIGHTS, put_tensors
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
    architecture: str,
    model_args: Mapping[str, Any],
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
        architecture: timm's name.
        model_args: Arguments of ``timm.create_model`` beside the number of classes and channels.
        classes: Names in the order of the outputs; timm hands them on as ``label_names``.
        preprocessing: Stored in timm's terms.
        about: What timm does not ask for: the task, its head.
    """
    headed = isinstance(model, Headed)
    timm_model: Any = model.encoder if headed else model
    side = preprocessing.size_px
    config = {
        "architecture": f"mwm-{(about or {})['head']}:{architecture}" if headed else architecture,
        "num_classes": len(classes),
        "num_features": timm_model.num_features,
        "label_names": list(classes),
        "model_args": {"in_chans": preprocessing.channels, **model_args},
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": [preprocessing.channels, side, side],
            "fixed_input_size": bool(timm_model.pretrained_cfg.get("fixed_input_size", False)),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "first_conv": timm_model.pretrained_cfg.get("first_conv"),
            "classifier": timm_model.pretrained_cfg.get("classifier"),
        },
        **({} if about is None else {"mwm": dict(about)}),
    }
    write_model(model, folder, config)


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
