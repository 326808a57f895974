"""What an encoder or a model was made from, as far as the artifacts are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.artifact import Card, find_beside, read_card
from shared.errors import UsageError


@dataclass(frozen=True)
class Lineage:
    """Cards from pixels to weights; None where there is none, or where it is not at hand.

    Attributes:
        encoder: Of the encoder: the artifact itself, or what a model was finetuned from.
        encoder_id: Its id, known also where its card is not.
        store: Of the encoder's region store.
        store_id: Its id, known where the encoder's card is.
    """

    encoder: Card | None
    encoder_id: str | None
    store: Card | None
    store_id: str | None

    @property
    def missing(self) -> str | None:
        """What a model card cannot tell, in one line; None where it can tell all."""
        if self.encoder_id is not None and self.encoder is None:
            return f"its encoder sha256:{self.encoder_id[:16]} is not beside it"
        if self.store_id is not None and self.store is None:
            return f"its region store sha256:{self.store_id[:16]} is not beside it"
        return None


def trace(path: Path, card: Card, regions: Path | None = None) -> Lineage:
    """Follow the inputs of an encoder or a model among the artifacts beside it.

    Args:
        path: The artifact.
        card: Its card.
        regions: The region store, where it is not beside the encoder.

    Raises:
        UsageError: ``regions`` is another store than the encoder was made from.
        InputMissingError, IncompatibleError, LockedError, CorruptError: As `shared.artifact.read_card`.
    """
    encoder, encoder_id, home = card, card.artifact_id, path
    if card.identity.kind == "model":
        found = _input(card, "encoder")
        beside = find_beside(path, found) if found is not None else None
        if found is None or beside is None:
            return Lineage(None, found, None, None)
        encoder, encoder_id, home = read_card(beside, "encoder"), found, beside
    store_id = _input(encoder, "region-store")
    place = regions if regions is not None else find_beside(home, store_id) if store_id is not None else None
    store = None if place is None else read_card(place, "region-store")
    if store is not None and store.artifact_id != store_id:
        raise UsageError(
            f"--regions {regions}: sha256:{store.artifact_id[:16]}, the encoder was made from {str(store_id)[:16]}"
        )
    return Lineage(encoder, encoder_id, store, store_id)


def _input(card: Card, kind: str) -> str | None:
    return next((item.artifact_id for item in card.identity.inputs if item.kind == kind), None)
