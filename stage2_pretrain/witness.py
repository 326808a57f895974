"""Witnesses: what the encoder was really shown, recorded while training, drawn again by an audit.

The bits of a draw are the hidden patches, row by row of the grid, eight to a byte, the first in bit 0, the last
byte filled with zeros. A draw's digest is sha256 over the sample id in UTF-8, a zero byte, the view as one byte and
the bits. For each epoch the first 8 bytes of all its draws' digests, little-endian, are summed modulo 2^64; of up
to 256 samples, those with the smallest words of purpose "witness", the bits themselves are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rfc8785
from jaxtyping import Bool, UInt8

from shared.artifact import write_atomic
from shared.errors import CorruptError, IncompatibleError, MwmError
from shared.merkle import tensor_digest
from shared.rng import draw_u32, sample_keys, seed_key
from stage2_pretrain.masking.plan import guide_of
from stage2_pretrain.masking.sampler import MaskSampler
from stage2_pretrain.masking.spec import MaskSpec, mask_spec_of_card
from stage2_pretrain.samples import image_sizes_px, usable_samples
from stage2_pretrain.window import draw_windows

if TYPE_CHECKING:
    from shared.regions import RegionStore

FILE = "witnesses.safetensors"
NAMES = "witnesses.json"
WITNESSES_MAX = 256
PURPOSE = "witness"
VERSION = 1
_ROWS = 256
"""Samples whose maps are held at once while drawing again."""


class WitnessRecorder:
    """Collects the bits of the witnesses and the sums of all draws.

    Args:
        sample_ids: Every sample of the run.
        patches: L, patches of a sample.
        epochs: Epochs of the run, the last perhaps unfinished.
        seed: Of the run.
        views: Draws of a sample in one epoch.
        guided: The policy follows a network: levels of the witnesses are kept too.

    Attributes:
        witnesses: Ids of the samples whose bits are kept, sorted.
        tensors: What is written; see `read_witnesses`.
    """

    def __init__(
        self,
        sample_ids: Sequence[str],
        *,
        patches: int,
        epochs: int,
        seed: int,
        views: int = 1,
        guided: bool = False,
    ) -> None:
        self.witnesses = choose_witnesses(sample_ids, seed)
        self.patches = patches
        self._place = {name: number for number, name in enumerate(self.witnesses)}
        shape = (epochs, views, len(self.witnesses))
        self.tensors: dict[str, np.ndarray[Any, Any]] = {
            "bits": np.zeros((*shape, (patches + 7) // 8), np.uint8),
            "drawn": np.zeros(shape, np.uint8),
            "draws": np.zeros(epochs, np.int64),
            "sums": np.zeros(epochs, np.uint64),
        }
        if guided:
            self.tensors["levels"] = np.zeros((*shape, patches), np.uint8)

    def record(
        self,
        sample_ids: Sequence[str],
        epoch: int,
        view: int,
        hidden: Any,
        levels: UInt8[np.ndarray, "B L"] | None = None,
    ) -> None:
        """Record one batch.

        Args:
            sample_ids: One id a row of ``hidden``.
            epoch: Epoch of the draw, from 0.
            view: View of the draw, from 0.
            hidden: bool [B, L] or [B, *grid], on any device: the complement of the very tensor that the encoder got.
            levels: What the masks were drawn by, where the policy follows a network.

        Raises:
            MwmError: A witness was recorded before in this epoch and view, or ``hidden`` has another shape: a bug.
        """
        bits = pack(_as_bool(hidden, len(sample_ids), self.patches))
        for index, name in enumerate(sample_ids):
            place = self._place.get(name)
            if place is None:
                continue
            if self.tensors["drawn"][epoch, view, place]:
                raise MwmError(f"witness {name}: drawn twice in epoch {epoch}, view {view}")
            self.tensors["drawn"][epoch, view, place] = 1
            self.tensors["bits"][epoch, view, place] = bits[index]
            if levels is not None:
                self.tensors["levels"][epoch, view, place] = levels[index]
        self.tensors["draws"][epoch] += len(bits)
        # An array, not a scalar: it wraps modulo 2^64, as meant, without a warning.
        self.tensors["sums"][epoch : epoch + 1] += digest_sum(sample_ids, view, bits)

    def hidden_in(self, epoch: int, names: Sequence[str]) -> dict[str, Bool[np.ndarray, "L"]]:
        """What was hidden of some witnesses in the first view of an epoch, of those that were drawn in it."""
        found = {}
        for name in names:
            place = self._place[name]
            if self.tensors["drawn"][epoch, 0, place]:
                bits = self.tensors["bits"][epoch, 0, place]
                found[name] = np.unpackbits(bits, count=self.patches, bitorder="little").astype(np.bool_)
        return found

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Torch tensors and JSON for a checkpoint; the unsigned sums as the bits of int64."""
        import torch

        tensors = {
            name: torch.from_numpy(value.view(_SIGNED.get(name, value.dtype)).copy())
            for name, value in self.tensors.items()
        }
        return tensors, {"version": VERSION, "witnesses": list(self.witnesses), "patches": self.patches}

    def load(self, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Become what `state` described.

        Raises:
            CorruptError: The state is of another run.
        """
        arrays = {name: np.asarray(tensors[name]) for name in self.tensors if name in tensors}
        same = meta == self.state()[1] and len(arrays) == len(self.tensors)
        if not same or any(arrays[name].shape != own.shape for name, own in self.tensors.items()):
            raise CorruptError("witnesses of the saved state: of other samples, epochs or patches than this run's")
        self.tensors = {name: arrays[name].view(own.dtype).copy() for name, own in self.tensors.items()}

    def write(self, out: Path) -> dict[str, Any]:
        """Write ``witnesses.safetensors`` and ``witnesses.json`` into a run's folder.

        Returns:
            For the card's outputs: digest of the tensors and names, and counts.
        """
        from safetensors.numpy import save

        names = describe(self.witnesses, self.patches)
        write_atomic(out / FILE, save(self.tensors))
        write_atomic(out / NAMES, names)
        return {
            "witnesses": tensor_digest(self.tensors),
            "witness_names": hashlib.sha256(names).hexdigest(),
            "witness_samples": len(self.witnesses),
            "witness_draws": int(self.tensors["drawn"].sum()),
            "draws": int(self.tensors["draws"].sum()),
        }


_SIGNED = {"sums": np.dtype(np.int64)}


def choose_witnesses(sample_ids: Sequence[str], seed: int) -> tuple[str, ...]:
    """The up to 256 samples whose bits are kept, by id; a function of the set of ids and the seed."""
    words = draw_u32(seed_key(PURPOSE, seed), sample_keys(sample_ids), epoch=0, n=2).tolist()
    chosen = sorted(range(len(sample_ids)), key=lambda index: (words[index], sample_ids[index]))
    return tuple(sorted(sample_ids[index] for index in chosen[:WITNESSES_MAX]))


def pack(hidden: Bool[np.ndarray, "B L"]) -> UInt8[np.ndarray, "B bytes"]:
    """Bits of draws; see the top of this file."""
    return np.packbits(hidden, axis=1, bitorder="little")


def digest_sum(sample_ids: Sequence[str], view: int, bits: UInt8[np.ndarray, "B bytes"]) -> np.uint64:
    """Sum modulo 2^64 of the first 8 bytes of the digests of draws."""
    total = 0
    for name, row in zip(sample_ids, bits, strict=True):
        text = name.encode() + b"\0" + bytes([view]) + row.tobytes()
        total += int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
    return np.uint64(total % (1 << 64))


def describe(witnesses: Sequence[str], patches: int) -> bytes:
    """Content of ``witnesses.json``."""
    return rfc8785.dumps({"version": VERSION, "patches": patches, "witnesses": list(witnesses)})


def read_witnesses(folder: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Read what a recorder wrote.

    Returns:
        ``bits`` uint8 [epochs, views, witnesses, bytes], ``drawn`` uint8 [epochs, views, witnesses], ``draws`` int64
        and ``sums`` uint64 [epochs]; of a policy that follows a network also ``levels`` uint8 [epochs, views,
        witnesses, L]; and the JSON beside them.

    Raises:
        CorruptError: A file is missing, unreadable or incomplete.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(folder / FILE)
        names = json.loads((folder / NAMES).read_bytes())
        shape = tensors["drawn"].shape
        expected = {
            "bits": (np.uint8, (*shape, (names["patches"] + 7) // 8)),
            "drawn": (np.uint8, (shape[0], shape[1], len(names["witnesses"]))),
            "draws": (np.int64, shape[:1]),
            "sums": (np.uint64, shape[:1]),
        }
        if "levels" in tensors:
            expected["levels"] = (np.uint8, (*shape, names["patches"]))
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise CorruptError(f"{FILE}, {NAMES}: {type(error).__name__} while reading the witnesses") from None
    if names.get("version") != VERSION or any(
        tensors.get(name, np.zeros(0, np.bool_)).dtype != dtype or tensors[name].shape != size
        for name, (dtype, size) in expected.items()
    ):
        raise CorruptError(f"{FILE}, {NAMES}: not witnesses of version {VERSION}")
    return tensors, names


@dataclass(frozen=True)
class Redrawn:
    """What an audit of masks found.

    Attributes:
        checked: Witness draws compared bit by bit.
        draws: Draws whose sums were compared.
        epochs: Epochs of the run.
        mismatches: One line for each witness draw or epoch that differs.
        unrecomputable: Draws by a network's scores that were recorded for the witnesses alone.
    """

    checked: int
    draws: int
    epochs: int
    mismatches: tuple[str, ...]
    unrecomputable: int = 0


def redraw(store: RegionStore, card_spec: Mapping[str, Any], folder: Path) -> Redrawn:
    """Draw every mask of a run again, from the region store and the card, and compare with its witnesses.

    Args:
        store: The region store that the run read.
        card_spec: ``identity.spec`` of the run's card, with the section ``mask`` (`stage2_pretrain.masking.spec`).
        folder: The run's folder, with its witness files.

    Returns:
        Counts and mismatches. No image is opened: their sizes stand in the store.

    Raises:
        CorruptError: The witness files are missing, unreadable or of another run.
        IncompatibleError: The card says too little, or names bits or a policy that this release cannot draw.
    """
    spec = mask_spec_of_card(card_spec)
    samples = usable_samples(store, card_spec.get("rows"))
    names = [sample.sample_id for sample in samples]
    if len(names) != spec.samples:
        raise IncompatibleError(f"region store: {len(names)} samples with maps, the card has {spec.samples}")
    recorded, described = read_witnesses(folder)
    guided = guide_of(spec.policy_at(0)) is not None
    again = WitnessRecorder(
        names, patches=spec.patches, epochs=spec.epochs, seed=spec.seed, views=spec.views, guided=guided
    )
    if describe(again.witnesses, spec.patches) != rfc8785.dumps(described):
        raise CorruptError(f"{NAMES}: other witnesses than the card's seed and the region store give")
    if recorded["drawn"].shape != again.tensors["drawn"].shape:
        raise CorruptError(
            f"{FILE}: {recorded['drawn'].shape[:2]} epochs and views, the card has {spec.epochs, spec.views}"
        )
    if guided != ("levels" in recorded):
        raise CorruptError(f"{FILE}: {'no ' * guided}levels of a network, and the card's policy is {spec.policy.name}")
    sampler = spec.sampler(store.regions)
    keys, sizes_px = sample_keys(names), image_sizes_px(samples)
    present = list(spec.taking_part(names))
    whose = spec.maps_of().tolist()
    if guided:
        return _redraw_guided(spec, sampler, names, present, recorded, again)
    for first in range(0, len(names), _ROWS):
        chunk = range(first, min(first + _ROWS, len(names)))
        maps = store.maps([samples[whose[index]].row for index in chunk])
        for epoch, wanted in enumerate(present):
            part = np.array([index for index in chunk if index in wanted], np.int64)
            if len(part) == 0:
                continue
            windows = draw_windows(sizes_px[part], keys[part], seed=spec.seed, epoch=epoch, options=spec.window)
            coverage = sampler.cover(maps[part - first], windows)
            for view in range(spec.views):
                hidden = sampler.draw_covered(coverage, keys[part], epoch, view).hidden
                again.record([names[index] for index in part], epoch, view, hidden)
    drawn = int(again.tensors["drawn"].sum()), int(again.tensors["draws"].sum())
    return Redrawn(*drawn, spec.epochs, tuple(_differences(recorded, again)))


def _redraw_guided(
    spec: MaskSpec,
    sampler: MaskSampler,
    names: Sequence[str],
    present: Sequence[set[int]],
    recorded: Mapping[str, np.ndarray[Any, Any]],
    again: WitnessRecorder,
) -> Redrawn:
    """The witnesses by their recorded levels; of the other draws the number alone."""
    place = {name: index for index, name in enumerate(names)}
    strange: list[str] = []
    for epoch, wanted in enumerate(present):
        numbers = [number for number, name in enumerate(again.witnesses) if place[name] in wanted]
        drawn_now = [again.witnesses[number] for number in numbers]
        if not drawn_now:
            continue
        policy: Any = sampler.policy_at(epoch)
        keys, blank = sample_keys(drawn_now), np.zeros((len(numbers), spec.patches), np.uint8)
        for view in range(spec.views):
            levels = recorded["levels"][epoch, view, numbers]
            strange += [
                f"epoch {epoch} view {view} witness {name}: scores that policy {spec.policy.name} does not give"
                for name, given in zip(drawn_now, policy.gives(levels), strict=True)
                if not given
            ]
            hidden = sampler.draw_covered(blank, keys, epoch, view, levels).hidden
            again.record(drawn_now, epoch, view, hidden, levels)
    checked = int(again.tensors["drawn"].sum())
    # Sums are over all draws: comparable in epochs whose draws are all by witnesses.
    whole = np.array([len(wanted) * spec.views for wanted in present])
    known = again.tensors["draws"] == whole
    again.tensors["draws"][:] = whole
    again.tensors["sums"][~known] = recorded["sums"][~known]
    found = (*strange, *_differences(recorded, again))
    return Redrawn(checked, checked, spec.epochs, found, int(whole.sum()) - checked)


def _differences(recorded: Mapping[str, np.ndarray[Any, Any]], again: WitnessRecorder) -> Iterator[str]:
    """One line a witness draw, then one an epoch."""
    own = again.tensors
    unlike = (recorded["bits"] != own["bits"]).any(axis=-1) | (recorded["drawn"] != own["drawn"])
    for epoch, view, place in np.argwhere(unlike).tolist():
        where = f"epoch {epoch} view {view} witness {again.witnesses[place]}"
        if recorded["drawn"][epoch, view, place] != own["drawn"][epoch, view, place]:
            yield f"{where}: {'not ' if own['drawn'][epoch, view, place] else ''}recorded, unlike the card's schedule"
            continue
        wrong = np.unpackbits(recorded["bits"][epoch, view, place] ^ own["bits"][epoch, view, place]).sum()
        yield f"{where}: {wrong} of {again.patches} patches differ"
    for epoch in np.flatnonzero(recorded["draws"] != own["draws"]).tolist():
        yield f"epoch {epoch}: {recorded['draws'][epoch]} draws recorded, the card's schedule has {own['draws'][epoch]}"
    for epoch in np.flatnonzero((recorded["sums"] != own["sums"]) & (recorded["draws"] == own["draws"])).tolist():
        yield f"epoch {epoch}: the sum of its {own['draws'][epoch]} draws differs"


def _as_bool(hidden: Any, batch: int, patches: int) -> Bool[np.ndarray, "B L"]:
    array = np.asarray(hidden.detach().cpu() if hasattr(hidden, "detach") else hidden)
    if array.dtype != np.bool_ or array.size != batch * patches or len(array) != batch:
        raise MwmError(f"hidden: {array.dtype} {array.shape}, expected bool of {batch} samples and {patches} patches")
    return array.reshape(batch, patches)
