"""What a head of `lite` knows: its card and weights, packaged or as an artifact that `mwm fit-grounder` made."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from pydantic import Field, ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from shared.artifact import Finding, Input, file_sha256, open_artifact, write_atomic
from shared.config import Strict, digest
from shared.errors import CorruptError, IncompatibleError, UsageError
from shared.merkle import tensor_digest
from stage1_localize.grounders.lite_head import LiteHead

WEIGHTS = "head/lite.safetensors"
RULES = "head/lite.json"
FOLDS = "head/folds"
HELD_OUT = f"{FOLDS}/held_out.json"
KIND = "head"


class Concept(Strict):
    """How one concept of the vocabulary is answered; part of the weights' card."""

    wordings: tuple[str, ...] = Field(description="Strings that mean it.")
    route: str = Field(pattern="^(mask|component|centre)$", description="mask, component or centre.")
    presence_min_milli: int = Field(500, ge=0, le=1000, description="Below this presence it is not there.")
    area_min_px: int = Field(24, ge=1, description="Smaller parts are dropped, px of the 256 px padded input.")
    margin_px: int = Field(0, ge=0, description="Added to each side of a component box, px of the padded input.")
    centre_min_milli: int = Field(300, ge=1, le=999, description="Peaks below this are dropped; it maps to score .5.")


class Card(Strict):
    """The weights' card: what they know, how it is answered, and what they were fitted on."""

    name: str
    weights_sha256: str
    not_for_diagnosis: str
    concepts: dict[str, Concept]
    foreign: tuple[str, ...] = Field(description="Strings known to mean something else.")
    data: dict[str, str] = Field(description="Training source -> what it is and its terms.")
    fit: dict[str, Any] = Field(description="Settings, seed and software.")
    scores: dict[str, Any] = Field(description="On held-out parts, with 95 % intervals.")

    @property
    def rules_sha256(self) -> str:
        """Digest of words, routes and thresholds: with the weights, all that decides an answer."""
        rules = json.dumps(self.model_dump(mode="json", include={"concepts", "foreign"}), sort_keys=True)
        return hashlib.sha256(rules.encode()).hexdigest()


@dataclass(frozen=True)
class Head:
    """A card and its network, and the artifact that they came in (None: packaged)."""

    card: Card
    network: LiteHead
    origin: Input | None = None


@cache
def load_packaged() -> Head:
    """The shipped card and head.

    Raises:
        CorruptError: The weights are not those of the card.
    """
    folder = importlib.resources.files("stage1_localize").joinpath("weights")
    card = Card.model_validate_json(folder.joinpath("lite.json").read_text(encoding="utf-8"))
    raw = folder.joinpath("lite.safetensors").read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != card.weights_sha256:
        raise CorruptError(
            f"weights lite.safetensors: sha256 {found[:12]}, the card says {card.weights_sha256[:12]}",
            hint="reinstall mask-what-matters",
        )
    return Head(card, build_head(load_safetensors(raw)))


def open_head(reference: str) -> Head:
    """Open a published head, given as ``PATH[@sha256:...]``; nothing of it is used before its digests fit.

    Raises:
        CorruptError: Weights or rules are not what was published.
        IncompatibleError: Unpublished, another kind or version, or not the pinned digest.
        InputMissingError, LockedError: As `shared.artifact.open_artifact`.
    """
    folder, card = open_artifact(reference, KIND)
    for name in (WEIGHTS, RULES):
        if not (folder / name).is_file() or file_sha256(folder / name) != card.provenance.files.get(name):
            raise CorruptError(f"{folder / name}: not what was published", hint="restore the artifact from a copy")
    for fault in head_faults(folder, card.identity.outputs):
        raise CorruptError(f"{folder / fault.file}: {fault.problem}", hint="restore the artifact from a copy")
    rules, state = _read(folder)
    return Head(rules, build_head(state), Input(role="head", kind=KIND, artifact_id=card.artifact_id))


def write_head(folder: Path, card: Card, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write weights and rules below an artifact's folder.

    Args:
        folder: Of the artifact.
        card: Its ``weights_sha256`` is filled in.
        state: Of a `LiteHead`.

    Returns:
        What the artifact's outputs say of them.
    """
    (folder / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    raw = save_safetensors({name: tensor.contiguous() for name, tensor in state.items()})
    card = card.model_copy(update={"weights_sha256": hashlib.sha256(raw).hexdigest()})
    write_atomic(folder / WEIGHTS, raw)
    write_atomic(folder / RULES, (card.model_dump_json(indent=1) + "\n").encode())
    return {"weights": _digest(state), "rules": card.rules_sha256}


@dataclass(frozen=True)
class Folds:
    """The heads of a cross-validation.

    Attributes:
        whole: The head that learnt from every image.
        heads: Fold -> the head that learnt from none of its groups.
        held_out: Sample id -> the fold that it was held out in, and the digest of its pixels.
        digest: Of all that decides an answer.
    """

    whole: Head
    heads: Mapping[int, Head]
    held_out: Mapping[str, tuple[int, str]]
    digest: str

    def head_of(self, sample_id: str, image: Float32[np.ndarray, "C H W"]) -> Head:
        """The head that never saw an image's group.

        Raises:
            UsageError: An image that the heads were not fitted on, or other pixels under its id.
        """
        fold, pixels = self.held_out.get(sample_id, (None, ""))
        if fold is None or pixels != pixels_sha256(image):
            raise UsageError(
                f"grounder 'lite', cross_fitted: {sample_id} is no image that the head was fitted on"
                + ("" if fold is None else ", but another one of that name"),
                hint="give the images of the head's own labels, or leave cross_fitted out for images that it never saw",
            )
        return self.heads[fold]


def pixels_sha256(image: Float32[np.ndarray, "C H W"]) -> str:
    """Digest of an image as it was decoded."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def write_folds(
    folder: Path, heads: Mapping[int, tuple[Card, Mapping[str, Tensor]]], held_out: Mapping[str, tuple[int, str]]
) -> dict[str, Any]:
    """Write the heads of a cross-validation beside the head that learnt from every image.

    Args:
        folder: Of the artifact.
        heads: Fold -> rules and weights.
        held_out: As in `Folds`.

    Returns:
        What the artifact's outputs say of them.
    """
    written = {str(fold): write_head(folder / FOLDS / str(fold), *heads[fold]) for fold in sorted(heads)}
    write_atomic(folder / HELD_OUT, (json.dumps(dict(sorted(held_out.items())), indent=1) + "\n").encode())
    return {"folds": {"heads": written, "held_out": file_sha256(folder / HELD_OUT)}}


def open_folds(reference: str) -> Folds:
    """The heads of folds of an artifact that `open_head` takes.

    Raises:
        IncompatibleError: The artifact holds none.
        CorruptError, InputMissingError, LockedError: As `open_head`.
    """
    whole = open_head(reference)  # its digests cover the folds
    folder, card = open_artifact(reference, KIND)
    told = card.identity.outputs.get("folds")
    if not told:
        raise IncompatibleError(
            f"{folder}: this head keeps no heads of folds",
            hint="heads of mwm fit-grounder do: fit it into a new folder",
        )
    heads = {}
    for fold in told["heads"]:
        rules, state = _read(folder / FOLDS / fold)
        heads[int(fold)] = Head(rules, build_head(state), whole.origin)
    return Folds(whole, heads, _read_held_out(folder), digest(told))


def head_faults(folder: Path, outputs: Mapping[str, Any]) -> Iterator[Finding]:
    """What the id covers, computed again: a file may be forged together with its digest on the card."""
    if "folds" in outputs:
        yield from _fold_faults(folder, outputs["folds"])
    try:
        card, state = _read(folder)
    except (OSError, ValueError, ValidationError) as error:
        yield Finding(WEIGHTS, f"cannot be read: {type(error).__name__}")
        return
    if _digest(state) != outputs.get("weights") or file_sha256(folder / WEIGHTS) != card.weights_sha256:
        yield Finding(WEIGHTS, "other weights than the artifact's id")
    if card.rules_sha256 != outputs.get("rules"):
        yield Finding(RULES, "other words, routes or thresholds than the artifact's id")


def build_head(state: Mapping[str, Tensor]) -> LiteHead:
    """A head in evaluation mode with these weights."""
    head = LiteHead()
    head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return head.eval().requires_grad_(False)


def _fold_faults(folder: Path, told: Any) -> Iterator[Finding]:
    try:
        heads: dict[str, Any] = dict(told["heads"])
        folds = {str(fold) for fold, _ in _read_held_out(folder).values()}
        same = file_sha256(folder / HELD_OUT) == told["held_out"]
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        yield Finding(HELD_OUT, f"cannot be read: {type(error).__name__}")
        return
    if not same or folds != set(heads):
        yield Finding(HELD_OUT, "other folds than the artifact's id")
        return
    for fold, own in heads.items():
        place = f"{FOLDS}/{fold}"
        found = head_faults(folder / place, own if isinstance(own, Mapping) else {})
        yield from (Finding(f"{place}/{fault.file}", fault.problem) for fault in found)


def _read_held_out(folder: Path) -> dict[str, tuple[int, str]]:
    told = json.loads((folder / HELD_OUT).read_bytes())
    return {name: (int(fold), pixels) for name, (fold, pixels) in told.items()}


def _read(folder: Path) -> tuple[Card, dict[str, Tensor]]:
    from safetensors import SafetensorError

    card = Card.model_validate_json((folder / RULES).read_text(encoding="utf-8"))
    try:
        return card, load_safetensors((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def _digest(state: Mapping[str, Tensor]) -> str:
    return tensor_digest({name: tensor.detach().cpu().numpy() for name, tensor in state.items()})
