"""What training starts from: a published encoder, weights of timm's, or an architecture with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.artifact import CARD, Card, Input, file_sha256, open_artifact
from shared.backbones import CONFIG, Backbone, build, load_encoder, resize
from shared.errors import ConfigError, CorruptError
from shared.merkle import tensor_digest
from stage3_finetune.config import FinetuneConfig
from stage3_finetune.export import Preprocessing
from stage3_finetune.timm_weights import PREFIX, Found, read_folder, read_named

FROM_SCRATCH = "resnet18"
_FOLDER = "encoder"
_MEAN, _STD = 0.5, 0.25
"""Normalisation of a start from scratch; an encoder brings its own."""


@dataclass(frozen=True)
class Start:
    """A backbone without a classifier, and what its input must look like.

    Attributes:
        backbone: On the CPU.
        mean: Subtracted from each channel of an image in [0, 1].
        std: Then divided by.
        inputs: The published encoder as an input of the run; else empty.
        line: One line for the log.
        weights: Of other weights than a published encoder's, where they come from and their digest; else empty.
    """

    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inputs: tuple[Input, ...]
    line: str
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """``encoder``, ``weights`` or ``scratch``."""
        return "encoder" if self.inputs else "weights" if self.weights else "scratch"

    def preprocessing(self, size_px: int) -> Preprocessing:
        """How an image becomes this model's input."""
        return Preprocessing(size_px, self.backbone.in_chans, self.mean, self.std)


def start_from(config: FinetuneConfig, encoder: str | None) -> Start:
    """Open the encoder, or build the configured architecture with weights drawn from the seed.

    Args:
        config: Its ``backbone``, ``backbone_options`` and ``channels`` must be ``auto`` (empty) or the
            encoder's. Position embeddings are interpolated to its ``size_px``.
        encoder: ``PATH[@sha256:...]`` of a published encoder, a folder that timm reads (``config.json`` and
            ``model.safetensors``), ``timm:NAME[.TAG]``, or None.

    Raises:
        ConfigError: The settings name another architecture than the encoder's; ``freeze`` from scratch.
        InputMissingError, IncompatibleError, LockedError: As `shared.artifact.open_artifact`.
        CorruptError: A file of the encoder is not what was published.
    """
    if encoder is None:
        return _random(config)
    if encoder.startswith(PREFIX):
        return _timm(config, read_named(encoder.removeprefix(PREFIX), config))
    if (Path(encoder) / CONFIG).is_file() and not (Path(encoder) / CARD).exists():
        return _timm(config, read_folder(Path(encoder), config))
    folder, card = open_artifact(encoder, "encoder")
    _check_files(folder, card)
    backbone = load_encoder(folder / _FOLDER)
    weights = {name: value.numpy() for name, value in backbone.model.state_dict().items()}
    if tensor_digest(weights) != card.identity.outputs["weights"]:
        raise CorruptError(f"{folder}: other weights than the artifact's id", hint="restore it from a copy")
    stored = json.loads((folder / _FOLDER / CONFIG).read_bytes())["pretrained_cfg"]
    trained_px = backbone.model_args.get("img_size", config.size_px)
    backbone = resize(backbone, config.size_px)
    resized = f"{trained_px} px made {config.size_px} px, " if trained_px != config.size_px else ""
    start = Start(
        backbone,
        tuple(stored["mean"]),
        tuple(stored["std"]),
        (Input(role="encoder", kind="encoder", artifact_id=card.artifact_id),),
        f"encoder {card.artifact_id[:16]}: {backbone.name}, all {len(weights)} tensors kept, "
        f"{resized}a new classifier on top",
    )
    known = {key: value for key, value in backbone.args.items() if key != "img_size" or key in config.backbone_options}
    asked: dict[str, tuple[Any, Any]] = {
        "backbone": (config.backbone, backbone.name),
        "backbone_options": (config.backbone_options or "auto", known),
        "channels": (config.channels, backbone.in_chans),
    }
    wrong = [f"{key}: {ask}, the encoder's is {has}" for key, (ask, has) in asked.items() if ask not in ("auto", has)]
    if wrong:
        raise ConfigError("; ".join(wrong), hint="leave them at 'auto': the encoder says what it is")
    return start


def _timm(config: FinetuneConfig, found: Found) -> Start:
    if config.backbone not in ("auto", found.backbone.name):
        raise ConfigError(
            f"backbone: {config.backbone}, the weights are of {found.backbone.name}",
            hint="leave it at 'auto': the weights say what they are",
        )
    weights = tensor_digest({name: value.numpy() for name, value in found.backbone.model.state_dict().items()})
    backbone = resize(found.backbone, config.size_px)
    return Start(
        backbone,
        found.mean,
        found.std,
        (),
        f"weights {weights[:16]} of {found.source}: {found.told}, a new head on top",
        {"source": found.source, "architecture": backbone.name, "sha256": weights},
    )


def _random(config: FinetuneConfig) -> Start:
    if config.freeze:
        raise ConfigError(
            "freeze (as in every probe, knn too): a frozen encoder with random weights learns nothing",
            hint="give --encoder",
        )
    name = FROM_SCRATCH if config.backbone == "auto" else config.backbone
    channels = 1 if config.channels == "auto" else config.channels
    args = dict(config.backbone_options)
    backbone = build(
        name,
        in_chans=channels,
        output_stride=args.pop("output_stride", None),
        model_args=args,
        size_px=config.size_px,
        seed=config.seed,
    )
    return Start(backbone, (_MEAN,) * channels, (_STD,) * channels, (), f"from scratch: {name}, seed {config.seed}")


def _check_files(folder: Path, card: Card) -> None:
    listed = {name: sha for name, sha in card.provenance.files.items() if name.startswith(f"{_FOLDER}/")}
    for name, sha in listed.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != sha:
            raise CorruptError(f"{folder}: {name} is not what was published", hint="restore it from a copy")
