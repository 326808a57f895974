"""Decoded pixels on disk: decoded once, read by every loader process and every later run over the same images.

One flat file of 8-bit pixels, one of float32 for what 8 bits do not hold, and a record a sample, each at a fixed
place. A sample's record is written after its pixels and holds their crc32c, which begins with the digest of what the
image decodes to: so whatever a kill, a full disk, another writer or a changed byte has left is not believed, and the
image is decoded again. Writers of the same sample write the same bytes to the same place; nobody waits for a lock.
Files have holes until they are filled.

The pixels are patient data: the folder is made for its owner alone (mode 0700, files 0600). It may be deleted at any
time. It never lies inside an artifact.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Float32, UInt8

from shared.artifact import full_disk_is_named
from shared.decode import VERSION as DECODE_VERSION
from shared.errors import DiskFullError, UsageError
from shared.region_layout import SampleRow
from shared.workspace import refuse_inside_artifact

Pixels = UInt8[np.ndarray, "C H W"] | Float32[np.ndarray, "C H W"]

_VERSION = 1
_RECORD = struct.Struct("<II")
_FILES = ("records", "pixels.u8", "pixels.f32")
_KINDS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<f4")}
"""Number in a record -> type of the pixels, which lie in the file of that place; 0: there are none."""


class PixelCache:
    """The decoded pixels of some samples; pickles as its folder, and opens its files where it arrives.

    Args:
        folder: Of this set of samples; must exist.
        samples: Each with the shape and the digest of its decoded pixels.
    """

    def __init__(self, folder: Path, samples: Sequence[SampleRow]) -> None:
        self.folder = folder
        self._shapes: list[tuple[int, ...]] = []
        self._digests: list[bytes] = []
        for sample in samples:  # once: each is parsed anew
            self._shapes.append(tuple(sample.shape or ()))
            self._digests.append(bytes.fromhex(sample.pixel_sha256 or ""))
        self._offsets = np.cumsum([0, *(math.prod(shape) for shape in self._shapes)], dtype=np.int64)
        self._files: tuple[int, ...] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": None}

    def read(self, index: int) -> Pixels | None:
        """The pixels of a sample, or None where they are not there whole."""
        records, *files = self._open()
        record = os.pread(records, _RECORD.size, index * _RECORD.size)
        if len(record) < _RECORD.size:
            return None
        crc, kind = _RECORD.unpack(record)
        if kind not in _KINDS:
            return None
        dtype, shape = _KINDS[kind], self._shapes[index]
        size = math.prod(shape) * dtype.itemsize
        # Not mapped into memory: a mapped file that somebody cuts short kills the process.
        data = os.pread(files[kind - 1], size, int(self._offsets[index]) * dtype.itemsize)
        if len(data) != size or self._crc(index, data) != crc:
            return None
        return np.frombuffer(data, dtype).reshape(shape).copy()  # torch warns of memory that can't be written

    def write(self, index: int, pixels: Pixels, pixel_sha256: str) -> None:
        """Keep a sample's pixels, if they are what the region store says that its image decodes to.

        Args:
            index: Of the sample.
            pixels: From `stage2_pretrain.data.as_stored`.
            pixel_sha256: Of the decoded image.

        Raises:
            DiskFullError: The same command continues once there is room, or without a cache.
        """
        kind = next((kind for kind, dtype in _KINDS.items() if dtype == pixels.dtype), 0)
        if not kind or bytes.fromhex(pixel_sha256) != self._digests[index] or pixels.shape != self._shapes[index]:
            return
        records, *files = self._open()
        data = np.ascontiguousarray(pixels).tobytes()
        with full_disk_is_named(self.folder, len(data)):
            put = os.pwrite(files[kind - 1], data, int(self._offsets[index]) * pixels.dtype.itemsize)
            if put == len(data):
                os.pwrite(records, _RECORD.pack(self._crc(index, data), kind), index * _RECORD.size)

    def _crc(self, index: int, data: bytes) -> int:
        return int(google_crc32c.extend(google_crc32c.value(self._digests[index]), data))

    def _open(self) -> tuple[int, ...]:
        if self._files is None:
            self._files = tuple(os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in _FILES)
            weakref.finalize(self, _close, self._files)
        return self._files


def _close(files: Sequence[int]) -> None:
    for file in files:
        os.close(file)


def open_pixel_cache(setting: str, samples: Sequence[SampleRow], out: Path) -> PixelCache | None:
    """Find or make the cache of a set of samples.

    Args:
        setting: A folder for caches, ``auto`` for one in the user's cache folder, or ``off``.
        samples: All with decoded images, in the order of their indices.
        out: The run's folder.

    Returns:
        The cache, or None for ``off``.

    Raises:
        UsageError: The folder lies inside an artifact or the run, is another user's, or cannot be made.
        DiskFullError: There is no room for all pixels, as 8-bit values.
    """
    if setting == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask-what-matters" / "images"
    root = (home if setting == "auto" else Path(setting).expanduser()).resolve()
    shown = f"image_cache {setting}"
    instead = "name another folder, or image_cache=off"
    refuse_inside_artifact(root / "images")
    if out.resolve() in (root, *root.parents):
        raise UsageError(f"{shown}: lies inside the run's folder, which is published whole", hint=instead)
    folder = root / _key(samples)[:32]
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise UsageError(f"{shown}: holds a folder of another user for these images", hint=instead)
        folder.chmod(0o700)
        cache = PixelCache(folder, samples)
        there = [os.fstat(file).st_blocks * 512 for file in cache._open()]
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(f"{shown}: cannot be made or written ({error.strerror})", hint=instead) from None
    needed = sum(math.prod(sample.shape or ()) for sample in samples) - sum(there)
    if needed > free:
        raise DiskFullError(
            f"{shown}: about {needed} bytes are needed for the decoded images, {free} are free",
            hint="make room, or image_cache=off; the same command continues",
        )
    return cache


def _key(samples: Sequence[SampleRow]) -> str:
    """Digest (hex) of what the samples decode to, in order; neither names nor places of files enter it."""
    digest = hashlib.sha256(f"mwm-pixels {_VERSION} {DECODE_VERSION}\n".encode())
    for sample in samples:
        digest.update(f"{sample.pixel_sha256} {list(sample.shape or ())}\n".encode())
    return digest.hexdigest()
