"""Find images and read one of them: PNG, JPEG, TIFF, DICOM frames, NIfTI slices -> float32 [C, H, W] in [0, 1].

Ids come from the user's list, else from relative paths; they are checked here once and never become paths. DICOM
is named after patients often enough, in files, folders and lists, that its ids are always pseudonyms of those
(`shared.pseudonyms`); so are patients, who become groups. What cannot be read raises `DecodeError` with a stable
reason; its message holds neither absolute paths nor anything from the file.

How each stored form becomes numbers (recorded in `Image.intensity`):

=================================  ========================================================================
8 bit grey (L), 1 bit              value / 255, one channel (1 bit: 0 or 1)
8 bit RGB, YCbCr, CMYK, palette    RGB / 255, three channels (CMYK by Pillow's arithmetic, no colour profile)
with alpha (LA, RGBA, palettes)    composited over black, then as without alpha
16 bit, 32 bit, float, any NIfTI   0.5 to 99.5 percentile of the sample (NIfTI: of the volume) to [0, 1],
                                   clipped; where the two coincide, minimum to maximum
DICOM                              modality, then VOI lookup table or window, see `shared.dicom`
constant                           kept and flagged ``degenerate``: 8 bit at its value, else zeros
=================================  ========================================================================

EXIF and TIFF orientation are applied. Files of several pages or time points are refused, never cut to the first.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Float32

from shared import dicom
from shared.decode import count_slices, decode_raster, decode_slice
from shared.errors import InputMissingError, UsageError
from shared.orientation import Grid
from shared.pseudonyms import pseudonym

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".nii", ".nii.gz", *dicom.SUFFIXES)
ID_BYTES_MAX = 128
_COLUMNS = ("image", "group", "patient")
"""And ``sample_id``; other columns of a list are the user's own."""
_VOLUMES = (".nii", ".nii.gz")
_DICOM = ("", *dicom.SUFFIXES)
"""A file that is read although its name says nothing has the mark of DICOM."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one sample comes from.

    Attributes:
        sample_id: The user's id, else the path relative to the corpus; of DICOM the pseudonym of that. NIfTI slices
            end in ``#z0042``, DICOM frames of several in ``#f0003``.
        path: The file. Like ``known_as`` it may name a patient, so neither is shown where a source is printed.
        slice_index: Axial slice of a NIfTI volume after RAS+ canonicalisation, counted from below; frame of a
            DICOM file that has several, counted from 0; else None.
        group: What must stay on one side of a split: the list's group, else the pseudonym of the patient that the
            list names, else of DICOM's patient (or study).
        known_as: What the user calls it where that is not the sample id: for joining tables, never published.
    """

    sample_id: str
    path: Path = field(repr=False)
    slice_index: int | None = None
    group: str | None = None
    known_as: str | None = field(default=None, repr=False)


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
        grid: Of a NIfTI volume, as stored: what an export needs to lie on the original (`shared.orientation`).
    """

    pixels: Float32[np.ndarray, "C H W"]
    spacing_mm: tuple[float, float] | None
    source_sha256: str
    pixel_sha256: str
    intensity: str
    degenerate: bool
    grid: Grid | None = None


def find_sources(root: Path) -> list[Source]:
    """List the samples of a folder (recursively) or of a CSV or JSONL list, sorted by sample id.

    A list has a column ``image`` (relative to the list's folder) and optionally ``sample_id``, ``group`` and
    ``patient``. Groups are published as they stand; a patient becomes the group by a pseudonym, where there is no
    group. In a folder, names that begin with a dot, DICOMDIR and other file types are passed over; DICOM is also
    found without a suffix, by its mark.

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
    scans = {source.path: dicom.scan(source.path) for source in found if _suffix(source.path.name) in _DICOM}
    sources = [piece for source in _grouped(found, scans) for piece in _slices(source, scans)]
    _refuse_ids(sources)
    return sorted(sources, key=lambda source: source.sample_id)


def read_image(source: Source) -> Image:
    """Decode one sample.

    Returns:
        The image; constant ones come back flagged, never divided by zero.

    Raises:
        DecodeError: Reason ``decode_failed``, ``too_large``, ``nonfinite``, ``unsupported`` or ``missing``.
    """
    suffix = _suffix(source.path.name)
    if suffix in _VOLUMES:
        decoded = decode_slice(source.path, source.sample_id, source.slice_index)
    elif suffix in _DICOM:
        decoded = dicom.decode_frame(source.path, source.sample_id, source.slice_index)
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
        grid=decoded.grid,
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
            path = Path(folder, name)
            if name.startswith(".") or (name in names and not _suffix(name) and not _unnamed_dicom(path)):
                continue
            if path.is_symlink():
                _refuse_escape(path, home, "a folder" if name in links else _shown(path))
            if name in names:
                yield _source(path, path.relative_to(root).as_posix())


def _unnamed_dicom(path: Path) -> bool:
    return path.name.upper() != "DICOMDIR" and dicom.is_dicom(path)


def _source(path: Path, name: str, group: str | None = None) -> Source:
    """A file, known by its name or the user's id."""
    name = unicodedata.normalize("NFC", name)
    if _suffix(path.name) in _DICOM:
        return Source(pseudonym("dicom", name), path, None, group, name)
    return Source(name, path, None, group)


def _listed(table: Path) -> Iterator[Source]:
    home = table.parent.resolve()
    inside: set[Path] = set()
    ids: dict[str, int] = {}
    patients: dict[str, tuple[str, int]] = {}
    for number, row in _rows(table):
        image = row.get("image")
        where = f"{table}, row {number}"
        if not isinstance(image, str) or not image:
            raise UsageError(f"{where}: no value in column 'image'")
        suffix = _suffix(image)
        shown = "image" if suffix in _DICOM else f"image {image!a}"  # as in `_shown`
        path = table.parent / image
        if PurePosixPath(image).is_absolute() or "\0" in image or ".." in PurePosixPath(image).parts:
            raise UsageError(f"{where}: {shown} is not a path inside the list's folder")
        if not suffix and path.is_file() and not dicom.is_dicom(path):
            raise UsageError(f"{where}: {shown} is none of {', '.join(s[1:] for s in SUFFIXES)}")
        if not path.is_file():
            raise InputMissingError(f"{where}: {shown} does not exist")
        # Of a million files few folders: each is resolved once, and a file only where it is a link itself.
        if path.is_symlink():
            _refuse_escape(path, home, shown)
        elif path.parent not in inside:
            _refuse_escape(path.parent, home, shown)
            inside.add(path.parent)
        given = _cell(row, "sample_id", where) or PurePosixPath(image).as_posix()
        first = ids.setdefault(given, number)
        if first != number and suffix in _DICOM:
            raise UsageError(f"{table}: rows {first} and {number} have the same id")
        group, patient = (_cell(row, name, where).strip() for name in ("group", "patient"))
        if patient:
            group = group or pseudonym("patient", patient)
            other, line = patients.setdefault(patient, (group, number))
            if other != group:
                raise UsageError(
                    f"{table}: rows {line} and {number} put one patient into two groups",
                    hint="fill in 'group' for all rows of a patient, or for none: without it the patient is the group",
                )
        yield _source(path, given, group or None)


def _cell(row: Mapping[str, object], name: str, where: str) -> str:
    """A value as text; whole numbers stand for themselves, everything else that JSON knows is refused."""
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UsageError(f"{where}: '{name}' is a {type(value).__name__}, expected text or a whole number")


def _check_columns(names: Sequence[str], where: str) -> None:
    """Refuse a column given twice, and one that is almost one of ours: a group by another name would be lost."""
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{where}: column '{name}' is given twice")
        near = name.lower().strip().replace("_", "").replace(" ", "").replace("-", "")
        meant = {"sampleid": "sample_id", **{known + end: known for known in _COLUMNS for end in ("", "s", "id")}}
        if name not in (*_COLUMNS, "sample_id") and near in meant:
            raise UsageError(f"{where}: unknown column '{name}'", hint=f"did you mean '{meant[near]}'? Rename it")


def _rows(table: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows of a list with their line numbers (the header of a CSV is line 1)."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"images {table}: expected UTF-8 text, CSV or JSONL") from None
    if table.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError:
                raise UsageError(f"{table}, row {number}: not JSON") from None
            if isinstance(row, dict):
                _check_columns([*row], f"{table}, row {number}")
                yield number, row
            elif row is not None:
                raise UsageError(f"{table}, row {number}: expected a JSON object")
        return
    if table.suffix.lower() != ".csv":
        raise UsageError(f"images {table}: a list ends in .csv or .jsonl")
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="")
    reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or ()]
    if "image" not in columns:
        raise UsageError(f"images {table}: no column 'image'; found {', '.join(columns) or 'nothing'}")
    _check_columns(columns, f"images {table}")
    for row in reader:
        if any(row.get("", ())):
            raise UsageError(f"{table}, row {reader.line_num}: more cells than columns")
        yield reader.line_num, {name: value for name, value in row.items() if name}


def _grouped(sources: Sequence[Source], scans: Mapping[Path, dicom.Scan]) -> Iterator[Source]:
    """DICOM without a group gets its patient, else whom other files of its study name, else its study."""
    nobody = dicom.Scan(1, "", "")
    named, owners = [], defaultdict(set)
    for source in sources:
        scan = scans.get(source.path, nobody)
        if source.group is None and scan.patient:
            source = replace(source, group=pseudonym("patient", scan.patient))
        if source.group is not None:
            owners[scan.study].add(source.group)
        named.append((source, scan.study))
    torn = sum(source.group is None and study != "" and len(owners[study]) > 1 for source, study in named)
    if torn:
        raise UsageError(
            f"DICOM files that name no patient, in a study whose other files name several: {torn}",
            hint="give a list with a column 'patient' or 'group'",
        )
    for source, study in named:
        if source.group is None and study:
            source = replace(source, group=next(iter(owners[study] or {pseudonym("study", study)})))
        yield source


def _slices(source: Source, scans: Mapping[Path, dicom.Scan]) -> Iterator[Source]:
    if source.path in scans:
        yield from _frames(source, scans[source.path].frames)
        return
    count = count_slices(source.path) if _suffix(source.path.name) in _VOLUMES else None
    if count is None:  # one image; or unreadable: one sample, so that it is quarantined and counted, not lost
        yield source
        return
    for index in range(count):
        yield Source(f"{source.sample_id}#z{index:04d}", source.path, index, source.group or source.sample_id)


def _frames(source: Source, count: int) -> Iterator[Source]:
    if count == 1:
        yield source
        return
    for index in range(count):
        yield Source(
            f"{source.sample_id}#f{index:04d}",
            source.path,
            index,
            source.group or source.sample_id,
            f"{source.known_as}#f{index:04d}",
        )


def _shown(path: Path) -> str:
    """A file in a message: DICOM may be named after a patient."""
    return "a DICOM file" if _suffix(path.name) in _DICOM else ascii(str(path))


def _refuse_escape(path: Path, home: Path, shown: str) -> None:
    if not path.resolve().is_relative_to(home):
        raise UsageError(
            f"{shown}: a symbolic link out of the corpus is refused",
            hint="copy what it points to instead; 'find FOLDER -type l' lists links",
        )


def _refuse_ids(sources: list[Source]) -> None:
    problems = []
    seen: dict[str, Source] = {}
    for source in sources:
        fault = _id_fault(source.sample_id)
        if fault:
            problems.append(f"sample id {source.sample_id!a} of {_shown(source.path)}: {fault}")
            continue
        other = seen.setdefault(unicodedata.normalize("NFC", source.sample_id.casefold()), source)
        if other is not source:
            same = "the same id" if other.sample_id == source.sample_id else "ids that look alike"
            problems.append(
                f"{_shown(other.path)} and {_shown(source.path)} have {same}: "
                f"{other.sample_id!a} and {source.sample_id!a}"
            )
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(
            "; ".join(problems[:5]) + more, hint="a list with a column 'sample_id' gives each image an id of its own"
        )


def _id_fault(sample_id: str) -> str | None:
    try:
        size = len(sample_id.encode())
    except UnicodeEncodeError:
        return "not UTF-8"
    if size > ID_BYTES_MAX:
        return f"{size} bytes, at most {ID_BYTES_MAX} are allowed"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in sample_id):
        return "holds a control or invisible character"
    if not sample_id.strip():
        return "blank"
    if sample_id.startswith("/") or any(part in ("", ".", "..") for part in sample_id.split("/")):
        return "must be relative, without empty, '.' or '..' parts"
    return None
