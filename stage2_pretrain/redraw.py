"""One mask of a run, drawn again as the trainer drew it; what `inspect` shows."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from shared.errors import IncompatibleError, UsageError
from shared.rng import sample_keys
from stage2_pretrain.masking.plan import guide_of
from stage2_pretrain.masking.sampler import Drawn
from stage2_pretrain.masking.spec import MaskSpec, mask_spec_of_card
from stage2_pretrain.samples import image_sizes_px, usable_samples
from stage2_pretrain.window import draw_windows
from stage2_pretrain.witness import pack, read_witnesses

if TYPE_CHECKING:
    from shared.regions import RegionStore


@dataclass(frozen=True)
class OneMask:
    """A mask and what it was drawn from.

    Attributes:
        spec: How the run draws.
        window: Top, left, height, width; image's height and width; flip; quarter turns.
        maps: Of the whole image, 0..254.
        maps_of: Sample that they are of: the drawn one, but for a policy that takes another's.
        coverage: Mean coverage of each patch, 0..254.
        hidden: What the encoder did not see.
        drawn: With its counts by the policy's strata.
        recorded: Bits that the trainer recorded for this draw, or None where the sample is no witness.
        witnesses: How many samples are.
    """

    spec: MaskSpec
    window: Int32[np.ndarray, "8"]
    maps: UInt8[np.ndarray, "K H W"]
    maps_of: str
    coverage: UInt8[np.ndarray, "gh gw"]
    hidden: Bool[np.ndarray, "gh gw"]
    drawn: Drawn
    recorded: UInt8[np.ndarray, "bytes"] | None
    witnesses: int

    @property
    def bits(self) -> UInt8[np.ndarray, "bytes"]:
        """The mask as a witness keeps it."""
        return pack(self.hidden.reshape(1, -1))[0]

    def digest(self, sample_id: str, view: int) -> str:
        """Digest of the draw, as an epoch's sum counts it."""
        return hashlib.sha256(sample_id.encode() + b"\0" + bytes([view]) + self.bits.tobytes()).hexdigest()


def redraw_one(
    store: RegionStore, card_spec: Mapping[str, Any], folder: Path, sample_id: str, *, epoch: int, view: int
) -> OneMask:
    """Draw one mask of a run again, from the region store and the run's card; no image is opened.

    Args:
        store: The region store that the run read.
        card_spec: ``identity.spec`` of the run's card.
        folder: The run's folder, with its witness files.
        sample_id: A sample with maps.
        epoch: From 0; negative counts from the end, -1 being the last.
        view: From 0.

    Raises:
        UsageError: No such sample, epoch or view, or the sample takes no part in that epoch.
        CorruptError: The witness files are damaged.
        IncompatibleError: The card says too little, or names what this release cannot draw.
    """
    spec = mask_spec_of_card(card_spec)
    samples = usable_samples(store, card_spec.get("rows"))
    names = [sample.sample_id for sample in samples]
    if len(names) != spec.samples:
        raise IncompatibleError(f"region store: {len(names)} samples with maps, the card has {spec.samples}")
    if sample_id not in names:
        raise UsageError(f"sample {sample_id!r}: took no part in this run", hint=near(sample_id, names))
    if not -spec.epochs <= epoch < spec.epochs:
        raise UsageError(f"--epoch {epoch}: this run has epochs 0 to {spec.epochs - 1}", hint="-1 is the last one")
    if not 0 <= view < spec.views:
        last = spec.views - 1
        raise UsageError(f"--view {view}: this run has {'view 0 only' if not last else f'views 0 to {last}'}")
    epoch %= spec.epochs
    place = names.index(sample_id)
    if epoch == spec.epochs - 1 and place not in list(spec.taking_part(names))[epoch]:
        raise UsageError(f"sample {sample_id!r}: not drawn in epoch {epoch}, which the run did not finish")
    sample = samples[place]
    key = sample_keys([sample_id])
    window = draw_windows(image_sizes_px([sample]), key, seed=spec.seed, epoch=epoch, options=spec.window)
    whose = samples[spec.maps_of()[place]]
    maps = store.maps([whose.row])
    sampler = spec.sampler(store.regions)
    tensors, described = read_witnesses(folder)
    known: Sequence[str] = described["witnesses"]
    recorded = levels = None
    if sample_id in known:
        where = epoch, view, known.index(sample_id)
        recorded = tensors["bits"][where]
        levels = tensors["levels"][where][None] if "levels" in tensors else None
    if guide_of(spec.policy_at(epoch)) and levels is None:
        raise UsageError(
            f"sample {sample_id!r}: policy {spec.policy.name} follows a network, whose scores were recorded for "
            f"{len(known)} witnesses only, and it is none of them",
            hint=near(sample_id, known),
        )
    drawn = sampler.draw_covered(sampler.cover(maps, window), key, epoch, view, levels)
    return OneMask(
        spec,
        window[0],
        maps[0],
        whose.sample_id,
        drawn.coverage[0].reshape(spec.grid),
        drawn.hidden[0].reshape(spec.grid),
        drawn,
        recorded,
        len(known),
    )


def near(asked: str, names: Sequence[str]) -> str:
    """A hint that names the most similar of some ids, and how many there are.

    >>> near("slice31.png", ["slice030.png", "slice031.png"])
    "did you mean 'slice031.png'? It has 2 samples, e.g. 'slice030.png'"
    """
    close = difflib.get_close_matches(asked, names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}It has {len(names)} samples, e.g. {names[0]!r}"
