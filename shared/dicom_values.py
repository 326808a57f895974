"""From the stored values of a DICOM frame to pixels in [0, 1], after PS3.3. Called by `shared.dicom` only.

1. Modality: its lookup table, else slope and intercept (of the frame in enhanced files).
2. VOI: the first lookup table, else the first window (LINEAR, LINEAR_EXACT or SIGMOID), to [0, 1]; further ones are
   alternatives for a viewer. Without any: up to 8 bits and no modality transform, value / (2^bits - 1); otherwise
   the percentiles of `shared.decode.rescale`, of this frame.
3. MONOCHROME1 is inverted. RGB, YBR and PALETTE COLOR become RGB over their largest value.

Spacing is PixelSpacing, else ImagerPixelSpacing (at the detector, not corrected for magnification). Overlays,
presentation states, ICC profiles and pixel padding are not applied.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from shared.decode import rescale
from shared.errors import DecodeError

COLOURS = ("Red", "Green", "Blue")
_ENTRIES_MAX = 1 << 16


def to_pixels(dataset: Any, name: str, index: int, stored: np.ndarray) -> tuple[Float32[np.ndarray, "C H W"], str]:
    """Pixels of a frame, and the rule that made them.

    Args:
        dataset: A pydicom dataset.
        name: Stands for the file in messages.
        index: The frame, from 0.
        stored: [H, W], or [H, W, 3] in RGB.

    Raises:
        DecodeError: Reason ``unsupported``, ``nonfinite`` or ``decode_failed``.
    """
    bits = int(dataset.BitsStored) if stored.dtype.kind in "iu" else 0
    if stored.ndim == 3:
        return _over(np.moveaxis(stored, -1, 0), bits), f"uint{bits}/{2**bits - 1}"
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        whole = stored.astype(np.int64)
        signed = stored.dtype.kind == "i"
        colours = [_over(*_palette(dataset, name, colour, whole, signed=signed)) for colour in COLOURS]
        return np.stack(colours), "palette"
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    values, rule = _grey(dataset, name, index, stored, inverted=inverted)
    return values[None], rule + ("; inverted" if inverted else "")


def read_spacing_mm(dataset: Any, index: int) -> tuple[float, float] | None:
    """Spacing of rows and columns, rounded to 1e-6 mm; None where the file has none that makes sense."""
    place = _place(dataset, index, "PixelMeasuresSequence", "PixelSpacing")
    found = place.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    try:
        rows, columns = (round(float(mm), 6) for mm in found or ())
    except (TypeError, ValueError):
        return None
    return (rows, columns) if 0 < rows < math.inf and 0 < columns < math.inf else None


def window(
    values: Float32[np.ndarray, "*S"] | np.ndarray, centre: float, width: float, function: str = "LINEAR"
) -> Float32[np.ndarray, "*S"]:
    """Map a window to [0, 1] (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    >>> window(np.array([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0]), 2, 4).round(3).tolist()
    [0.0, 0.0, 0.333, 0.667, 1.0, 1.0]
    >>> window(np.array([0.0, 2.0, 4.0]), 2, 4, "LINEAR_EXACT").tolist()
    [0.0, 0.5, 1.0]
    """
    if function == "SIGMOID":
        scaled = 1 / (1 + np.exp(-4 * (values - centre) / width))
    elif function == "LINEAR_EXACT":
        scaled = (values - centre) / width + 0.5
    elif width == 1:
        scaled = np.where(values <= centre - 0.5, 0.0, 1.0)
    else:
        scaled = (values - (centre - 0.5)) / (width - 1) + 0.5
    return scaled.clip(0, 1).astype(np.float32)


def _grey(
    dataset: Any, name: str, index: int, stored: np.ndarray, *, inverted: bool
) -> tuple[Float32[np.ndarray, "H W"], str]:
    values, rule = _modality(dataset, name, index, stored)
    if not np.isfinite(values).all():
        raise DecodeError(f"{name}: holds NaN or infinite values", reason="nonfinite")
    voi = _place(dataset, index, "FrameVOILUTSequence", "WindowCenter")
    if dataset.get("VOILUTSequence"):
        signed = _below_zero(dataset, name, index, stored)
        table, bits = _table(dataset, name, dataset.VOILUTSequence[0], np.rint(values).astype(np.int64), signed=signed)
        mapped, rule = _over(table, bits), f"{rule}VOI table"
    elif _holds(voi, "WindowCenter") and _holds(voi, "WindowWidth"):
        centre, width = _first(voi.WindowCenter), _first(voi.WindowWidth)
        function = str(voi.get("VOILUTFunction") or "LINEAR")
        if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
            raise DecodeError(f"{name}: a VOI function that is not read", reason="unsupported")
        if not (math.isfinite(centre) and math.isfinite(width) and width >= (1 if function == "LINEAR" else 1e-9)):
            raise DecodeError(f"{name}: a window without width")
        mapped, rule = window(values, centre, width, function), f"{rule}window {centre!r}/{width!r} {function}"
    elif stored.dtype.kind == "u" and int(dataset.BitsStored) <= 8 and not rule:
        bits = int(dataset.BitsStored)
        mapped, rule = _over(stored, bits), f"uint{bits}/{2**bits - 1}"
    else:
        scaled, how = rescale((-values if inverted else values).astype(np.float32), "sample", name)
        return scaled, rule + how
    return (np.float32(1) - mapped if inverted else mapped), rule


def _modality(dataset: Any, name: str, index: int, stored: np.ndarray) -> tuple[np.ndarray, str]:
    if dataset.get("ModalityLUTSequence"):
        signed = stored.dtype.kind != "u"
        table, _ = _table(dataset, name, dataset.ModalityLUTSequence[0], stored.astype(np.int64), signed=signed)
        return table.astype(np.float64), "modality table; "
    place = _place(dataset, index, "PixelValueTransformationSequence", "RescaleSlope")
    if _holds(place, "RescaleSlope") and _holds(place, "RescaleIntercept"):
        slope, intercept = float(place.RescaleSlope), float(place.RescaleIntercept)
        if (slope, intercept) != (1, 0):
            return stored * slope + intercept, f"modality x {slope!r} + {intercept!r}; "
    return stored.astype(np.float64), ""


def _below_zero(dataset: Any, name: str, index: int, stored: np.ndarray) -> bool:
    """Whether the modality can make a negative value of any that the file could store, whatever this frame holds."""
    if stored.dtype.kind == "f":
        return True
    bits = int(dataset.BitsStored)
    lowest = -(1 << (bits - 1)) if stored.dtype.kind == "i" else 0
    ends = np.array([lowest, lowest + (1 << bits) - 1])
    return bool(_modality(dataset, name, index, ends)[0].min() < 0)


def _table(
    dataset: Any, name: str, item: Any, values: Int64[np.ndarray, "H W"], *, signed: bool
) -> tuple[np.ndarray, int]:
    """Look values up in the table of a sequence item; entries and their bits."""
    return _look_up(dataset, name, item.LUTDescriptor, item.LUTData, values, signed=signed)


def _palette(
    dataset: Any, name: str, colour: str, values: Int64[np.ndarray, "H W"], *, signed: bool
) -> tuple[np.ndarray, int]:
    descriptor = dataset[f"{colour}PaletteColorLookupTableDescriptor"].value
    segmented = dataset.get(f"Segmented{colour}PaletteColorLookupTableData")
    if not segmented:
        data = dataset[f"{colour}PaletteColorLookupTableData"].value
    else:
        data = _expand(_words(dataset, segmented, 1 if int(descriptor[2]) == 8 else 2), name)
    return _look_up(dataset, name, descriptor, data, values, signed=signed)


def _look_up(
    dataset: Any, name: str, descriptor: Any, data: Any, values: Int64[np.ndarray, "H W"], *, signed: bool
) -> tuple[np.ndarray, int]:
    entries, first, bits = (int(number) for number in descriptor)
    entries = entries or _ENTRIES_MAX
    if first >= 1 << 15 and signed:  # written as unsigned, meant as signed
        first -= 1 << 16
    if isinstance(data, bytes):
        data = _words(dataset, data, 2 if len(data) >= 2 * entries else 1)
    table = np.atleast_1d(np.asarray(data, np.int64))
    if not 8 <= bits <= 16 or len(table) < entries:
        raise DecodeError(f"{name}: a lookup table that is too short")
    return table[np.clip(values - first, 0, entries - 1)], bits


def _words(dataset: Any, data: bytes, size: int) -> np.ndarray:
    little = dataset.original_encoding[1]
    return np.frombuffer(data[: len(data) // size * size], f"{'<' if little else '>'}u{size}")


def _expand(words: np.ndarray, name: str) -> list[int]:
    """A segmented palette (PS3.3 C.7.9.2): runs of given values, and straight lines from the value before."""
    expanded: list[int] = []
    at = 0
    while at + 1 < len(words):
        kind, count = int(words[at]), int(words[at + 1])
        if kind not in (0, 1) or len(expanded) + count > _ENTRIES_MAX:
            raise DecodeError(f"{name}: a segmented palette that is not read", reason="unsupported")
        if kind == 0:
            expanded += [int(word) for word in words[at + 2 : at + 2 + count]]
            at += 2 + count
        else:
            before, goal = expanded[-1], int(words[at + 2])
            expanded += [round(before + (goal - before) * step / count) for step in range(1, count + 1)]
            at += 3
    return expanded


def _place(dataset: Any, index: int, macro: str, keyword: str) -> Any:
    """Where an attribute of a frame stands: in its functional groups, the shared ones, else in the file itself."""
    of_frame, shared = dataset.get("PerFrameFunctionalGroupsSequence"), dataset.get("SharedFunctionalGroupsSequence")
    for items, place in ((of_frame, index), (shared, 0)):
        if items and len(items) > place and items[place].get(macro) and _holds(items[place][macro][0], keyword):
            return items[place][macro][0]
    return dataset


def _holds(dataset: Any, keyword: str) -> bool:
    return dataset.get(keyword) not in (None, "")  # elements without a value are common


def _first(value: Any) -> float:
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _over(values: np.ndarray, bits: int) -> Float32[np.ndarray, "*S"]:
    return (values.astype(np.float32) / np.float32(2.0**bits - 1)).clip(0, 1)
