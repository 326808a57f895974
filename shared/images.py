"""Find images and read one of them: PNG, JPEG, TIFF, NIfTI slices -> float32 [C, H, W] in [0, 1].

Ids come from the user's list, else from relative paths; they are checked here once and never become paths.
What cannot be read raises `DecodeError` with a stable reason; its message holds neither absolute paths nor
anything from the file.

How each stored form becomes numbers (recorded in `Image.intensity`):

=================================  ========================================================================
8 bit grey (L), 1 bit              value / 255, one channel (1 bit: 0 or 1)
8 bit RGB, YCbCr, CMYK, palette    RGB / 255, three channels (CMYK by Pillow's arithmetic, no colour profile)
with alpha (LA, RGBA, palettes)    composited over black, then as without alpha
16 bit, 32 bit, float, any NIfTI   0.5 to 99.5 percentile of the sample (NIfTI: of the volume) to [0, 1],
                                   clipped; where the two coincide, minimum to maximum
constant                           kept and flagged ``degenerate``: 8 bit at its value, else zeros
=================================  ========================================================================

EXIF and TIFF orientation are applied. Files of several pages or time points are refused, never cut to the first.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32

from shared.decode import count_slices, decode_raster, decode_slice
from shared.errors import InputMissingError, UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".nii", ".nii.gz")
ID_BYTES_MAX = 128


@dataclass(frozen=True)
class Source:
    """Where one sample comes from.

    Attributes:
        sample_id: The user's id, else the path relative to the corpus; NIfTI slices end in ``#z0042``.
        path: The file.
        slice_index: Axial slice of a NIfTI volume after RAS+ canonicalisation, counted from below; else None.
        group: What must stay on one side of a split (a patient), if the list says so.
    """

    sample_id: str
    path: Path
    slice_index: int | None = None
    group: str | None = None


@dataclass(frozen=True)
class Image:
    """One decoded sample.

    Attributes:
        pixels: [C, H, W] in [0, 1], C 1 (grey) or 3 (RGB), upright. NIfTI slices: rows run from anterior to
            posterior, columns from the patient's left to right.
        spacing_mm: Row and column spacing, where the format carries it.
        source_sha256: Of the file's bytes.
        pixel_sha256: Of ``pixels``: its shape and little-endian bytes.
        intensity: The rule that mapped stored values to [0, 1].
        degenerate: All pixels are equal.
    """

    pixels: Float32[np.ndarray, "C H W"]
    spacing_mm: tuple[float, float] | None
    source_sha256: str
    pixel_sha256: str
    intensity: str
    degenerate: bool


def find_sources(root: Path) -> list[Source]:
    """List the samples of a folder (recursively) or of a CSV or JSONL list, sorted by sample id.

    A list has a column ``image`` (relative to the list's folder) and optionally ``sample_id`` and ``group``.
    In a folder, names that begin with a dot and other file types are passed over.

    Args:
        root: The folder, or the list.

    Returns:
        At least one source; ids are unique, also after NFC and case folding.

    Raises:
        InputMissingError: No such folder or list.
        UsageError: Nothing found; an id or path that is refused (names every culprit, at most five).
    """
    if root.is_dir():
        found = list(_walk(root))
        what = f"images {root}: no {', '.join(suffix[1:] for suffix in SUFFIXES)} file in it"
    elif root.is_file():
        found = list(_listed(root))
        what = f"images {root}: the list has no rows"
    else:
        raise InputMissingError(f"images {root}: no such folder or list")
    if not found:
        raise UsageError(what, hint="--images takes a folder of images, or a CSV or JSONL list with a column 'image'")
    _refuse_ids(found)
    sources = [piece for source in found for piece in _slices(source)]
    _refuse_ids(sources)
    return sorted(sources, key=lambda source: source.sample_id)


def read_image(source: Source) -> Image:
    """Decode one sample.

    Returns:
        The image; constant ones come back flagged, never divided by zero.

    Raises:
        DecodeError: Reason ``decode_failed``, ``too_large``, ``nonfinite``, ``unsupported`` or ``missing``.
    """
    if _suffix(source.path.name) in (".nii", ".nii.gz"):
        decoded = decode_slice(source.path, source.sample_id, source.slice_index)
    else:
        decoded = decode_raster(source.path, source.sample_id)
    pixels = np.ascontiguousarray(decoded.pixels, dtype="<f4")
    return Image(
        pixels=pixels,
        spacing_mm=decoded.spacing_mm,
        source_sha256=decoded.source_sha256,
        pixel_sha256=pixel_sha256(pixels),
        intensity=decoded.intensity,
        degenerate=bool(pixels.min() == pixels.max()),
    )


def pixel_sha256(pixels: Float32[np.ndarray, "C H W"]) -> str:
    """Digest of decoded pixels: sha256 over ``float32[C, H, W]`` and the little-endian bytes."""
    digest = hashlib.sha256(f"float32{list(pixels.shape)}".encode())
    digest.update(np.ascontiguousarray(pixels, dtype="<f4").data)
    return digest.hexdigest()


def _suffix(name: str) -> str:
    lowered = name.lower()
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if lowered.endswith(suffix)), "")


def _walk(root: Path) -> Iterator[Source]:
    home = root.resolve()
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in [*links, *sorted(names)]:
            if name.startswith(".") or (name in names and not _suffix(name)):
                continue
            path = Path(folder, name)
            if path.is_symlink():
                _refuse_escape(path, home)
            if name in names:
                yield Source(unicodedata.normalize("NFC", path.relative_to(root).as_posix()), path)


def _listed(table: Path) -> Iterator[Source]:
    home = table.parent.resolve()
    for number, row in _rows(table):
        image = row.get("image")
        where = f"{table}, row {number}"
        if not isinstance(image, str) or not image:
            raise UsageError(f"{where}: no value in column 'image'")
        path = table.parent / image
        if PurePosixPath(image).is_absolute() or "\0" in image or ".." in PurePosixPath(image).parts:
            raise UsageError(f"{where}: image {image!a} is not a path inside the list's folder")
        if not _suffix(path.name):
            raise UsageError(f"{where}: image {image!a} is none of {', '.join(s[1:] for s in SUFFIXES)}")
        if not path.is_file():
            raise InputMissingError(f"{where}: image {image!a} does not exist")
        _refuse_escape(path, home)
        sample_id = row.get("sample_id") or PurePosixPath(image).as_posix()
        group = row.get("group")
        yield Source(unicodedata.normalize("NFC", str(sample_id)), path, None, str(group) if group else None)


def _rows(table: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows of a list with their line numbers (the header of a CSV is line 1)."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"images {table}: expected UTF-8 text, CSV or JSONL") from None
    if table.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError:
                raise UsageError(f"{table}, row {number}: not JSON") from None
            if isinstance(row, dict):
                yield number, row
            elif row is not None:
                raise UsageError(f"{table}, row {number}: expected a JSON object")
        return
    if table.suffix.lower() != ".csv":
        raise UsageError(f"images {table}: a list ends in .csv or .jsonl")
    reader = csv.DictReader(text.splitlines())
    if "image" not in (reader.fieldnames or ()):
        raise UsageError(f"images {table}: no column 'image'; found {', '.join(reader.fieldnames or ()) or 'nothing'}")
    for row in reader:
        yield reader.line_num, dict(row)


def _slices(source: Source) -> Iterator[Source]:
    if _suffix(source.path.name) not in (".nii", ".nii.gz"):
        yield source
        return
    count = count_slices(source.path)
    if count is None:  # unreadable: one sample, so that it is quarantined and counted, not lost
        yield source
        return
    for index in range(count):
        yield Source(f"{source.sample_id}#z{index:04d}", source.path, index, source.group or source.sample_id)


def _refuse_escape(path: Path, home: Path) -> None:
    if not path.resolve().is_relative_to(home):
        raise UsageError(f"{path}: a symbolic link out of the corpus is refused", hint="copy the file instead")


def _refuse_ids(sources: list[Source]) -> None:
    problems = []
    seen: dict[str, Source] = {}
    for source in sources:
        fault = _id_fault(source.sample_id)
        if fault:
            problems.append(f"sample id {source.sample_id!a} of {str(source.path)!a}: {fault}")
            continue
        other = seen.setdefault(unicodedata.normalize("NFC", source.sample_id.casefold()), source)
        if other is not source:
            same = "the same id" if other.sample_id == source.sample_id else "ids that look alike"
            problems.append(
                f"{str(other.path)!a} and {str(source.path)!a} have {same}: "
                f"{other.sample_id!a} and {source.sample_id!a}"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError("; ".join(problems[:5]) + more, hint="give ids in a list with a column 'sample_id'")


def _id_fault(sample_id: str) -> str | None:
    try:
        size = len(sample_id.encode())
    except UnicodeEncodeError:
        return "not UTF-8"
    if size > ID_BYTES_MAX:
        return f"{size} bytes, at most {ID_BYTES_MAX} are allowed"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in sample_id):
        return "holds a control or invisible character"
    if sample_id.startswith("/") or any(part in ("", ".", "..") for part in sample_id.split("/")):
        return "must be relative, without empty, '.' or '..' parts"
    return None
