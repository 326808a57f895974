"""DICOM files: how many frames, whose, and the pixels of one frame in [0, 1].

Only the tags in ``_HEAD`` and ``_PIXELS`` are ever read out; patient and study ids leave `scan` to be turned into
pseudonyms and go nowhere else. Messages never hold a tag's value. A codec is fixed for each transfer
syntax, so that what a file decodes to does not depend on what else is installed; JPEG Lossless, JPEG-LS, JPEG 2000
and 12 bit JPEG need the extra ``dicom``.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32

from shared.decode import FILE_BYTES_MAX, PIXELS_MAX, RATIO_FREE_BYTES, RATIO_MAX, Decoded, read_bytes
from shared.dicom_values import COLOURS, read_spacing_mm, to_pixels
from shared.errors import DecodeError

SUFFIXES = (".dcm", ".dicom")
FRAMES_MAX = 100_000
"""More frames than this are not believed; the file is one sample, quarantined as ``too_large``."""

_MAGIC_AT = 128
_HEAD_BYTES = 4 << 20
_DEFLATED = "1.2.840.10008.1.2.1.99"
_EXPLICIT = "1.2.840.10008.1.2.1"
_JPEG = "1.2.840.10008.1.2.4."
_NATIVE = ("1.2.840.10008.1.2", _EXPLICIT, "1.2.840.10008.1.2.2", _DEFLATED)
_CODECS = {
    "1.2.840.10008.1.2.5": "pydicom",
    _JPEG + "50": "pillow",
    **dict.fromkeys(
        (_JPEG + last for last in ("51", "57", "70", "80", "81", "90", "91", "201", "202", "203")), "pylibjpeg"
    ),
}
_KINDS = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
_HEAD = ("PatientID", "StudyInstanceUID", "NumberOfFrames")
_PIXELS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing", "ImagerPixelSpacing",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in COLOURS),
    *(f"{colour}PaletteColorLookupTableData" for colour in COLOURS),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in COLOURS),
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData", "FloatPixelData", "DoubleFloatPixelData",
)  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Scan:
    """What the header says of a file.

    Attributes:
        frames: How many, at least 1.
        patient: The patient id as it stands in the file, or empty. Not to be published.
        study: The study's UID, or empty. Not to be published.
    """

    frames: int
    patient: str
    study: str


def is_dicom(path: Path) -> bool:
    """Whether a file has the mark of DICOM at byte 128."""
    try:
        with path.open("rb") as file:
            return file.read(_MAGIC_AT + 4)[_MAGIC_AT:] == b"DICM"
    except OSError:
        return False


def scan(path: Path) -> Scan:
    """Read the header of a file; what cannot be read is one frame of nobody, so that decoding says why."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head, _ = _parse(_Clamped(file, size), _HEAD, header_only=True)
        frames = int(head.get("NumberOfFrames") or 1)
        plausible = 1 <= frames <= min(FRAMES_MAX, max(size, 1))
        texts = (str(head.get(name) or "").strip(" \0") for name in ("PatientID", "StudyInstanceUID"))
        return Scan(frames if plausible else 1, *texts)
    except Exception:  # whatever a broken header makes of the parser
        return Scan(1, "", "")


def decode_frame(path: Path, name: str, index: int | None) -> Decoded:
    """Decode one frame; ``name`` stands for the file in messages.

    Args:
        path: The file.
        name: Without patient data.
        index: Frame from 0; None: the file has one.

    Raises:
        DecodeError: Also for files without pixels (reports, plans): ``unsupported``.
    """
    try:
        stat = path.stat()
    except OSError:
        raise DecodeError(f"{name}: the file is gone", reason="missing") from None
    dataset, sha256, torn = _guarded(
        name, lambda: _file(path, name.partition("#")[0], (stat.st_mtime_ns, stat.st_size))
    )
    pixels, intensity = _guarded(name, lambda: _frame(dataset, name, index, torn=torn))
    return Decoded(pixels, _guarded(name, lambda: read_spacing_mm(dataset, index or 0)), sha256, intensity)


@lru_cache(maxsize=1)
def _file(path: Path, name: str, stamp: tuple[int, int]) -> tuple[Any, str, bool]:
    """A parsed file, the sha256 of its bytes, and whether its last element is cut off.

    The last file is kept, since its frames come one by one.
    """
    data = read_bytes(path, name)
    if data[_MAGIC_AT : _MAGIC_AT + 4] != b"DICM":
        raise DecodeError(f"{name}: no DICOM file of part 10: no mark at byte 128")
    dataset, torn = _parse(io.BytesIO(data), _PIXELS, header_only=False, name=name)
    return dataset, hashlib.sha256(data).hexdigest(), torn


def _frame(dataset: Any, name: str, index: int | None, *, torn: bool) -> tuple[Float32[np.ndarray, "C H W"], str]:
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        if "Rows" in dataset or torn:
            raise DecodeError(f"{name}: truncated before its pixels")
        raise DecodeError(f"{name}: DICOM without an image", reason="unsupported")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if index is None and frames != 1:
        raise DecodeError(f"{name}: says that it has {frames} frames", reason="too_large")
    if not 0 <= (index or 0) < frames:
        raise DecodeError(f"{name}: the file has {frames} frames, not the one named")
    rows, columns, samples = int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))
    if rows * columns > PIXELS_MAX:
        raise DecodeError(f"{name}: {columns} x {rows} pixels, at most {PIXELS_MAX}", reason="too_large")
    if rows < 1 or columns < 1:
        raise DecodeError(f"{name}: {columns} x {rows} pixels")
    kind = str(dataset.PhotometricInterpretation)
    if kind not in _KINDS.get(samples, ()):
        raise DecodeError(f"{name}: a colour model or sample format that is not read", reason="unsupported")
    stored = _stored(dataset, name, index or 0, frames)
    if stored.shape != ((rows, columns) if samples == 1 else (rows, columns, 3)):
        raise DecodeError(f"{name}: decodes to another size than the header's")
    return to_pixels(dataset, name, index or 0, stored)


def _stored(dataset: Any, name: str, index: int, frames: int) -> np.ndarray:
    """Stored values [H, W] or [H, W, 3] of one frame, with unused bits cut off."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import get_expected_length

    syntax = str(dataset.file_meta.TransferSyntaxUID)
    options: dict[str, Any] = {"correct_unused_bits": False}  # done below, minding the high bit
    if syntax not in _NATIVE:
        codec = _CODECS.get(syntax)
        if codec is None:
            raise DecodeError(f"{name}: a transfer syntax that is not read", reason="unsupported")
        if codec == "pylibjpeg":
            _refuse_without_codecs(name)
        _check_codestream(dataset, name, index, frames, runs=syntax == "1.2.840.10008.1.2.5")
        options["decoding_plugin"] = codec
    elif "PixelData" in dataset and len(dataset.PixelData) < (needed := get_expected_length(dataset)):
        raise DecodeError(f"{name}: truncated, {len(dataset.PixelData)} of {needed} bytes")
    values = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, index=index, **options)[0]
    if values.dtype.kind == "f":
        return values
    used, high = int(dataset.BitsStored), int(dataset.get("HighBit", int(dataset.BitsStored) - 1))
    width = 8 * values.dtype.itemsize
    if not 1 <= used <= high + 1 <= max(width, 1):
        raise DecodeError(f"{name}: {used} bits stored up to bit {high} of {width}")
    if int(dataset.BitsAllocated) == 1 or used == width:
        return values
    if syntax.startswith(_JPEG):
        high = used - 1  # these codecs put the stored bits lowest; RLE packs the cells as they are
    return (values << (width - 1 - high)) >> (width - used)  # the second shift carries the sign of signed values


def _refuse_without_codecs(name: str) -> None:
    try:
        import libjpeg  # noqa: F401
        import openjpeg  # noqa: F401
    except ImportError:
        raise DecodeError(
            f"{name}: this transfer syntax needs pip install 'mask-what-matters[dicom]'", reason="unsupported"
        ) from None


def _check_codestream(dataset: Any, name: str, index: int, frames: int, *, runs: bool) -> None:
    """Refuse a frame whose own header claims another size than the file's: codecs allocate what it claims."""
    from pydicom.encaps import get_frame

    table = None
    if "ExtendedOffsetTable" in dataset:
        table = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
    frame = get_frame(dataset.PixelData, index, number_of_frames=frames, extended_offsets=table)
    if runs:  # a run of two bytes makes at most 128
        needed = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("SamplesPerPixel", 1))
        if 64 * len(frame) < needed * int(dataset.BitsAllocated) // 8:
            raise DecodeError(f"{name}: truncated, {len(frame)} bytes of runs")
        return
    claimed = codestream_size(frame)
    if claimed is None:
        raise DecodeError(f"{name}: not a JPEG, JPEG-LS or JPEG 2000 codestream")
    if claimed != (int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel", 1))):
        raise DecodeError(f"{name}: its codestream has another size than the header's")


def codestream_size(frame: bytes) -> tuple[int, int, int] | None:
    """Rows, columns and components that a JPEG, JPEG-LS or JPEG 2000 codestream claims; None: it is none."""
    if frame[:4] == b"\xff\x4f\xff\x51" and len(frame) >= 42:
        right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
        return bottom - top, right - left, struct.unpack_from(">H", frame, 40)[0]
    at = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while at + 10 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns, components = struct.unpack_from(">HHB", frame, at + 5)
            return rows, columns, components
        if marker in (0xD9, 0xDA, 0xDE):  # the end, a scan, a hierarchy: before any size
            return None
        at += 1 if marker == 0xFF else 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def _parse(file: Any, keywords: tuple[str, ...], *, header_only: bool, name: str = "") -> tuple[Any, bool]:
    """The named elements of a file, and whether it ends inside one; deflated ones are inflated within bounds."""
    pydicom = _pydicom()
    file.seek(_MAGIC_AT + 4)
    meta = pydicom.filereader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if str(meta.get("TransferSyntaxUID", "")) == _DEFLATED:
        file = io.BytesIO(_plain_head() + _inflate(file, header_only=header_only, name=name))
    file.seek(0)
    tags = [pydicom.datadict.tag_for_keyword(keyword) for keyword in keywords]
    last = max(tags) if header_only else 0xFFFFFFFF
    dataset = pydicom.filereader.read_partial(file, lambda tag, vr, length: tag > last, specific_tags=tags)
    dataset.buffer = None  # would keep a second copy of everything
    return dataset, file.tell() > file.seek(0, io.SEEK_END)


def _inflate(file: Any, *, header_only: bool, name: str) -> bytes:
    packed = file.read()
    limit = _HEAD_BYTES if header_only else min(max(RATIO_FREE_BYTES, RATIO_MAX * len(packed)), FILE_BYTES_MAX)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    data = stream.decompress(packed, limit)
    if not header_only and not stream.eof:
        if stream.unconsumed_tail:
            raise DecodeError(f"{name}: unpacks more than {RATIO_MAX} fold", reason="too_large")
        raise DecodeError(f"{name}: truncated")
    return data


def _plain_head() -> bytes:
    uid = _EXPLICIT.encode() + b"\0"
    return bytes(_MAGIC_AT) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid


class _Clamped:
    """A file that never allocates more than it holds, whatever length an element claims."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._size - self._file.tell())
        return self._file.read(rest if size < 0 else min(size, rest))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@lru_cache(maxsize=1)
def _pydicom() -> Any:
    """pydicom, told to keep the values of tags out of warnings and logs."""
    import pydicom
    import pydicom.filereader

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom\b")
    return pydicom


def _guarded(name: str, decode: Callable[[], T]) -> T:
    """Run a decoder on bytes that nobody vouches for; only the kind of what it raises is told, never its text."""
    try:
        with np.errstate(all="ignore"):  # what overflows becomes infinite, and is then refused as such
            return decode()
    except (DecodeError, MemoryError):
        raise
    except Exception as error:
        raise DecodeError(f"{name}: {type(error).__name__} while decoding") from None
