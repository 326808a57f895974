"""From a file's bytes to pixels: one documented rule a stored form. Called by `shared.images` only."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shared.errors import DecodeError
from shared.orientation import Grid, to_canonical

VERSION = 1
"""Raised when the pixels that a file decodes to change; part of what is made from them."""

PIXELS_MAX = 64_000_000
"""Largest image, in pixels, that is decoded; larger ones are quarantined as ``too_large``."""
_VOXELS_MAX = 1 << 29
FILE_BYTES_MAX = 2 << 30
RATIO_MAX = 250
RATIO_FREE_BYTES = 64 << 20
_HEADER_BYTES = 544
_GZIP = b"\x1f\x8b"
_PERCENTILES = (0.5, 99.5)

T = TypeVar("T")


@dataclass(frozen=True)
class Decoded:
    """Pixels [C, H, W] in [0, 1] and what they came from."""

    pixels: np.ndarray
    spacing_mm: tuple[float, float] | None
    source_sha256: str
    intensity: str
    grid: Grid | None = None


def decode_raster(path: Path, name: str) -> Decoded:
    """Decode a PNG, JPEG or TIFF file; ``name`` stands for it in messages."""
    data = read_bytes(path, name)
    pixels, intensity = _guarded(name, lambda: _raster(data, name))
    return Decoded(pixels, None, hashlib.sha256(data).hexdigest(), intensity)


def decode_slice(path: Path, name: str, index: int | None) -> Decoded:
    """Decode axial slice ``index`` of a NIfTI volume, oriented RAS+ (None: the header could not be read before)."""
    try:
        stat = path.stat()
    except OSError:
        raise DecodeError(f"{name}: the file is gone", reason="missing") from None
    stamp = (stat.st_mtime_ns, stat.st_size)
    volume = _guarded(name, lambda: _volume(path, name.partition("#")[0], stamp))
    if index is None or not 0 <= index < volume.voxels.shape[2]:
        raise DecodeError(f"{name}: the volume has {volume.voxels.shape[2]} axial slices, not the one named")
    pixels = volume.voxels[:, ::-1, index].T[None]
    return Decoded(pixels, volume.spacing_mm, volume.source_sha256, volume.intensity, volume.grid)


def count_slices(path: Path) -> int | None:
    """Axial slices of a NIfTI volume, from its header alone; None if that cannot be read."""
    import nibabel

    try:
        with path.open("rb") as file:
            head = _head(file.read(8 * _HEADER_BYTES))
        with np.errstate(all="ignore"):
            header = _header(head)
            shape = _shape(header)
            upward = nibabel.io_orientation(header.get_best_affine())[:, 0].tolist().index(2)
        return shape[upward] if math.prod(shape) <= _VOXELS_MAX else None
    except Exception:
        # Whatever a broken header makes of the parser: reading the volume will say it again, with a reason.
        return None


def read_bytes(path: Path, name: str) -> bytes:
    """The bytes of a file that may be read whole."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise DecodeError(f"{name}: {path.stat().st_size} bytes, at most {FILE_BYTES_MAX}", reason="too_large")
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"{name}: cannot be read ({type(error).__name__})", reason="missing") from None


def _guarded(name: str, decode: Callable[[], T]) -> T:
    """Run a decoder on bytes that nobody vouches for: whatever it raises becomes a `DecodeError`."""
    try:
        with np.errstate(all="ignore"):  # what overflows becomes infinite, and is then refused as such
            return decode()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        # Decoders put paths, addresses and header text into their messages; only short plain ones pass.
        detail = f": {text}" if text and len(text) < 100 and not set("/\\<@'\"") & set(text) else ""
        raise DecodeError(f"{name}: {type(error).__name__}{detail}") from None


def _silence(library: str) -> None:
    """Keep a library from logging what it finds in a file: text in headers may name a patient."""
    logging.getLogger(library).setLevel(logging.CRITICAL + 1)


def _raster(data: bytes, name: str) -> tuple[np.ndarray, str]:
    from PIL import Image, ImageOps, UnidentifiedImageError

    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        deep = _deep_tiff(data, name)
        if deep is not None:
            return rescale(deep, "sample", name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DecodeError(f"{name}: more than {PIXELS_MAX} pixels", reason="too_large") from None
    except UnidentifiedImageError:
        raise DecodeError(f"{name}: not a PNG, JPEG or TIFF file") from None
    _refuse_size(image.width, image.height, name)
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        raise DecodeError(f"{name}: {frames} frames, expected 1", reason="unsupported")
    if image.format == "PNG" and data[24] == 16 and data[25] != 0:
        raise DecodeError(f"{name}: a 16 bit PNG with colour or alpha", reason="unsupported")
    if image.format == "PNG":
        check_png(data, name)
    image.load()
    upright = ImageOps.exif_transpose(image)
    return _by_mode(upright, name)


def check_png(data: bytes, name: str) -> None:
    """Refuse a PNG with a damaged or missing chunk: Pillow reads some of them, to other pixels."""
    at = 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise DecodeError(f"{name}: a chunk of the PNG is damaged")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
    raise DecodeError(f"{name}: truncated")


def _by_mode(image: Any, name: str) -> tuple[np.ndarray, str]:
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        return rescale(np.asarray(image).astype(np.float32)[None], "sample", name)
    if mode == "1":
        return np.asarray(image, np.float32)[None], "bit"
    transparent = "transparency" in image.info
    if mode in ("L", "RGB") and not transparent:
        target = mode
    elif mode in ("LA", "L"):
        target = "LA"
    elif mode in ("RGBA", "RGB", "PA") or (mode == "P" and transparent):
        target = "RGBA"
    elif mode in ("P", "CMYK", "YCbCr"):
        target = "RGB"
    else:
        raise DecodeError(f"{name}: image mode {mode}", reason="unsupported")
    values = np.asarray(image.convert(target) if mode != target else image)
    values = values[..., None] if values.ndim == 2 else values
    pixels = np.moveaxis(values, -1, 0).astype(np.float32) / np.float32(255)
    if target in ("LA", "RGBA"):
        return pixels[:-1] * pixels[-1:], "uint8/255 over black"
    return pixels, "uint8/255"


def _deep_tiff(data: bytes, name: str) -> np.ndarray | None:
    """Pixels [C, H, W] of a TIFF of more than 8 bits; None where Pillow reads the file without loss."""
    import tifffile

    _silence("tifffile")

    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        if len(tiff.pages) != 1:
            reason = "unsupported" if len(tiff.pages) else "decode_failed"
            raise DecodeError(f"{name}: {len(tiff.pages)} pages, expected 1", reason=reason)
        page: Any = tiff.pages[0]
        _refuse_size(page.imagewidth, page.imagelength, name)
        if page.dtype is None or page.dtype.itemsize == 1:
            return None
        if page.samplesperpixel not in (1, 3) or page.dtype.kind not in "iuf":
            raise DecodeError(f"{name}: TIFF of {page.samplesperpixel} x {page.dtype}", reason="unsupported")
        if page.samplesperpixel == 1 and page.compression not in (1, 8, 32773, 32946) and page.dtype == np.uint16:
            return None  # LZW and the like, which Pillow decodes at 16 bit
        values = page.asarray().astype(np.float32)
        inverted = page.photometric == 0
        orientation = page.tags.valueof(274, 1)
        channels_last = values.ndim == 3 and page.planarconfig == 1
    values = values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0) if channels_last else values
    return _upright(-values if inverted else values, int(orientation))


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the TIFF orientation tag (1..8) to [C, H, W]."""
    if orientation >= 5:
        values = values.transpose(0, 2, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[:, ::-1, :]
    return values


def rescale(values: np.ndarray, whose: str, name: str) -> tuple[np.ndarray, str]:
    """Map percentiles 0.5 and 99.5 of ``values`` to 0 and 1, clipped, in float32.

    Args:
        values: Any shape, float32.
        whose: ``sample`` or ``volume``: what the percentiles are taken over, for the record.
        name: Stands for the file in messages.

    Raises:
        DecodeError: Reason ``nonfinite``.
    """
    if not np.isfinite(values).all():
        raise DecodeError(f"{name}: holds NaN or infinite values", reason="nonfinite")
    low, high = (np.float32(value) for value in np.percentile(values, _PERCENTILES))
    rule = f"percentile {_PERCENTILES[0]}..{_PERCENTILES[1]} of the {whose}"
    if not high > low:
        low, high = values.min(), values.max()
        rule = f"minimum..maximum of the {whose}"
    if not high > low:
        return np.zeros(values.shape, np.float32), f"constant {whose}"
    # Halved, since the span of two float32 may exceed the largest one.
    scaled = (values * np.float32(0.5) - low * np.float32(0.5)) / (high * np.float32(0.5) - low * np.float32(0.5))
    return np.clip(scaled, 0, 1).astype(np.float32), f"{rule}: {low!s}..{high!s}"


def _refuse_size(width: int, height: int, name: str) -> None:
    if width * height > PIXELS_MAX:
        raise DecodeError(f"{name}: {width} x {height} pixels, at most {PIXELS_MAX}", reason="too_large")
    if width * height == 0:
        raise DecodeError(f"{name}: {width} x {height} pixels")


@dataclass(frozen=True)
class _Volume:
    voxels: np.ndarray
    spacing_mm: tuple[float, float]
    source_sha256: str
    intensity: str
    grid: Grid


@lru_cache(maxsize=1)
def _volume(path: Path, name: str, stamp: tuple[int, int]) -> _Volume:
    """The volume [x, y, z] in RAS+ and [0, 1]; the last one is kept, since its slices come one by one."""
    import nibabel

    data = read_bytes(path, name)
    digest = hashlib.sha256(data).hexdigest()
    header = _header(_head(data))
    shape = _shape(header)
    if math.prod(shape) > _VOXELS_MAX or sorted(shape)[1] * sorted(shape)[2] > PIXELS_MAX:
        raise DecodeError(f"{name}: {' x '.join(map(str, shape))} voxels, at most {_VOXELS_MAX}", reason="too_large")
    size = int(header.get_data_offset()) + math.prod(shape) * int(header.get_data_dtype().itemsize)
    if data[:2] == _GZIP:
        if size > RATIO_FREE_BYTES and size > RATIO_MAX * len(data):
            raise DecodeError(f"{name}: unpacks more than {RATIO_MAX} fold", reason="too_large")
        data = _unpack(data, size)
    if len(data) < size:
        raise DecodeError(f"{name}: truncated, {len(data)} of {size} bytes")
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind.from_bytes(data[:size])
    grid = Grid.of(shape, image.affine)
    values = to_canonical(np.asanyarray(image.dataobj).reshape(shape), grid).astype(np.float32)
    voxels, intensity = rescale(values, "volume", name)
    right, anterior, _ = (round(float(mm), 6) for mm in grid.spacing_mm())
    return _Volume(voxels, (anterior, right), digest, intensity, grid)


def _unpack(data: bytes, size: int) -> bytes:
    """Unpack a gzip stream, at most ``size`` bytes of it."""
    return zlib.decompressobj(wbits=31).decompress(data, size)


def _head(data: bytes) -> bytes:
    return _unpack(data, _HEADER_BYTES) if data[:2] == _GZIP else data[:_HEADER_BYTES]


def _header(head: bytes) -> Any:
    """The NIfTI-1 or NIfTI-2 header in the first bytes of an unpacked file."""
    import nibabel

    _silence("nibabel.global")

    second = 540 in (int.from_bytes(head[:4], order) for order in ("little", "big"))
    kind, size = (nibabel.Nifti2Header, 540) if second else (nibabel.Nifti1Header, 348)
    # Four zeros say that no extension follows: one may be longer than what of the file is read for its header.
    return kind.from_fileobj(io.BytesIO(head[:size] + bytes(4)))


def _shape(header: Any) -> tuple[int, int, int]:
    """Extent along three stored axes; two-dimensional files are one slice."""
    shape = [int(extent) for extent in header.get_data_shape()]
    if len(shape) < 2 or min(shape) < 1 or any(extent != 1 for extent in shape[3:]):
        raise DecodeError(f"NIfTI of shape {shape}, expected one volume", reason="unsupported")
    shape = [*shape, 1][:3]
    return shape[0], shape[1], shape[2]
