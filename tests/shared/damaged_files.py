"""Ten thousand damaged files, and a process that reads them: used by `test_fuzz`.

Run as a program it prints two JSON lines a file: its seed and format before it is read, so that whoever started the
program can name the file that ended it, and what became of it.
"""

import faulthandler
import gzip
import io
import json
import random
import resource
import sys
from pathlib import Path

import nibabel
import numpy as np
import tifffile
from PIL import Image as Pillow

from shared.errors import DecodeError, UsageError
from shared.forecast import peak_bytes
from shared.images import find_sources, read_image
from tests.shared.dicom_files import SAMPLES, table, write_dicom

MEMORY_BYTES = 4 << 30
HANG_S = 20
SAMPLES_READ = 3

DICOM_FILES = {
    "implicit": "MR_small_implicit.dcm",
    "explicit": "MR_small.dcm",
    "big endian": "MR_small_bigendian.dcm",
    "deflated": "image_dfl.dcm",
    "run length": "SC_rgb_rle_16bit_2frame.dcm",
    "jpeg": "SC_rgb_dcmtk_+eb+cy+np.dcm",
    "jpeg 12 bit": "JPGExtended.dcm",
    "jpeg lossless": "SC_rgb_jpeg_gdcm.dcm",
    "jpeg-ls": "JPEGLSNearLossless_16.dcm",
    "jpeg-ls colour": "SC_rgb_jls_lossy_line.dcm",
    "jpeg 2000": "MR_small_jp2klossless.dcm",
    "jpeg 2000 lossy": "JPEG2000.dcm",
    "frames": "rtdose.dcm",
    "report": "test-SR.dcm",
}
TABLES = {
    "VOILUTSequence": [table([0, 9, 40, 255], 100, 8)],
    "ModalityLUTSequence": [table([1, 2, 300, 4000], 0, 16)],
}
PALETTE = {
    f"{colour}PaletteColorLookupTable{part}": value
    for colour in ("Red", "Green", "Blue")
    for part, value in (("Descriptor", [256, 0, 16]), ("Data", bytes(range(256)) * 2))
}


def originals(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Small sound files: name -> suffix and bytes; ``folder`` is for scratch."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (20, 24), np.uint8)
    deep = rng.integers(0, 4096, (20, 24)).astype(np.uint16)
    colour = rng.integers(0, 255, (20, 24, 3), np.uint8)
    found = {
        "png grey": (".png", _saved(Pillow.fromarray(grey), "PNG")),
        "png 16 bit": (".png", _saved(Pillow.fromarray(deep), "PNG")),
        "png palette": (".png", _saved(Pillow.fromarray(colour).quantize(16), "PNG")),
        "png colour": (".png", _saved(Pillow.fromarray(np.dstack([colour, grey])), "PNG")),
        "jpeg grey": (".jpg", _saved(Pillow.fromarray(grey), "JPEG")),
        "jpeg colour": (".jpg", _saved(Pillow.fromarray(colour), "JPEG", progressive=True)),
        "tiff grey": (".tif", _saved(Pillow.fromarray(grey), "TIFF", compression="tiff_lzw")),
        "tiff jpeg": (".tif", _saved(Pillow.fromarray(colour), "TIFF", compression="jpeg")),
        "tiff group 4": (".tif", _saved(Pillow.fromarray(grey).convert("1"), "TIFF", compression="group4")),
        "tiff 16 bit": (".tif", _tiff(deep, compression="zlib", tile=(16, 16))),
        "tiff float": (".tif", _tiff(deep.astype(np.float32), bigtiff=True)),
    }
    volume = nibabel.Nifti1Image(rng.integers(0, 900, (6, 7, 5)).astype(np.int16), np.diag([1, 2, 3, 1]))
    found["nifti"] = (".nii", volume.to_bytes())
    found["nifti gzip"] = (".nii.gz", gzip.compress(volume.to_bytes(), mtime=0))
    found["nifti-2"] = (".nii", nibabel.Nifti2Image(np.ones((4, 4, 3), np.float32), np.eye(4)).to_bytes())
    for name, file in DICOM_FILES.items():
        found[f"dicom {name}"] = (".dcm", (SAMPLES / file).read_bytes())
    scratch = folder / "scratch.dcm"
    found["dicom tables"] = (".dcm", write_dicom(scratch, deep, **TABLES).read_bytes())
    found["dicom palette"] = (".dcm", write_dicom(scratch, grey, photometric="PALETTE COLOR", **PALETTE).read_bytes())
    found["dicom unnamed"] = ("", write_dicom(scratch, deep, WindowCenter=2048, WindowWidth=4096).read_bytes())
    return found


def damage(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to three wounds of a kind that disks, networks and people make."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not raw:
            break
        # A third of the wounds fall on the first bytes, where the headers are, a third on the later half.
        first, end = rng.choice(((0, min(len(raw), 700)), (0, len(raw)), (len(raw) // 2, len(raw))))
        at = rng.randrange(first, end)
        match rng.randrange(7):
            case 0:
                del raw[at:]
            case 1:
                raw[at] ^= 1 << rng.randrange(8)
            case 2:
                raw[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))
            case 3:
                raw[at : at + rng.randint(1, 64)] = bytes([rng.choice((0, 255))]) * rng.randint(1, 64)
            case 4:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                raw[at:] = other[start : start + len(raw)]
            case 5:
                number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFE))
                raw[at : at + 4] = number.to_bytes(4, rng.choice(("little", "big")))
            case _:
                del raw[at : at + rng.randint(1, 32)]
    return bytes(raw)


def outcome(path: Path) -> str:
    """``decoded``, or the reason of the refusal."""
    found = []
    try:
        sources = find_sources(path.parent)
    except UsageError:  # a file without suffix that has lost the mark of DICOM
        return "passed over"
    for source in _some(sources):
        try:
            pixels = read_image(source).pixels
        except DecodeError as error:
            found.append("leak" if str(path.parent) in str(error) else error.reason)
        except MemoryError:
            found.append("out_of_memory")
        else:
            assert pixels.dtype == np.float32
            assert 0 <= pixels.min() <= pixels.max() <= 1
            found.append("decoded")
    return "decoded" if "decoded" in found else found[0]


def main(folder: Path, first: int, last: int) -> None:
    """Read the files of some seeds: before each its seed and format is said, after it what became of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sound = originals(folder)
    names, others = list(sound), [data for _, data in sound.values()]
    paths = {name: folder / str(number) / f"f{sound[name][0]}" for number, name in enumerate(names)}
    for path in paths.values():
        path.parent.mkdir()
    for seed in range(first, last):
        name = names[seed % len(names)]
        paths[name].write_bytes(damage(sound[name][1], random.Random(seed), others))
        print(json.dumps([seed, name]), flush=True)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        result = outcome(paths[name])
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(result))
    print(json.dumps({"peak_bytes": peak_bytes()}))


def _some(items: list) -> list:
    return items if len(items) <= SAMPLES_READ else [items[0], items[len(items) // 2], items[-1]]


def _saved(image: Pillow.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
