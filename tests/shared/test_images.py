"""Which samples are found, and which ids are refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from shared.errors import InputMissingError, UsageError
from shared.images import ID_BYTES_MAX, Source, _id_fault, find_sources, pixel_sha256, read_image


def picture(path: Path, value: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.arange(value, value + 16, dtype=np.uint8).reshape(4, 4)).save(path)
    return path


def ids(root: Path) -> list[str]:
    return [source.sample_id for source in find_sources(root)]


def test_a_folder_gives_relative_paths_in_order(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.tiff", ".hidden/x.png", "._a.png"):
        picture(tmp_path / name)
    (tmp_path / "readme.txt").write_text("no image")
    assert ids(tmp_path) == ["a.tiff", "b/1.jpg", "b/2.PNG"]


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no png"):
        find_sources(tmp_path)
    with pytest.raises(InputMissingError):
        find_sources(tmp_path / "absent")
    (tmp_path / "list.csv").write_text("image\n")
    with pytest.raises(UsageError, match="no rows"):
        find_sources(tmp_path / "list.csv")


def test_a_csv_list_names_ids_and_groups(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "1.png")
    picture(tmp_path / "x" / "2.png")
    (tmp_path / "list.csv").write_text("split,image,sample_id,group\ntrain,x/1.png,zeta,p1\ntrain,x/2.png,,\n")
    found = find_sources(tmp_path / "list.csv")
    assert [(s.sample_id, s.group) for s in found] == [("x/2.png", None), ("zeta", "p1")]
    rows = [{"image": "x/1.png", "sample_id": "zeta", "group": "p1"}, {"image": "x/2.png"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert find_sources(tmp_path / "list.jsonl") == found


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("../other/1.png", "inside the list's folder"),
        ("{absolute}", "inside the list's folder"),
        ("absent.png", "does not exist"),
        ("1.npz", "is none of"),
        ("", "no value"),
    ],
)
def test_rows_that_a_list_may_not_have(tmp_path: Path, row: str, said: str) -> None:
    absolute = picture(tmp_path / "other" / "1.png")
    home = tmp_path / "home"
    home.mkdir()
    (home / "1.npz").write_bytes(b"")
    (home / "list.csv").write_text(f"image,k\n{row.replace('{absolute}', str(absolute))},1\n")
    with pytest.raises(UsageError, match=f"row 2.*{said}"):
        find_sources(home / "list.csv")


def test_duplicate_and_look_alike_ids_name_both_files(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    for first, second, said in (("a", "a", "the same id"), ("Case", "cASE", "look alike")):
        (tmp_path / "list.csv").write_text(f"image,sample_id\n1.png,{first}\n2.png,{second}\n")
        with pytest.raises(UsageError, match=said) as caught:
            find_sources(tmp_path / "list.csv")
        assert "1.png" in str(caught.value)
        assert "2.png" in str(caught.value)


def test_composed_and_decomposed_names_collide(tmp_path: Path) -> None:
    picture(tmp_path / "\u00e9.png")
    picture(tmp_path / "e\u0301.png")
    with pytest.raises(UsageError, match="the same id"):
        find_sources(tmp_path)


@pytest.mark.parametrize(
    "bad", ["../a", "/a", "a//b", "./a", "a\x07b", "a\u202eb", "x" * (ID_BYTES_MAX + 1), "a/../b", "\u00e9" * 65]
)
def test_ids_that_are_refused(tmp_path: Path, bad: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image": "1.png", "sample_id": bad}))
    with pytest.raises(UsageError, match="sample id"):
        find_sources(tmp_path / "list.jsonl")


@given(st.text(min_size=1, max_size=150))
def test_an_accepted_id_is_short_relative_and_visible(text: str) -> None:
    if _id_fault(text) is None:
        assert len(text.encode()) <= ID_BYTES_MAX
        assert not os.path.isabs(text)
        assert os.path.normpath(text) == text
        assert not any(ord(character) < 32 for character in text)


def test_links_out_of_the_corpus_are_refused(tmp_path: Path) -> None:
    outside = picture(tmp_path / "outside" / "1.png")
    home = tmp_path / "home"
    picture(home / "a.png")
    (home / "in.png").symlink_to(home / "a.png")
    assert ids(home) == ["a.png", "in.png"]
    (home / "out.png").symlink_to(outside)
    with pytest.raises(UsageError, match="symbolic link"):
        find_sources(home)
    (home / "out.png").unlink()
    (home / "folder").symlink_to(outside.parent)
    with pytest.raises(UsageError, match="symbolic link"):
        find_sources(home)
    (home / "list.csv").write_text("image\nfolder/1.png\n")
    with pytest.raises(UsageError, match="symbolic link"):
        find_sources(home / "list.csv")


def test_a_broken_volume_stays_one_sample(tmp_path: Path) -> None:
    (tmp_path / "v.nii.gz").write_bytes(b"nothing")
    assert find_sources(tmp_path) == [Source("v.nii.gz", tmp_path / "v.nii.gz")]


def test_the_pixel_digest_knows_the_shape(tmp_path: Path) -> None:
    image = read_image(find_sources(picture(tmp_path / "a.png").parent)[0])
    assert image.pixel_sha256 == pixel_sha256(image.pixels)
    assert pixel_sha256(image.pixels.reshape(1, 2, 8)) != image.pixel_sha256
    assert pixel_sha256(image.pixels + np.float32(1e-7)) != image.pixel_sha256


def test_real_images_decode(test_data: Path) -> None:
    for name, channels in (("br35h/train", 1), ("bccd/val", 3), ("hippocampus/val", 1)):
        image = read_image(find_sources(test_data / name)[0])
        assert image.pixels.shape[0] == channels
        assert 0 <= image.pixels.min() < image.pixels.max() <= 1
