"""What can be exported: a published encoder or model, checked, loaded, and asked for its outputs on a seeded batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.exporters import STORE_EXPORTERS
from shared.artifact import Card, open_artifact, read_card, verify
from shared.backbones import CONFIG, WEIGHTS
from shared.errors import CorruptError, IncompatibleError, UsageError
from shared.merkle import tensor_digest
from shared.rng import seed_key

KINDS = ("encoder", "model")
"""Kinds of artifact that hold weights for others; each keeps them in a folder of its own name."""

BATCH = 3
"""Images of the batch that an export is compared on."""

_RESTORE = "restore the artifact from a copy"
_CLASSIFY = "classify"


@dataclass(frozen=True)
class Difference:
    """How far one output of an export is from the original's.

    Attributes:
        output: Its name.
        largest: Largest absolute difference over the seeded batch; NaN where one side is not finite.
        scale: Largest absolute value of the original's.
        allowed: Largest difference that is accepted; 0: to the bit.
    """

    output: str
    largest: float
    scale: float
    allowed: float

    @property
    def accepted(self) -> bool:
        """Whether the export may be published."""
        return self.largest <= self.allowed

    def __str__(self) -> str:
        told = "to the bit" if self.largest == 0 else f"within {self.largest:.1e} of values up to {self.scale:.3g}"
        return f"{self.output} {told}"


@dataclass(frozen=True)
class Exportable:
    """A model as published.

    Attributes:
        path: The artifact.
        card: Its card.
        model: Plain timm module in evaluation, on the CPU, float32.
        config: ``config.json`` as timm reads it.
    """

    path: Path
    card: Card
    model: nn.Module
    config: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the outputs; empty for an encoder."""
        return tuple(self.config.get("label_names") or ())

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the images."""
        channels, rows, columns = self.config["pretrained_cfg"]["input_size"]
        return int(channels), int(rows), int(columns)

    def per_channel(self, name: str) -> Tensor:
        """``mean`` or ``std`` of pixels in [0, 1], float32 [C, 1, 1]."""
        return torch.tensor(self.config["pretrained_cfg"][name], dtype=torch.float32)[:, None, None]

    def normalise(self, pixels: Float[Tensor, "B C S S"]) -> Float[Tensor, "B C S S"]:
        """Pixels in [0, 1] as the model takes them."""
        return (pixels - self.per_channel("mean")) / self.per_channel("std")

    def pixels(self, count: int = BATCH) -> Float[Tensor, "B C S S"]:
        """The seeded batch, in steps of 1/255 as 8 bit images give them."""
        generator = torch.Generator().manual_seed(seed_key("export", 0) % 2**63)
        return torch.randint(0, 256, (BATCH, *self.input_size), generator=generator)[:count] / 255

    def outputs(self, model: Any) -> dict[str, Tensor]:
        """What a timm model gives on the seeded batch: its last features, and the embedding or the logits."""
        with torch.inference_mode():
            image = self.normalise(self.pixels())
            return {
                "features": model.forward_features(image),
                "logits" if self.classes else "embedding": model(image),
            }


def open_exportable(reference: str) -> Exportable:
    """Open, check and load ``PATH[@sha256:...]``: every tensor, or an error.

    Raises:
        IncompatibleError: Neither an encoder nor a model, unpublished, or not the pinned one.
        UsageError: A model of a task whose outputs are not classes.
        InputMissingError, LockedError: As `shared.artifact.open_artifact`.
        CorruptError: A file or a tensor is not what was published.
    """
    path = Path(reference.partition("@sha256:")[0])
    kind = read_card(path).identity.kind
    if kind not in KINDS:
        raise IncompatibleError(
            f"{path}: found kind '{kind}', expected kind '{KINDS[0]}' or '{KINDS[1]}'",
            hint=f"for a region store: --to {', '.join(STORE_EXPORTERS)}"
            if kind == "region-store"
            else "'mwm pretrain' makes an encoder, 'mwm finetune' a model",
        )
    path, card = open_artifact(reference, kind)
    if kind == "model" and (task := card.identity.spec["config"]["task"]) != _CLASSIFY:
        raise UsageError(f"{path}: a model for task '{task}'; those for '{_CLASSIFY}' can be exported")
    if kind == "model" and (head := card.identity.spec["config"]["options"].get("head", "linear")) != "linear":
        raise UsageError(
            f"{path}: a model with the head '{head}'; those with 'linear' can be exported",
            hint="stage3_finetune.tasks.classify.Classify.restore reads its folder 'model'",
        )
    if kind == "model" and card.identity.spec["config"]["options"].get("multi_label") is True:
        raise UsageError(
            f"{path}: a model of several classes an image; those of one class can be exported",
            hint="timm, ONNX and Hugging Face readers would take its logits for those of one class",
        )
    for finding in verify(path, card):
        if finding.file.startswith(f"{kind}/"):
            raise CorruptError(f"{path}: {finding.file}: {finding.problem}", hint=_RESTORE)
    config, state = _read(path / kind)
    if tensor_digest({name: value.numpy() for name, value in state.items()}) != card.identity.outputs["weights"]:
        raise CorruptError(f"{path}: other weights than the artifact's id", hint=_RESTORE)
    return Exportable(path, card, _build(path, config, state), config)


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, relative: float = 0.0) -> list[Difference]:
    """Differences of outputs by name.

    Args:
        expected: Of the original.
        found: Of the export: the same names and shapes.
        relative: Largest difference allowed, in units of the largest absolute value expected.

    Raises:
        KeyError: An output is missing.
    """
    found_all = []
    for name, value in expected.items():
        scale = float(value.abs().max())
        same_shape = found[name].shape == value.shape
        largest = float((found[name].detach() - value).abs().max()) if same_shape else float("inf")
        found_all.append(Difference(name, largest, scale, relative * scale))
    return found_all


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return json.loads((folder / CONFIG).read_bytes()), load((folder / WEIGHTS).read_bytes())
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CorruptError(f"{folder}: {type(error).__name__}: {error}", hint=_RESTORE) from None


def _build(path: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """With timm's constructor alone, not by the way that an export is loaded back."""
    import timm

    try:
        model = timm.create_model(
            config["architecture"], pretrained=False, num_classes=config["num_classes"], **config["model_args"]
        )
        model.load_state_dict(state)
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        told = str(error).splitlines()[-1].strip()
        raise IncompatibleError(f"{path}: this timm ({timm.__version__}) cannot build it: {told}") from None
    return model.eval()
