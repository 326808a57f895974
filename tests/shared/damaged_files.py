"""Ten thousand damaged files, and a process that reads them: used by `test_fuzz`.

Run as a program it prints one JSON line a file: its seed, its format and what became of it. It writes the seed to
a file before each, so that whoever started it can name the one that ended it.
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
import pydicom
import tifffile
from PIL import Image as Pillow

from shared.errors import DecodeError
from shared.images import find_sources, read_image

MEMORY_BYTES = 6 << 30
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
}


def originals() -> dict[str, tuple[str, bytes]]:
    """Small sound files: name -> suffix and bytes."""
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
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    for name, file in DICOM_FILES.items():
        if file:
            found[f"dicom {name}"] = (".dcm", (folder / file).read_bytes())
    return found


def damage(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to three wounds of a kind that disks, networks and people make."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not raw:
            break
        # Half of the wounds fall on the first bytes, where the headers are.
        end = len(raw) if rng.random() < 0.5 else min(len(raw), 700)
        at = rng.randrange(end)
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
    for source in _some(find_sources(path.parent)):
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
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sound = originals()
    names, others = list(sound), [data for _, data in sound.values()]
    for seed in range(first, last):
        rng = random.Random(seed)
        name = names[seed % len(names)]
        suffix, data = sound[name]
        home = folder / "files"
        home.mkdir(exist_ok=True)
        path = home / f"f{suffix}"
        path.write_bytes(damage(data, rng, others))
        (folder / "seed").write_text(f"{seed} ({name})")
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        result = outcome(path)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps([seed, name, result]), flush=True)
        path.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak}))


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
