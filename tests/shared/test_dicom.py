"""DICOM frames: against SimpleITK's own reader, and against values worked out by hand from the standard."""

import builtins
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from shared import dicom
from shared.errors import DecodeError
from shared.images import Image, Source, read_image
from tests.shared.dicom_files import SAMPLES, item, table, write_dicom

RAMP = np.arange(600, dtype=np.uint16).reshape(20, 30)


def read(path: Path, frame: int | None = None) -> Image:
    return read_image(Source("x", path, frame))


def refuse(path: Path, frame: int | None = None) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        read(path, frame)
    assert str(path.parent) not in str(caught.value)
    return caught.value


def percentiles(values: np.ndarray) -> np.ndarray:
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / (high - low), 0, 1)


@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("MR_small_implicit.dcm", "Implicit VR Little Endian"),
        ("MR_small.dcm", "Explicit VR Little Endian"),
        ("MR_small_bigendian.dcm", "Explicit VR Big Endian"),
        ("ExplVR_BigEnd.dcm", "Explicit VR Big Endian"),
        ("image_dfl.dcm", "Deflated Explicit VR Little Endian"),
        ("CT_small.dcm", "Explicit VR Little Endian"),
        ("examples_overlay.dcm", "Explicit VR Little Endian"),
        ("SC_ybr_full_422_uncompressed.dcm", "Explicit VR Little Endian"),
        ("MR_small_RLE.dcm", "RLE Lossless"),
        ("SC_rgb_rle_2frame.dcm", "RLE Lossless"),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", "JPEG Baseline (Process 1)"),
        ("SC_rgb_jpeg.dcm", "JPEG Baseline (Process 1)"),
        ("JPGExtended.dcm", "JPEG Extended (Process 2 and 4)"),
        ("SC_rgb_jpeg_gdcm.dcm", "JPEG Lossless, Non-Hierarchical, First-Order Prediction"),
        ("MR_small_jpeg_ls_lossless.dcm", "JPEG-LS Lossless Image Compression"),
        ("JPEGLSNearLossless_16.dcm", "JPEG-LS Lossy (Near-Lossless) Image Compression"),
        ("MR_small_jp2klossless.dcm", "JPEG 2000 Image Compression (Lossless Only)"),
        ("J2K_pixelrep_mismatch.dcm", "JPEG 2000 Image Compression (Lossless Only)"),
        ("693_J2KI.dcm", "JPEG 2000 Image Compression"),
        ("SC_rgb_gdcm_KY.dcm", "JPEG 2000 Image Compression"),
    ],
)
def test_every_transfer_syntax_agrees_with_simpleitk(name: str, syntax: str) -> None:
    head = pydicom.dcmread(SAMPLES / name, stop_before_pixels=True)
    assert head.file_meta.TransferSyntaxUID.name.startswith(syntax)
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(SAMPLES / name)))  # modality applied
    frames = int(head.get("NumberOfFrames", 1))
    assert len(theirs) == frames
    for frame in range(frames):
        image = read(SAMPLES / name, frame if frames > 1 else None)
        values = theirs[frame].astype(float)
        tolerance = 1e-6
        if "WindowCenter" in head:
            centre, width = (float(np.atleast_1d(head[key].value)[0]) for key in ("WindowCenter", "WindowWidth"))
            bottom = centre - 0.5 - (width - 1) / 2
            expected = np.interp(values, [bottom, bottom + width - 1], [0, 1])
        elif head.BitsStored == 8:
            expected = values / 255
        else:
            expected = percentiles(values)
            # 12 bit JPEG is lossy: two decoders may round a value apart.
            tolerance = 2 / np.ptp(values) * 1.5 if "Extended" in syntax else 1e-5
        expected = np.moveaxis(expected, -1, 0) if expected.ndim == 3 else expected[None]
        assert image.pixels.shape == expected.shape
        np.testing.assert_allclose(image.pixels, expected, atol=tolerance)


def test_palettes_agree_with_simpleitk_and_by_hand(tmp_path: Path) -> None:
    name = SAMPLES / "examples_palette.dcm"
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(name)))[0]
    image = read(name)
    np.testing.assert_allclose(np.moveaxis(image.pixels, 0, -1), theirs / 255, atol=1 / 255)
    tables = {}
    for colour, entries in (("Red", [0, 65535, 3]), ("Green", [5, 6, 7]), ("Blue", [65535, 0, 1])):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 10, 16]
        tables[f"{colour}PaletteColorLookupTableData"] = np.array(entries, "<u2").tobytes()
    stored = np.array([[0, 10, 11, 12, 200]], np.uint8)  # below and above the table: its first and last entry
    image = read(write_dicom(tmp_path / "p.dcm", stored, photometric="PALETTE COLOR", **tables))
    expected = np.array([[0, 0, 65535, 3, 3], [5, 5, 6, 7, 7], [65535, 65535, 0, 1, 1]]) / 65535
    np.testing.assert_allclose(image.pixels[:, 0], expected, atol=1e-7)
    assert image.intensity == "palette"
    # Segmented: two values as they are, then a line of four steps to 44.
    for colour in ("Red", "Green", "Blue"):
        del tables[f"{colour}PaletteColorLookupTableData"]
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [6, 0, 16]
        tables[f"Segmented{colour}PaletteColorLookupTableData"] = np.array([0, 2, 2, 4, 1, 4, 44], "<u2").tobytes()
    stored = np.arange(6, dtype=np.uint8)[None]
    image = read(write_dicom(tmp_path / "s.dcm", stored, photometric="PALETTE COLOR", **tables))
    np.testing.assert_allclose(image.pixels[1, 0] * 65535, [2, 4, 14, 24, 34, 44], rtol=1e-5)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_the_encoding_does_not_matter(tmp_path: Path, syntax) -> None:
    tags = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 300, "WindowWidth": 500}
    voi = {"VOILUTSequence": [table([0, 7, 255], 10, 8)]}
    for more in (tags, voi):
        plain = read(write_dicom(tmp_path / "a.dcm", RAMP, **more))
        other = read(write_dicom(tmp_path / "b.dcm", RAMP, syntax=syntax, **more))
        assert other.pixel_sha256 == plain.pixel_sha256
        assert other.intensity == plain.intensity
    order = "<" if syntax.is_little_endian else ">"
    tables = {}
    for colour in ("Red", "Green", "Blue"):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        tables[f"{colour}PaletteColorLookupTableData"] = np.array([1, 513, 65535], f"{order}u2").tobytes()
    stored = np.array([[0, 1, 2]], np.uint8)
    image = read(write_dicom(tmp_path / "c.dcm", stored, syntax=syntax, photometric="PALETTE COLOR", **tables))
    np.testing.assert_allclose(image.pixels[0, 0] * 65535, [1, 513, 65535], rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # Rescaled: -10, 10, 20, 30, 50. Window 20/40. The standard's formulas by hand.
        ("LINEAR", [0, 0.25641026, 0.51282051, 0.76923077, 1]),
        ("LINEAR_EXACT", [0, 0.25, 0.5, 0.75, 1]),
        ("SIGMOID", [0.04742587, 0.26894142, 0.5, 0.73105858, 0.95257413]),
    ],
)
def test_rescale_then_the_first_window(tmp_path: Path, function: str, expected: list[float]) -> None:
    stored = np.array([[0, 10, 15, 20, 30]], np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -10, "WindowCenter": [20, 999], "WindowWidth": [40, 1]}
    image = read(write_dicom(tmp_path / "a.dcm", stored, VOILUTFunction=function, **tags))
    np.testing.assert_allclose(image.pixels[0, 0], expected, atol=1e-7)
    assert image.intensity == f"modality x 2.0 + -10.0; window 20.0/40.0 {function}"
    inverse = read(write_dicom(tmp_path / "b.dcm", stored, photometric="MONOCHROME1", VOILUTFunction=function, **tags))
    np.testing.assert_allclose(inverse.pixels[0, 0], 1 - np.array(expected), atol=1e-7)
    assert inverse.intensity.endswith("; inverted")


def test_a_window_of_width_one_is_a_threshold(tmp_path: Path) -> None:
    image = read(write_dicom(tmp_path / "a.dcm", np.array([[6, 7, 8]], np.uint16), WindowCenter=7.5, WindowWidth=1))
    assert image.pixels.ravel().tolist() == [0, 0, 1]
    assert refuse(write_dicom(tmp_path / "b.dcm", RAMP, WindowCenter=7, WindowWidth=0)).reason == "decode_failed"


def test_lookup_tables_clamp_and_wide_values_do_not_wrap(tmp_path: Path) -> None:
    # 12 bit values into an 8 bit table: 300 lies past its end, and must not come round to 300 - 256.
    stored = np.array([[0, 99, 100, 101, 102, 300, 4000]], np.uint16)
    image = read(
        write_dicom(
            tmp_path / "a.dcm", stored, BitsStored=12, HighBit=11, VOILUTSequence=[table([51, 102, 255], 100, 8)]
        )
    )
    np.testing.assert_allclose(image.pixels[0, 0], np.array([51, 51, 51, 102, 255, 255, 255]) / 255, atol=1e-7)
    # A table wins over a window, and stands after the modality's table.
    modality = [table([1000, 2000, 3000], 0, 16)]
    image = read(
        write_dicom(
            tmp_path / "b.dcm", np.array([[0, 1, 2]], np.uint16), ModalityLUTSequence=modality,
            VOILUTSequence=[table([0, 4095], 1999, 12)], WindowCenter=1, WindowWidth=1,
        )
    )  # fmt: skip
    assert image.pixels.ravel().tolist() == [0, 1, 1]
    assert image.intensity == "modality table; VOI table"
    # Signed values with a table that begins below zero.
    signed = np.array([[-3, -2, -1, 5]], np.int16)
    image = read(write_dicom(tmp_path / "c.dcm", signed, VOILUTSequence=[table([0, 255], 65534, 8)]))
    assert image.pixels.ravel().tolist() == [0, 0, 1, 1]


def test_a_table_maps_equal_values_alike_in_frames_with_and_without_negative_ones(tmp_path: Path) -> None:
    voi = [table([n * 32 for n in range(2001)], 65536 - 1000, 16)]  # -1000 to 1000
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "VOILUTSequence": voi}
    stack = np.array([[[1000, 1024]], [[1024, 1100]]], np.uint16)  # -24, 0; 0, 76
    path = write_dicom(tmp_path / "a.dcm", stack, **tags)
    expected = np.array([[976, 1000], [1000, 1076]]) * 32 / 65535
    np.testing.assert_allclose([read(path, frame).pixels[0, 0] for frame in (0, 1)], expected, atol=1e-6)
    # What cannot be negative is no signed number, however high the table begins.
    high = write_dicom(tmp_path / "b.dcm", stack + 60000, VOILUTSequence=[table([0, 255], 61024, 8)])
    assert [read(high, frame).pixels.ravel().tolist() for frame in (0, 1)] == [[0, 0], [0, 1]]
    # Signed values that the rescale lifts above zero are none either, and those that stay below it are.
    tags = {"RescaleSlope": 1, "RescaleIntercept": 32768, "VOILUTSequence": [table([0, 255], 40000, 8)]}
    lifted = write_dicom(tmp_path / "c.dcm", np.array([[7232, 7233]], np.int16), **tags)
    assert read(lifted).pixels.ravel().tolist() == [0, 1]
    signed = write_dicom(tmp_path / "d.dcm", np.array([[3, 4]], np.int16), VOILUTSequence=[table([0, 255], 65534, 8)])
    assert read(signed).pixels.ravel().tolist() == [1, 1]


def test_12_bits_in_16_lose_what_is_not_theirs(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2047, 4095]], np.uint16)
    tags = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2048, "WindowWidth": 4096}
    clean = read(write_dicom(tmp_path / "a.dcm", values, **tags)).pixels
    overlaid = read(write_dicom(tmp_path / "b.dcm", values | 0xA000, **tags)).pixels
    np.testing.assert_array_equal(clean, overlaid)
    high = read(write_dicom(tmp_path / "c.dcm", values << 4, **{**tags, "HighBit": 15})).pixels
    np.testing.assert_array_equal(clean, high)
    np.testing.assert_allclose(clean[0, 0], values[0] / 4095, atol=1e-7)
    # RLE packs the cells as they are; files whose bits lie lowest come out as before.
    for name, shift in (("low", 0), ("high", 4)):
        path = write_dicom(tmp_path / f"{name}.dcm", values << shift, **{**tags, "HighBit": 11 + shift})
        packed = pydicom.dcmread(path)
        packed.compress(RLELossless, generate_instance_uid=False)
        packed.save_as(path)
        np.testing.assert_array_equal(clean, read(path).pixels)
    # 0xFFF is -1 where the values are signed.
    signed = np.array([[0x0FFF, 0x0800, 0x07FF, 0]], np.uint16).view(np.int16)
    tags |= {"WindowCenter": 0, "WindowWidth": 4096}
    image = read(write_dicom(tmp_path / "d.dcm", signed, **tags))
    np.testing.assert_allclose(image.pixels[0, 0], (np.array([-1, -2048, 2047, 0]) + 2048) / 4095, atol=1e-7)


def test_without_a_window_the_percentiles_of_the_frame_count(tmp_path: Path) -> None:
    image = read(write_dicom(tmp_path / "a.dcm", RAMP, WindowCenter="", WindowWidth=""))
    np.testing.assert_allclose(image.pixels[0], percentiles(RAMP), atol=1e-6)
    assert image.intensity.startswith("percentile 0.5..99.5 of the sample")
    turned = read(write_dicom(tmp_path / "b.dcm", RAMP, photometric="MONOCHROME1"))
    np.testing.assert_allclose(turned.pixels[0], 1 - percentiles(RAMP), atol=1e-6)
    # Eight bits are as they are in a PNG, unless they stand for something else.
    eight = (RAMP % 256).astype(np.uint8)
    image = read(write_dicom(tmp_path / "c.dcm", eight))
    np.testing.assert_array_equal(image.pixels[0], eight.astype(np.float32) / np.float32(255))
    image = read(write_dicom(tmp_path / "d.dcm", eight, RescaleSlope=3, RescaleIntercept=0))
    np.testing.assert_allclose(image.pixels[0], percentiles(eight), atol=1e-6)


def test_frames_are_read_one_by_one_and_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = np.stack([RAMP + 10 * frame for frame in range(5)])
    path = write_dicom(tmp_path / "a.dcm", stack, WindowCenter=300, WindowWidth=601)
    reads = []
    monkeypatch.setattr(dicom, "read_bytes", lambda *given: reads.append(given) or path.read_bytes())
    for frame in (0, 3, 4):
        expected = np.clip((stack[frame] - 299.5) / 600 + 0.5, 0, 1)
        np.testing.assert_allclose(read(path, frame).pixels[0], expected, atol=1e-6)
    assert len(reads) == 1
    assert refuse(path, 5).reason == "decode_failed"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated, 5900 of 6000 bytes" in str(refuse(path, 0))
    path = write_dicom(tmp_path / "b.dcm", stack)
    assert refuse(path).reason == "too_large"  # never silently the first frame


def test_enhanced_files_have_values_for_each_frame(tmp_path: Path) -> None:
    def groups(slope: float) -> pydicom.Dataset:
        return item(PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=0)])

    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.25])],
        FrameVOILUTSequence=[item(WindowCenter=300.5, WindowWidth=601)],
    )
    path = write_dicom(
        tmp_path / "a.dcm", np.stack([RAMP, RAMP]), PerFrameFunctionalGroupsSequence=[groups(1), groups(0.5)],
        SharedFunctionalGroupsSequence=[shared],
    )  # fmt: skip
    whole, half = read(path, 0), read(path, 1)
    np.testing.assert_allclose(whole.pixels[0], RAMP / 600, atol=1e-6)
    np.testing.assert_allclose(half.pixels[0], RAMP / 1200, atol=1e-6)
    assert whole.spacing_mm == half.spacing_mm == (0.5, 0.25)


def test_spacing_is_that_of_the_pixels_else_of_the_detector(tmp_path: Path) -> None:
    for tags, expected in (
        ({"PixelSpacing": [0.7, 0.3], "ImagerPixelSpacing": [1, 1]}, (0.7, 0.3)),
        ({"ImagerPixelSpacing": [0.143, 0.15]}, (0.143, 0.15)),
        ({"PixelSpacing": [0, 0.3]}, None),
        ({}, None),
    ):
        assert read(write_dicom(tmp_path / "a.dcm", RAMP, **tags)).spacing_mm == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"PixelData": None}, "decode_failed"),
        ({"PixelData": None, "Rows": None}, "unsupported"),
        ({"Rows": 9000, "Columns": 9000}, "too_large"),
        ({"Rows": 0}, "decode_failed"),
        ({"Columns": 31}, "decode_failed"),
        ({"PhotometricInterpretation": "HSV"}, "unsupported"),
        ({"SamplesPerPixel": 2}, "unsupported"),
        ({"BitsStored": 17}, "decode_failed"),
        ({"VOILUTFunction": "DOE^JOHN", "WindowCenter": 1, "WindowWidth": 2}, "unsupported"),
        ({"RescaleSlope": "nan", "RescaleIntercept": 0}, "nonfinite"),
        ({"VOILUTSequence": [table([1], 0, 8)], "BitsStored": 40}, "decode_failed"),
    ],
)
def test_what_is_wrong_has_a_reason_and_shows_no_tag(tmp_path: Path, change: dict, reason: str) -> None:
    error = refuse(write_dicom(tmp_path / "a.dcm", RAMP, PatientName="DOE^JOHN", **change))
    assert error.reason == reason
    assert "DOE" not in str(error)


def test_files_that_are_no_image_are_unsupported(tmp_path: Path) -> None:
    for name in ("test-SR.dcm", "rtplan.dcm", "waveform_ecg.dcm"):
        assert refuse(SAMPLES / name).reason == "unsupported"
    raw = (SAMPLES / "test-SR.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(raw[:-30])
    assert refuse(tmp_path / "a.dcm").reason == "decode_failed"
    (tmp_path / "a.dcm").write_bytes(b"not DICOM" * 30)
    assert refuse(tmp_path / "a.dcm").reason == "decode_failed"
    (tmp_path / "a.dcm").unlink()
    assert refuse(tmp_path / "a.dcm").reason == "missing"


def test_without_the_codecs_a_file_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name in ("libjpeg", "openjpeg"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    error = refuse(SAMPLES / "MR_small_jp2klossless.dcm")
    assert error.reason == "unsupported"
    assert "mask-what-matters[dicom]" in str(error)
    assert read(SAMPLES / "MR_small_RLE.dcm").pixels.max() == 1
