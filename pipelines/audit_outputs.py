"""What an artifact's id covers, computed again: a file may be forged together with its digest on the card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from shared.artifact import CARD, Card, Finding, file_sha256, read_card, verify
from shared.corpus import SAMPLES
from shared.errors import CorruptError, IncompatibleError

_LISTED = ("sample_id", "source_sha256", "group")
"""What a row of a region store and a row of its corpus must have in common."""
_SHOWN = 5


def compare_outputs(folder: Path, card: Card) -> list[Finding]:
    """Differences between what an artifact holds and what its card says it holds; call it on files that are whole."""
    try:
        return list(_differing_outputs(folder, card))
    except (CorruptError, IncompatibleError) as error:
        return [Finding(CARD, f"its outputs cannot be computed again: {error.message}")]
    except KeyError as error:
        return [Finding(CARD, f"its outputs are not those of this kind: {error.args[0]} is not there")]


def _differing_outputs(folder: Path, card: Card) -> Iterator[Finding]:
    kind, outputs = card.identity.kind, card.identity.outputs
    if kind == "corpus" and file_sha256(_present(folder, SAMPLES)) != outputs["samples_sha256"]:
        yield Finding(SAMPLES, "other samples than the artifact's id")
    if kind in ("region-store", "head"):
        named = {item.artifact_id for item in card.identity.inputs if item.kind == "corpus"}
        beside = folder / "corpus"
        if named and (beside / CARD).is_file():
            listed = read_card(beside, "corpus")
            if listed.artifact_id not in named:
                yield Finding(f"corpus/{CARD}", "another corpus than the one this store was made from")
            elif kind == "region-store" and not verify(beside, listed):  # else its own row says what is wrong
                yield from _rows_that_differ(_present(folder, SAMPLES), beside / SAMPLES)
    if kind == "head":
        from stage1_localize.grounders.lite_card import head_faults

        yield from head_faults(folder, outputs)
    if kind not in ("encoder", "model"):
        return
    weights = f"{kind}/model.safetensors"
    if _tensors_sha256(_present(folder, weights)) != outputs["weights"]:
        yield Finding(weights, "other weights than the artifact's id")
    if kind == "encoder":
        from shared.merkle import tensor_digest
        from stage2_pretrain.witness import FILE, NAMES, read_witnesses

        if tensor_digest(read_witnesses(folder)[0]) != outputs["witnesses"]:
            yield Finding(FILE, "other witnesses than the artifact's id")
        if file_sha256(folder / NAMES) != outputs["witness_names"]:
            yield Finding(NAMES, "other names of witnesses than the artifact's id")
    else:
        from stage3_finetune.rescore import prediction_faults

        for name, problem in prediction_faults(folder, card):
            yield Finding(name, problem)


def _tensors_sha256(path: Path) -> str:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from shared.merkle import tensor_digest

    try:
        return tensor_digest(load_file(path))
    except (SafetensorError, ValueError, TypeError) as error:
        raise CorruptError(f"{path.name}: no tensors: {type(error).__name__}") from None


def _present(folder: Path, name: str) -> Path:
    """A file that this kind of artifact must have, whatever its card lists."""
    if not (folder / name).is_file():
        raise CorruptError(f"{name}: missing")
    return folder / name


def _rows_that_differ(rows: Path, listed: Path) -> Iterator[Finding]:
    """Rows of a region store, line by line against the images that it says it was made from; the first few."""
    found = 0
    with rows.open("rb") as ours, listed.open("rb") as theirs:
        for number, (line, wanted) in enumerate(zip_longest(ours, theirs)):
            if line is None or wanted is None:
                yield Finding(SAMPLES, f"row {number}: {'missing; it is' if line is None else 'not'} in its corpus")
                return
            try:
                row, source = json.loads(line), json.loads(wanted)
                differing = [name for name in _LISTED if row[name] != source[name]]
            except (ValueError, KeyError, TypeError, RecursionError):
                yield Finding(SAMPLES, f"row {number}: cannot be compared with its corpus")
                return
            for name in differing:
                found += 1
                if found > _SHOWN:
                    return
                yield Finding(SAMPLES, f"row {number} ({source['sample_id']}): its {name} is not that of its corpus")
