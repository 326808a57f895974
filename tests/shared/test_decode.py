"""What each stored form decodes to, against values worked out by hand."""

import gzip
import io
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from shared.decode import PIXELS_MAX, count_slices
from shared.errors import DecodeError
from shared.images import Image, Source, find_sources, read_image

GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)


def read(path: Path) -> Image:
    return read_image(Source(path.name, path))


def refuse(path: Path) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        read(path)
    assert str(path.parent) not in str(caught.value)
    return caught.value


def saved(folder: Path, image: Pillow.Image, name: str = "a.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_grey_is_one_channel_over_255(tmp_path: Path) -> None:
    image = read(saved(tmp_path, Pillow.fromarray(GREY)))
    assert image.pixels.dtype == np.float32
    np.testing.assert_array_equal(image.pixels, GREY[None].astype(np.float32) / np.float32(255))
    assert (image.intensity, image.degenerate, image.spacing_mm) == ("uint8/255", False, None)
    assert image.source_sha256 == __import__("hashlib").sha256((tmp_path / "a.png").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("LA", (200, 128), [200 / 255 * 128 / 255]),
        ("RGB", (10, 20, 30), [10 / 255, 20 / 255, 30 / 255]),
        ("RGBA", (100, 200, 50, 51), [100 / 255 * 0.2, 200 / 255 * 0.2, 50 / 255 * 0.2]),
        ("1", 1, [1.0]),
    ],
)
def test_modes_of_a_png(tmp_path: Path, mode: str, pixel: object, expected: list[float]) -> None:
    picture = Pillow.new(mode, (4, 3))
    picture.putpixel((2, 1), pixel)
    image = read(saved(tmp_path, picture))
    assert image.pixels.shape == (len(expected), 3, 4)
    np.testing.assert_allclose(image.pixels[:, 1, 2], expected, rtol=1e-6)
    assert image.pixels[:, 0, 0].max() == 0


def test_a_palette_is_its_colours_with_transparency_over_black(tmp_path: Path) -> None:
    picture = Pillow.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    picture.putpalette([255, 0, 0, 0, 0, 255])
    np.testing.assert_array_equal(read(saved(tmp_path, picture)).pixels[:, 0], [[1, 0], [0, 0], [0, 1]])
    clear = read(saved(tmp_path, picture, "b.png", transparency=0))
    np.testing.assert_array_equal(clear.pixels[:, 0], [[0, 0], [0, 0], [0, 1]])


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = read(saved(tmp_path, Pillow.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.tif"))
    np.testing.assert_allclose(image.pixels[:, 4, 4], [1, 0, 0], atol=0.01)


def test_16_bit_keeps_its_levels(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for name in ("a.png", "b.tif"):
        image = read(saved(tmp_path, Pillow.fromarray(values), name))
        assert len(np.unique(image.pixels)) > 4000
        low, high = np.percentile(values, (0.5, 99.5))
        expected = np.clip((values - low) / (high - low), 0, 1)
        np.testing.assert_allclose(image.pixels[0], expected, atol=1e-6)
        assert image.intensity.startswith("percentile 0.5..99.5 of the sample: 20.475")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_deep_tiffs_read_without_loss(tmp_path: Path, compression: str | None) -> None:
    values = np.linspace(-3, 9, 3 * 20 * 30, dtype=np.float32).reshape(20, 30, 3)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", compression=compression)
    image = read(tmp_path / "a.tif")
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.clip((np.moveaxis(values, -1, 0) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(image.pixels, expected, atol=1e-5)


def test_lzw_16_bit_tiff_reads_through_pillow(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    image = read(saved(tmp_path, Pillow.fromarray(values), "a.tif", compression="tiff_lzw"))
    assert len(np.unique(image.pixels)) > 4000


def test_white_is_zero_is_turned_round(tmp_path: Path) -> None:
    values = np.arange(600, dtype=np.uint16).reshape(20, 30)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    pixels = read(tmp_path / "a.tif").pixels[0]
    assert pixels[0, 0] == 1
    assert pixels[-1, -1] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path: Path, orientation: int) -> None:
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    flip = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    turn = {5: lambda a: a.T, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3)}
    stored = np.ascontiguousarray({**flip, **turn}[orientation](upright))
    exif = Pillow.Exif()
    exif[274] = orientation
    expected = upright.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(
        read(saved(tmp_path, Pillow.fromarray(stored), exif=exif.tobytes())).pixels[0], expected
    )
    np.testing.assert_array_equal(
        read(saved(tmp_path, Pillow.fromarray(stored), "b.tif", tiffinfo={274: orientation})).pixels[0], expected
    )
    tifffile.imwrite(tmp_path / "c.tif", stored.astype(np.float32), extratags=[(274, 3, 1, orientation, True)])
    deep = read(tmp_path / "c.tif").pixels[0]
    assert (np.argsort(deep.ravel(), kind="stable") == np.arange(12)).all()
    assert deep.shape == (3, 4)


def test_truncated_and_broken_files(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    path = saved(tmp_path, Pillow.fromarray(noise))
    path.write_bytes(path.read_bytes()[:2000])
    assert refuse(path).reason == "decode_failed"
    path.write_bytes(b"not a picture")
    assert refuse(path).reason == "decode_failed"
    path.write_bytes(b"II*\0\xff\xff\xff\xff")
    assert refuse(path).reason == "decode_failed"
    path.unlink()
    assert refuse(path).reason == "missing"


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for side in (8001, 20000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        assert side * side > PIXELS_MAX
        (tmp_path / "a.png").write_bytes(data)
        assert refuse(tmp_path / "a.png").reason == "too_large"


def test_what_would_lose_something_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((3, 8, 8), np.uint8), photometric="minisblack")
    assert refuse(tmp_path / "pages.tif").reason == "unsupported"
    pages = [Pillow.fromarray(GREY), Pillow.fromarray(GREY[::-1])]
    assert refuse(saved(tmp_path, pages[0], "anim.png", save_all=True, append_images=pages[1:])).reason == "unsupported"
    tifffile.imwrite(tmp_path / "deep4.tif", np.zeros((8, 8, 4), np.uint16), photometric="rgb", extrasamples=[1])
    assert refuse(tmp_path / "deep4.tif").reason == "unsupported"


def test_nonfinite_values(tmp_path: Path) -> None:
    values = np.ones((8, 8), np.float32)
    values[2, 3] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert refuse(tmp_path / "a.tif").reason == "nonfinite"
    tifffile.imwrite(tmp_path / "b.tif", np.full((8, 8), 1e300))
    assert refuse(tmp_path / "b.tif").reason == "nonfinite"


def test_constant_images_are_kept_and_flagged(tmp_path: Path) -> None:
    image = read(saved(tmp_path, Pillow.new("L", (5, 4), 51)))
    assert image.degenerate
    np.testing.assert_allclose(image.pixels, 0.2)
    tifffile.imwrite(tmp_path / "b.tif", np.full((4, 5), 7, np.float32))
    deep = read(tmp_path / "b.tif")
    assert deep.degenerate
    assert deep.pixels.max() == 0
    assert deep.intensity == "constant sample"


def test_coinciding_percentiles_fall_back_to_the_extremes(tmp_path: Path) -> None:
    values = np.zeros((100, 100), np.uint16)
    values[4, 5] = 40000
    image = read(saved(tmp_path, Pillow.fromarray(values)))
    assert image.intensity == "minimum..maximum of the sample: 0.0..40000.0"
    assert image.pixels.sum() == 1


def volume(folder: Path, values: np.ndarray, affine: np.ndarray, name: str = "v.nii.gz") -> Path:
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / name)
    return folder / name


def test_nifti_slices_are_the_same_however_they_are_stored(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 1000, (5, 6, 7)).astype(np.int16)  # x to the right, y forward, z up
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    plain = volume(tmp_path, values, affine, "a.nii")
    sources = [source for source in find_sources(tmp_path) if source.path == plain]
    assert [source.sample_id for source in sources] == [f"a.nii#z{z:04d}" for z in range(7)]
    image = read_image(sources[2])
    assert image.pixels.shape == (1, 6, 5)
    assert image.spacing_mm == (3.0, 2.0)
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.clip((values[:, :, 2].astype(float) - low) / (high - low), 0, 1)
    # Row 0 is anterior (the largest y), column 0 the patient's left (the smallest x).
    np.testing.assert_allclose(image.pixels[0], expected.T[::-1], atol=1e-6)

    turned = affine @ np.array([[0, 0, -1, 4], [0, 1, 0, 0], [-1, 0, 0, 6], [0, 0, 0, 1.0]])
    stored = volume(tmp_path, np.ascontiguousarray(values[::-1, :, ::-1].transpose(2, 1, 0)), turned)
    assert count_slices(stored) == 7
    other = read_image(Source("v", stored, 2))
    assert other.pixel_sha256 == image.pixel_sha256
    assert other.spacing_mm == image.spacing_mm


def test_broken_volumes(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(20, 20, 9)).astype(np.float32)
    path = volume(tmp_path, values, np.eye(4))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DecodeError) as caught:
        read_image(Source("v#z0000", path, 0))
    assert caught.value.reason == "decode_failed"
    path.write_bytes(b"")
    assert count_slices(path) is None
    values[3, 3, 3] = np.inf
    with pytest.raises(DecodeError) as caught:
        read_image(Source("v", volume(tmp_path, values, np.eye(4), "w.nii.gz"), 0))
    assert caught.value.reason == "nonfinite"
    four = volume(tmp_path, np.zeros((4, 4, 4, 2), np.int16), np.eye(4), "four.nii")
    with pytest.raises(DecodeError) as caught:
        read_image(Source("four", four, 0))
    assert caught.value.reason == "unsupported"


def test_a_gzip_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((512, 512, 200))
    header.set_data_dtype(np.uint16)
    raw = io.BytesIO()
    header.write_to(raw)
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(raw.getvalue() + bytes(4)))
    with pytest.raises(DecodeError) as caught:
        read_image(Source("v", tmp_path / "v.nii.gz", 0))
    assert caught.value.reason == "too_large"
