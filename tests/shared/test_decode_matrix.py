"""The failure matrix of reading: one test a row, named after it; patient data is in `test_patient_data`."""

import gzip
import io
import json
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
from PIL import Image as Pillow
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian

from shared.corpus import list_corpus
from shared.errors import DecodeError, UsageError
from shared.images import Image, Source, find_sources, read_image
from shared.pseudonyms import pseudonym
from stage1_localize.answer import Failure
from stage1_localize.answer import read as read_for_localize
from tests.shared.dicom_files import SAMPLES, write_dicom

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 255, (20, 24), np.uint8)
DEEP = RNG.integers(0, 4096, (20, 24)).astype(np.uint16)
COLOUR = RNG.integers(0, 255, (20, 24, 3), np.uint8)


def read(path: Path, index: int | None = None) -> Image:
    return read_image(Source(path.name, path, index))


def reason(path: Path, index: int | None = None) -> str:
    with pytest.raises(DecodeError) as caught:
        read(path, index)
    assert str(path.parent) not in str(caught.value)
    return caught.value.reason


def saved(folder: Path, values: np.ndarray | Pillow.Image, name: str, **options: object) -> Path:
    image = Pillow.fromarray(values) if isinstance(values, np.ndarray) else values
    image.save(folder / name, **options)
    return folder / name


def percentiles(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / (high - low), 0, 1)


def test_truncated_or_flipped_png(tmp_path: Path) -> None:
    for values in (GREY[:8, :10], DEEP[:8, :10]):
        path = saved(tmp_path, values, "a.png")
        raw = path.read_bytes()
        for end in range(len(raw)):
            path.write_bytes(raw[:end])
            assert reason(path) == "decode_failed", end
        for place in range(len(raw)):
            for bit in (0, 3, 7):
                path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
                assert reason(path) in ("decode_failed", "too_large", "unsupported"), place


def test_flipped_jpeg_byte(tmp_path: Path) -> None:
    path = saved(tmp_path, GREY, "a.jpg")
    raw, sound = path.read_bytes(), read(path).pixel_sha256
    sources = find_sources(tmp_path)
    digest = list_corpus(sources)[0].source_sha256
    silent = 0
    for place in range(len(raw) - 60, len(raw) - 20):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])
        answer = read_for_localize(sources[0], digest)
        assert isinstance(answer, Failure)
        if answer.reason == "source_changed":
            silent += read(path).pixel_sha256 != sound
        else:
            assert answer.reason == "decode_failed"
    assert silent > 10  # these decode to other pixels: the digest of the file alone tells


def test_decompression_bomb(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert reason(tmp_path / "a.png") == "too_large"
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((16, 16), np.uint16), compression="zlib")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        for tag in ("ImageWidth", "ImageLength"):
            tiff.pages[0].tags[tag].overwrite(60000)
    assert reason(tmp_path / "a.tif") == "too_large"


def test_decompression_bomb_in_dicom(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    assert reason(write_dicom(path, DEEP, Rows=60000, Columns=60000)) == "too_large"
    # A header of 10 x 10 px over a codestream that claims 60000 x 60000: the codec would allocate it.
    for file, mark, at in (
        ("JPEGLSNearLossless_08.dcm", b"\xff\xf7", 5),
        ("MR_small_jp2klossless.dcm", b"\xff\x51", 6),
    ):
        raw = bytearray((SAMPLES / file).read_bytes())
        place = raw.rindex(mark) + at
        raw[place : place + (4 if at == 5 else 8)] = struct.pack(">HH" if at == 5 else ">II", 60000, 60000)
        path.write_bytes(raw)
        assert reason(path) == "decode_failed"
    # A few bytes of runs for an image of 49 Mpx.
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + bytes(64)
    import pydicom

    dataset = pydicom.dcmread(SAMPLES / "MR_small_RLE.dcm")
    dataset.Rows = dataset.Columns = 7000
    dataset.PixelData = encapsulate([runs])
    dataset.save_as(path)
    with pytest.raises(DecodeError, match="bytes of runs"):
        read(path)
    # Deflate: 200 MB of zeros in 200 kB, beyond the ratio, and never inflated whole.
    write_dicom(path, np.zeros((4, 4), np.uint16), syntax=DeflatedExplicitVRLittleEndian)
    raw = path.read_bytes()
    plain = write_dicom(tmp_path / "b.dcm", np.zeros((4, 4), np.uint16)).read_bytes()
    body = plain[plain.index(b"\x08\x00\x16\x00") :]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(body) + b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    start = raw.index(b"\x02\x00\x10\x00")
    start += 8 + int.from_bytes(raw[start + 6 : start + 8], "little")
    while raw[start : start + 2] == b"\x02\x00":  # the rest of the file meta group
        start += 8 + int.from_bytes(raw[start + 6 : start + 8], "little")
    path.write_bytes(raw[:start] + packed)
    assert reason(path) == "too_large"


def test_decompression_bomb_in_nifti_and_gzip(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    for shape in ((30000, 30000, 30000), (512, 512, 1000)):
        header.set_data_shape(shape)
        raw = io.BytesIO()
        header.write_to(raw)
        data = raw.getvalue() + bytes(4)
        (tmp_path / "a.nii").write_bytes(data)
        (tmp_path / "a.nii.gz").write_bytes(gzip.compress(data))
        assert reason(tmp_path / "a.nii.gz", 0) == "too_large"
        assert reason(tmp_path / "a.nii", 0) in ("too_large", "decode_failed")
    # Far more follows than the header says: only that is unpacked.
    whole = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(whole + bytes(300 << 20), 1))
    assert read(tmp_path / "a.nii.gz", 0).pixels.shape == (1, 4, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "zlib.tif", "lzw.tif", "big.tif"])
def test_16_bit_png_or_tiff(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name in ("a.png", "a.tif"):
        saved(tmp_path, DEEP, name)
    elif name == "lzw.tif":
        saved(tmp_path, DEEP, name, compression="tiff_lzw")
    else:
        tifffile.imwrite(path, DEEP, compression=name[:4] if name[0] == "z" else None, bigtiff=name[0] == "b")
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    np.testing.assert_array_equal(theirs, DEEP)
    image = read(path)
    np.testing.assert_allclose(image.pixels[0], percentiles(theirs), atol=1e-6)
    assert len(np.unique(image.pixels)) > 400  # of 4096 levels, `convert("L")` would leave 17


@pytest.mark.parametrize("name", ["a.png", "a.tif", "b.png", "b.tif", "b.jpg", "a.jpg"])
def test_8_bit_agrees_with_simpleitk(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, GREY if name[0] == "a" else COLOUR, name, **({"subsampling": 0} if "jpg" in name else {}))
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    theirs = theirs[None] if theirs.ndim == 2 else np.moveaxis(theirs, -1, 0)
    atol = 2.01 / 255 if "jpg" in name else 0  # two JPEG decoders may round apart
    np.testing.assert_allclose(read(path).pixels, theirs.astype(np.float32) / np.float32(255), atol=atol, rtol=0)


def test_cmyk_la_rgba_palette_exif_rotation(tmp_path: Path) -> None:
    alpha = GREY[::-1]
    over_black = GREY.astype(np.float64) * alpha / 255**2
    grey_alpha = Pillow.merge("LA", [Pillow.fromarray(GREY), Pillow.fromarray(np.ascontiguousarray(alpha))])
    np.testing.assert_allclose(read(saved(tmp_path, grey_alpha, "la.png")).pixels[0], over_black, atol=1e-6)
    rgba = np.dstack([COLOUR, alpha])
    expected = np.moveaxis(COLOUR * (alpha[..., None] / 255**2), -1, 0)
    np.testing.assert_allclose(read(saved(tmp_path, rgba, "rgba.png")).pixels, expected, atol=1e-6)
    cmyk = Pillow.new("CMYK", (8, 8), (51, 102, 153, 0))
    pixels = read(saved(tmp_path, cmyk, "c.tif")).pixels[:, 3, 3]
    np.testing.assert_allclose(pixels, [0.8, 0.6, 0.4], atol=0.01)
    palette = Pillow.fromarray(COLOUR).quantize(16)
    shown = np.array(palette.getpalette()[:48]).reshape(16, 3)[np.asarray(palette)] / 255
    np.testing.assert_allclose(read(saved(tmp_path, palette, "p.png")).pixels, np.moveaxis(shown, -1, 0), atol=1e-6)
    exif = Pillow.Exif()
    exif[274] = 6  # stored turned to the left: turned to the right when shown
    turned = read(saved(tmp_path, GREY, "e.png", exif=exif.tobytes()))
    np.testing.assert_array_equal(turned.pixels[0], np.rot90(GREY, -1).astype(np.float32) / np.float32(255))


def test_nan_infinite_constant_image(tmp_path: Path) -> None:
    for number, bad in enumerate((np.nan, np.inf, -np.inf)):
        values = DEEP.astype(np.float32)
        values[3, 4] = bad
        tifffile.imwrite(tmp_path / "a.tif", values)
        assert reason(tmp_path / "a.tif") == "nonfinite"
        nibabel.save(nibabel.Nifti1Image(values[..., None], np.eye(4)), tmp_path / f"{number}.nii")
        assert reason(tmp_path / f"{number}.nii", 0) == "nonfinite"
    assert reason(write_dicom(tmp_path / "a.dcm", DEEP, RescaleSlope="inf", RescaleIntercept=1)) == "nonfinite"
    constant = (
        saved(tmp_path, np.full((4, 5), 51, np.uint8), "c.png"),
        saved(tmp_path, np.full((4, 5), 51, np.uint16), "c.tif"),
        write_dicom(tmp_path / "c.dcm", np.full((4, 5), 51, np.uint16)),
        write_dicom(tmp_path / "d.dcm", np.full((4, 5), 51, np.uint16), photometric="MONOCHROME1"),
    )
    for path in constant:
        image = read(path)
        assert image.degenerate
        assert np.isfinite(image.pixels).all()


def test_multi_frame_dicom(tmp_path: Path) -> None:
    frames = np.stack([DEEP + 100 * frame for frame in range(5)])
    write_dicom(tmp_path / "a.dcm", frames)
    sources = find_sources(tmp_path)
    assert [source.sample_id for source in sources] == [f"{pseudonym('dicom', 'a.dcm')}#f{n:04d}" for n in range(5)]
    for frame, source in enumerate(sources):
        low, high = np.percentile(frames[frame], (0.5, 99.5))
        assert read_image(source).intensity.endswith(f": {np.float32(low)!s}..{np.float32(high)!s}")
    assert reason(tmp_path / "a.dcm") == "too_large"  # without a frame named: never silently frame 0


def test_dicom_monochrome1_rescale_12_in_16(tmp_path: Path) -> None:
    # Stored 12 bits under an overlay in the other 4; slope and intercept; a window; inverted.
    tags = {"BitsStored": 12, "HighBit": 11, "RescaleSlope": 0.5, "RescaleIntercept": -1000}
    path = write_dicom(
        tmp_path / "a.dcm", DEEP | 0x8000, photometric="MONOCHROME1", WindowCenter=-500, WindowWidth=1001, **tags
    )
    image = read(path)
    expected = 1 - np.clip((DEEP * 0.5 - 1000 + 1000.5) / 1000, 0, 1)
    np.testing.assert_allclose(image.pixels[0], expected, atol=1e-6)
    assert image.intensity == "modality x 0.5 + -1000.0; window -500.0/1001.0 LINEAR; inverted"


def test_nifti_orientation(tmp_path: Path) -> None:
    # LPS against RAS: the same voxels, stored the other way round along x and y, decode to the same slices.
    values = RNG.integers(0, 900, (6, 7, 5)).astype(np.int16)
    ras, lps = np.diag([1.0, 2.0, 3.0, 1.0]), np.diag([-1.0, -2.0, 3.0, 1.0])
    lps[:2, 3] = 5, 12
    nibabel.save(nibabel.Nifti1Image(values, ras), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(values[::-1, ::-1]), lps), tmp_path / "b.nii")
    found = [read_image(source) for source in find_sources(tmp_path)]
    assert [image.pixel_sha256 for image in found[:5]] == [image.pixel_sha256 for image in found[5:]]
    np.testing.assert_array_equal(np.array(found[5].grid.affine), lps)  # the file's own, kept for export


def test_duplicate_ids_and_hostile_ids(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        saved(tmp_path, GREY, name)

    def refused(*rows: dict[str, str]) -> str:
        (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(UsageError) as caught:
            find_sources(tmp_path / "list.jsonl")
        assert caught.value.exit_code == 2
        return str(caught.value)

    for one, two in (("a", "a"), ("a", "A"), ("\u00e9", "e\u0301"), ("ﬁ", "FI")):
        said = refused({"image": "1.png", "sample_id": one}, {"image": "2.png", "sample_id": two})
        assert "1.png" in said
        assert "2.png" in said
    for hostile in ("../a", "/a", "a/../../b", "a\0b", "a\nb", "a\u200bb", "a\u202eb", "x" * 129, "", " ", "."):
        if hostile:
            refused({"image": "1.png", "sample_id": hostile})
    # DICOM ids are pseudonyms: whatever they are made from, they are short, visible and relative.
    write_dicom(tmp_path / "3.dcm", DEEP)
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "3.dcm", "sample_id": "../\u202e" + "x" * 500}))
    assert find_sources(tmp_path / "list.jsonl")[0].sample_id.startswith("dicom-")


def test_symlink_out_of_the_corpus(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    home = tmp_path / "home"
    home.mkdir()
    saved(home, GREY, "a.png")
    for number, path in enumerate(
        (saved(outside, GREY, "x.png"), write_dicom(outside / "y.dcm", DEEP), write_dicom(outside / "z", DEEP), outside)
    ):
        link = home / (f"link{number}{path.suffix}")
        link.symlink_to(path)
        with pytest.raises(UsageError, match="symbolic link"):
            find_sources(home)
        link.unlink()
    (home / "in.png").symlink_to(home / "a.png")
    assert len(find_sources(home)) == 2
