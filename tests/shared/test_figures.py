import io

import numpy as np
from PIL import Image

from shared.figures import data_uri, hero, map_uri, overlay, paint, picture, png, webp


def half() -> np.ndarray:
    region = np.zeros((8, 8))
    region[:4] = 1
    return region


def test_an_overlay_tints_where_it_is_probable_and_leaves_the_rest() -> None:
    image = np.full((1, 8, 8), 0.5)
    tinted = overlay(image, half(), colour=(255, 0, 0), side_px=64)
    assert tinted.shape == (64, 64, 3)
    assert (tinted[8, :, 0].astype(int) > tinted[8, :, 1] + 80).all()
    assert (tinted[60] == 128).all()
    brighter = overlay(np.full((1, 8, 8), 0.9), half(), colour=(255, 0, 0), side_px=64)
    assert (brighter[8, :, 0] > tinted[8, :, 0]).all()  # what lies under the tint can still be read


def test_more_probable_is_more_tinted_and_the_line_stands_at_a_half() -> None:
    ramp = np.tile(np.linspace(0, 1, 256), (256, 1))
    drawn = overlay(np.full((1, 256, 256), 0.5), ramp, colour=(255, 0, 0), side_px=256)[128].astype(int)
    tint = drawn[:, 0] - drawn[:, 1]
    assert (np.diff(tint[10:110]) >= 0).all()
    assert (np.diff(tint[146:246]) >= 0).all()
    assert abs(int(np.argmax(tint)) - 127) <= 2


def test_hidden_cells_are_dark_and_a_map_with_them_is_only_a_line() -> None:
    image = np.full((1, 8, 8), 0.5)
    hidden = np.zeros((2, 2), bool)
    hidden[0, 1] = True
    masked = overlay(image, hidden=hidden, side_px=64)
    assert masked[4:28, 36:60].max() < 90
    assert masked[10, 10].min() > 120
    lined = overlay(image, half(), hidden, colour=(255, 0, 0), side_px=64)
    assert (lined[10, 10] == masked[10, 10]).all()
    assert (lined[31, 4:28, 0].astype(int) > lined[31, 4:28, 1] + 60).all()


def test_pictures_keep_proportions_and_take_grey_colour_and_broken_numbers() -> None:
    image = np.full((1, 8, 4), 0.5)
    assert overlay(image, side_px=64).shape == (64, 32, 3)
    assert (overlay(image[0], side_px=64) == overlay(image, side_px=64)).all()
    red = overlay(np.stack([np.ones((4, 4)), np.zeros((4, 4)), np.zeros((4, 4))]), side_px=4)
    assert (red == (255, 0, 0)).all()
    broken = np.full((4, 4), np.nan)
    assert (overlay(broken, broken, side_px=4) == 0).all()


def test_a_flat_map_at_a_half_is_no_line_everywhere() -> None:
    flat = paint(np.zeros((8, 8)), [(np.full((8, 8), 0.5), (255, 255, 255))], np.zeros((1, 1), bool), side_px=32)
    assert flat[4:28, 4:28].max() < 60


def test_encodings_carry_the_pixels_and_repeat() -> None:
    pixels = overlay(np.random.default_rng(0).random((1, 40, 40)), side_px=40)
    assert (np.asarray(Image.open(io.BytesIO(png(pixels)))) == pixels).all()
    assert webp(pixels) == webp(pixels)
    smooth = np.tile(np.arange(40, dtype=np.uint8)[:, None, None] * 6, (1, 40, 3))
    back = np.asarray(Image.open(io.BytesIO(webp(smooth))).convert("RGB")).astype(int)
    assert np.abs(back - smooth).mean() < 3
    assert data_uri(b"a", "png") == "data:image/png;base64,YQ=="
    assert 'alt="&lt;a&quot;"' in picture(pixels, '<a"')
    assert len(map_uri(np.zeros((256, 256)))) < 400


def test_a_hero_is_a_png_of_all_panels() -> None:
    image = np.full((1, 32, 32), 0.5)
    args = (image, {"r": ["word", "other words"], "unmapped": ["x"]}, {"r": image[0]}, np.eye(4, dtype=bool), image)
    opened = Image.open(io.BytesIO(hero(*args, side_px=100)))
    assert opened.size[0] == 34 + 4 * 134 + 75 + 34
    assert opened.getpixel((0, 0))[3] == 0  # round corners
    assert hero(*args, side_px=100) == hero(*args, side_px=100)
