"""The region store as its readers see it: maps and boxes by row, and whether all of it is what was published.

Imports no zarr: maps are read straight from their shards, which zarr reads just as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8, UInt16, UInt32

from shared.artifact import Card, file_sha256, open_artifact
from shared.errors import CorruptError, IncompatibleError, UsageError
from shared.merkle import row_digest
from shared.region_arrays import DETECTIONS, ShardedArray, check_metadata, read_detections
from shared.region_layout import (
    ABSENT,
    ARRAYS,
    QUARANTINE,
    QUARTER,
    RESTORE,
    SAMPLES,
    SampleRow,
    decode_boxes,
    decode_probability,
    encode_boxes,
    encode_probability,
    encode_scores,
)
from shared.region_samples import SampleTable
from shared.region_verify import verify_store

if TYPE_CHECKING:
    from shared.region_dataset import RegionMaps
    from shared.region_views import Picture

__all__ = [
    "ABSENT",
    "RegionStore",
    "SampleRow",
    "decode_boxes",
    "decode_probability",
    "encode_boxes",
    "encode_probability",
    "encode_scores",
    "open_region_store",
    "verify_store",
]

_KNOWN = np.uint64(1 << 32)


class RegionStore:
    """A published region store, open for reading; pickles as its path and id and opens anew where it arrives.

    Args:
        path: The artifact's folder.
        card: Its card.

    Attributes:
        path: The artifact's folder.
        card: Its card.
        regions: The K region names, in map order.
        grid: Size of a map in map pixels, (H, W) or (D, H, W).
        samples: One `SampleRow` a row, read from disk when asked for.

    Raises:
        CorruptError: The list of samples is not what was published.
    """

    def __init__(self, path: Path, card: Card) -> None:
        outputs = card.identity.outputs
        self.path = path
        self.card = card
        self.regions: tuple[str, ...] = tuple(region["name"] for region in outputs["regions"])
        self.grid: tuple[int, ...] = tuple(outputs["grid"])
        self.samples = SampleTable(path / SAMPLES, int(outputs["samples"]), outputs["samples_sha256"])
        self._known = np.zeros(len(self.samples), np.uint64)
        """Of each row whose digest was found right: its chunk's crc32c, and a bit that says so."""

    def __len__(self) -> int:
        return len(self.samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_region_store, (f"{self.path.resolve()}@sha256:{self.card.artifact_id}",)

    @property
    def grounder(self) -> str | None:
        """Name of the part that found the regions; None in a store that stage 1 did not make."""
        part = self.card.identity.spec.get("grounder")
        return part.get("name") if isinstance(part, dict) else None

    @property
    def sample_ids(self) -> list[str]:
        """Ids in row order."""
        return list(self.samples.ids())

    def row(self, sample_id: str) -> int:
        """Row of a sample.

        Raises:
            UsageError: The store has no such sample.
        """
        row = self.samples.row(sample_id)
        if row is None:
            raise UsageError(f"sample {sample_id!r}: not in region store {self.path.name}")
        return row

    @overload
    def maps(self, rows: str) -> Float32[np.ndarray, "K *grid"]: ...
    @overload
    def maps(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n K *grid"]: ...
    def maps(self, rows: str | Sequence[int]) -> np.ndarray[Any, Any]:
        """Region maps: of one sample by its id, as probabilities; of some rows, as they are stored.

        ``store.maps("scan-1")`` is float32 [K, *grid] in [0, 1], in the order of `regions`; a quarantined sample
        is an error. ``store.maps([0, 7])`` is uint8 [2, K, *grid], ``floor(254 p + 0.5)``, and `ABSENT` throughout
        for quarantined rows: what loops over a store take.

        Checksums say that a chunk is whole, not whose it is: two shards exchanged by a copy pass them all. So the
        first time that this object reads a row, its maps are compared with the digest that was published, and
        from then on its chunk must have the same crc32c as then, which costs nothing.

        Args:
            rows: A sample id; or numbers in 0..N-1, any order, repeats allowed.

        Raises:
            UsageError: No such sample or row, or a sample without maps.
            CorruptError: A row's maps are not what was published; names row and sample.
        """
        if isinstance(rows, str):
            return decode_probability(self.maps([self._usable_row(rows)])[0])
        rows = self._check_rows(rows)
        checksums = np.zeros(len(rows), np.uint32)
        out = self._read(self._maps, rows, checksums)
        known = checksums | _KNOWN
        for place in np.flatnonzero(self._known[rows] != known).tolist():
            row = rows[place]
            if row_digest(out[place]) != self.samples.maps_digest(row):
                raise CorruptError(
                    f"row {row} ({self.samples[row].sample_id}): its region maps are not those that were published",
                    hint="mwm audit names what changed; restore the region store from a copy, or localize again",
                )
            self._known[row] = known[place]
        return out

    def maps_quarter(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n K *cells"]:
        """As `maps`, averaged over cells of four map pixels a side."""
        return self._read(self._quarter, self._check_rows(rows))

    def boxes(self, row: int) -> tuple[Int32[np.ndarray, "m 4"], UInt16[np.ndarray, "m"], UInt16[np.ndarray, "m"]]:
        """Detections of a row: boxes in 1/16 px of the original image, scores 0..65535, region of each.

        The first call reads the detections of the whole store, 16 bytes each.

        Raises:
            UsageError: No such row.
            CorruptError: The detections are not what was written.
        """
        self._check_rows([row])
        boxes, scores, regions, offsets = self._detections
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        return boxes[part], scores[part], regions[part]

    def overlay(
        self, sample_id: str, images: Any = None, *, regions: Sequence[str] | None = None, side_px: int = 512
    ) -> Picture:
        """A sample's regions painted, for notebooks to show: `shared.region_views.paint_sample`."""
        from shared.region_views import paint_sample

        return paint_sample(self, sample_id, images, regions=regions, side_px=side_px)

    def dataset(
        self, images: Path | str | None = None, transform: Callable[[dict[str, Any]], Any] | None = None
    ) -> RegionMaps:
        """The samples with maps as a torch dataset: `shared.region_dataset.RegionMaps`."""
        from shared.region_dataset import RegionMaps

        return RegionMaps(self, images, transform)

    def why_quarantined(self) -> dict[str, str]:
        """Sample id -> reason code, of the samples without maps.

        Raises:
            CorruptError: The list is not what was published.
        """
        path = self.path / QUARANTINE
        if not path.is_file() or file_sha256(path) != self.card.identity.outputs["quarantine_sha256"]:
            raise CorruptError(f"{QUARANTINE}: missing, or changed since it was published", hint=RESTORE)
        lines = path.read_text(encoding="utf-8").splitlines()
        return {entry["sample_id"]: entry["reason"] for entry in map(json.loads, lines)}

    def _repr_html_(self) -> str:
        from shared.region_views import describe_html

        return describe_html(self)

    def _usable_row(self, sample_id: str) -> int:
        row = self.row(sample_id)
        if self.samples[row].status != "ok":
            reason = self.why_quarantined().get(sample_id, "an unknown reason")
            raise UsageError(f"sample {sample_id!r}: has no maps, quarantined for {reason}")
        return row

    def _read(
        self, array: ShardedArray, rows: Sequence[int], checksums: UInt32[np.ndarray, "n"] | None = None
    ) -> UInt8[np.ndarray, "n K *grid"]:
        out = np.empty((len(rows), *array.shape[1:]), np.uint8)
        damaged = array.read(rows, out, checksums)
        for row, damage in sorted(damaged.items()):
            where = f"{ARRAYS}/{array.folder.name}/{array.shard_of(row).name}"
            raise CorruptError(f"row {row} ({self.samples[row].sample_id}) in {where}: {damage}", hint=RESTORE)
        return out

    def _check_rows(self, rows: Sequence[int]) -> list[int]:
        checked = [int(row) for row in rows]
        wrong = [row for row in checked if not 0 <= row < len(self.samples)]
        if wrong:
            raise UsageError(f"row {wrong[0]}: region store {self.path.name} has rows 0 to {len(self.samples) - 1}")
        return checked

    @cached_property
    def _maps(self) -> ShardedArray:
        return self._open("maps", self.grid)

    @cached_property
    def _quarter(self) -> ShardedArray:
        return self._open("maps_quarter", tuple(size // QUARTER for size in self.grid))

    def _open(self, name: str, grid: tuple[int, ...]) -> ShardedArray:
        check_metadata(self.path, name, self.card.provenance.files)
        array = ShardedArray(self.path / ARRAYS / name)
        wanted = (len(self.samples), len(self.regions), *grid)
        if array.shape != wanted:
            raise CorruptError(f"{ARRAYS}/{name}: shape {array.shape}, its card says {wanted}", hint=RESTORE)
        return array

    @cached_property
    def _detections(
        self,
    ) -> tuple[Int32[np.ndarray, "M 4"], UInt16[np.ndarray, "M"], UInt16[np.ndarray, "M"], Int64[np.ndarray, "N1"]]:
        for name in DETECTIONS:
            check_metadata(self.path, name, self.card.provenance.files)
        return read_detections(self.path / ARRAYS, len(self.samples), int(self.card.identity.outputs["detections"]))


def open_region_store(reference: str | Path) -> RegionStore:
    """Open a published store given as ``PATH[@sha256:...]``.

    Raises:
        IncompatibleError: Unpublished, another kind or version, not the pinned id, or a zip file.
        InputMissingError, LockedError, CorruptError: As `shared.artifact.read_card`; also a damaged list of samples.
    """
    path = Path(str(reference).partition("@sha256:")[0])
    if path.is_file():
        raise IncompatibleError(f"{path}: a file; a region store is a folder, and zip stores are refused")
    return RegionStore(*open_artifact(reference, "region-store"))
