"""``samples.jsonl`` as its readers see it: lines stay on disk, and are parsed one by one when asked for."""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from shared.errors import CorruptError
from shared.region_layout import LINE_BYTES_MAX, RESTORE, SampleRow

_DIGEST_BYTES = 32


class SampleTable(Sequence[SampleRow]):
    """All rows of a store, checked against its card when opened; 44 bytes of memory a row, and 100 more by `row`.

    A million parsed lines would take two gigabytes, in every process that opens the store. What is kept instead
    finds a line and tells whether it is the one that was checked.

    Args:
        path: ``samples.jsonl``.
        count: N, on the card.
        sha256: Of the file, on the card.

    Raises:
        CorruptError: Missing, or not what was published; names the line where that is known.
    """

    def __init__(self, path: Path, count: int, sha256: str) -> None:
        self._name = path.name
        digest = hashlib.sha256()
        starts, checksums, digests = array("q", [0]), array("I"), bytearray()
        last = ""
        try:
            self._file = path.open("rb")
            while line := self._file.readline(LINE_BYTES_MAX + 1):
                digest.update(line)
                if len(checksums) == count:
                    raise ValueError(f"expected {count} lines only")
                sample = SampleRow.from_line(line)
                if sample.row != len(checksums) or (sample.row and sample.sample_id <= last):
                    raise ValueError("line i is not row i, or ids are not ascending")
                last = sample.sample_id
                starts.append(starts[-1] + len(line))
                checksums.append(zlib.crc32(line))
                digests += bytes.fromhex(sample.maps_digest).ljust(_DIGEST_BYTES)[:_DIGEST_BYTES]
        except FileNotFoundError:
            raise CorruptError(f"{path.name}: missing", hint=RESTORE) from None
        except (ValueError, TypeError) as error:
            raise CorruptError(f"{path.name} line {len(checksums) + 1}: {error}", hint=RESTORE) from None
        if digest.hexdigest() != sha256 or len(checksums) != count:
            raise CorruptError(f"{path.name}: changed since it was published", hint=RESTORE)
        self._starts = np.array(starts, np.int64)
        self._checksums = np.array(checksums, np.uint32)
        self._digests = bytes(digests)

    def __del__(self) -> None:
        if (file := getattr(self, "_file", None)) is not None:
            file.close()

    def __len__(self) -> int:
        return len(self._checksums)

    @overload
    def __getitem__(self, row: int) -> SampleRow: ...

    @overload
    def __getitem__(self, row: slice) -> list[SampleRow]: ...

    def __getitem__(self, row: int | slice) -> SampleRow | list[SampleRow]:
        """The sample of a row, or of several.

        Raises:
            IndexError: No such row.
            CorruptError: Its line has changed since the table was opened.
        """
        if isinstance(row, slice):
            return [self[place] for place in range(len(self))[row]]
        place = range(len(self))[row]
        start = int(self._starts[place])
        line = os.pread(self._file.fileno(), int(self._starts[place + 1]) - start, start)
        if zlib.crc32(line) != self._checksums[place]:
            raise CorruptError(f"{self._name} line {place + 1}: changed since it was opened", hint=RESTORE)
        return SampleRow.from_line(line)

    def ids(self) -> Iterator[str]:
        """Sample ids in row order."""
        return (sample.sample_id for sample in self)

    def row(self, sample_id: str) -> int | None:
        """Row of a sample, or None where there is none; the first call reads all ids."""
        return self._rows.get(sample_id)

    def maps_digest(self, row: int) -> bytes:
        """Digest (32 bytes) of a row's maps, without parsing its line."""
        return self._digests[row * _DIGEST_BYTES : (row + 1) * _DIGEST_BYTES]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {sample_id: row for row, sample_id in enumerate(self.ids())}


class SomeSamples(Sequence[SampleRow]):
    """Some rows of a store, in its order; 8 bytes of memory each, for their lines stay where they are.

    Args:
        samples: All of them, a `SampleTable`.
        wanted: Whether one is among those meant; asked once of each.
    """

    def __init__(self, samples: Sequence[SampleRow], wanted: Callable[[SampleRow], bool]) -> None:
        self._samples = samples
        self._places = np.array([place for place, sample in enumerate(samples) if wanted(sample)], np.int64)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> SampleRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[SampleRow]: ...

    def __getitem__(self, index: int | slice) -> SampleRow | list[SampleRow]:
        """One of them, or several; parsed anew each time.

        Raises:
            IndexError: There are not so many.
            CorruptError: As `SampleTable`.
        """
        if isinstance(index, slice):
            return [self._samples[place] for place in self._places[index].tolist()]
        return self._samples[int(self._places[index])]
