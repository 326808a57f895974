"""DICOM files made by hand, and those that pydicom brings along."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
CT = UID("1.2.840.10008.5.1.4.1.1.2")


def write_dicom(
    path: Path,
    values: np.ndarray,
    *,
    syntax: UID = ExplicitVRLittleEndian,
    photometric: str = "MONOCHROME2",
    **tags: Any,
) -> Path:
    """A file with ``values`` [H, W], [F, H, W] or [H, W, 3] of an integer type as its pixels.

    Args:
        path: Where.
        values: Stored values.
        syntax: Uncompressed or deflated.
        photometric: Photometric interpretation.
        tags: Any other elements by keyword; None leaves one of the usual ones out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = values.ndim == 3 and values.shape[2] == 3
    bits = 8 * values.dtype.itemsize
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CT, "1.2.3.4"
    dataset.PatientID, dataset.StudyInstanceUID = "P1", "1.2.3"
    dataset.Rows, dataset.Columns = values.shape[:2] if colour or values.ndim == 2 else values.shape[1:]
    if values.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(values)
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    order = "<" if syntax.is_little_endian else ">"
    dataset.PixelData = values.astype(values.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"
    for keyword, value in tags.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = CT, "1.2.3.4"
    dataset.save_as(path, enforce_file_format=True)
    return path


def item(**tags: Any) -> Dataset:
    """An item of a sequence."""
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def table(entries: list[int], first: int, bits: int) -> Dataset:
    """A lookup table, as modality and VOI sequences hold them."""
    made = item(LUTDescriptor=[len(entries) % 65536, first, bits], LUTData=entries)
    made["LUTDescriptor"].VR = made["LUTData"].VR = "US"
    return made
