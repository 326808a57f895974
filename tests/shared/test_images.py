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
from shared.pseudonyms import pseudonym
from tests.shared.dicom_files import SAMPLES, write_dicom

RAMP = np.arange(600, dtype=np.uint16).reshape(20, 30)


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


def test_dicom_is_found_by_suffix_or_by_its_mark_and_named_by_pseudonyms(tmp_path: Path) -> None:
    names = ("DOE_JOHN/scan.dcm", "DOE_JOHN/1.2.840.113619.2.5", "IM0001", "b.DICOM")
    for name in names:
        write_dicom(tmp_path / name, RAMP)
    for other in ("DICOMDIR", "notes.txt", ".IM0002"):
        (tmp_path / other).write_bytes((tmp_path / "IM0001").read_bytes() if "." not in other[1:] else b"x" * 200)
    picture(tmp_path / "p.png")
    found = find_sources(tmp_path)
    assert {source.known_as for source in found} == {*names, None}
    by_name = {source.known_as: source for source in found}
    assert by_name[None].sample_id == "p.png"
    for name in names:
        assert by_name[name].sample_id == pseudonym("dicom", name)
        assert by_name[name].group == pseudonym("patient", "P1")
        assert read_image(by_name[name]).pixels.shape == (1, 20, 30)
    assert "DOE" not in repr(found)


def test_frames_are_samples_of_one_group(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a.dcm", np.stack([RAMP, RAMP + 1, RAMP + 2]), PatientID=None, StudyInstanceUID=None)
    found = find_sources(tmp_path)
    name = pseudonym("dicom", "a.dcm")
    assert [source.sample_id for source in found] == [f"{name}#f000{frame}" for frame in range(3)]
    assert [source.known_as for source in found] == [f"a.dcm#f000{frame}" for frame in range(3)]
    assert {source.group for source in found} == {name}
    write_dicom(tmp_path / "a.dcm", np.stack([RAMP, RAMP]), PatientID=None)
    assert {source.group for source in find_sources(tmp_path)} == {pseudonym("study", "1.2.3")}
    for hostile in (10**9, -4, 0):
        write_dicom(tmp_path / "a.dcm", RAMP, NumberOfFrames=hostile)
        assert len(find_sources(tmp_path)) == 1


def test_a_deflated_header_is_read(tmp_path: Path) -> None:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    stack = np.stack([RAMP, RAMP])
    write_dicom(tmp_path / "a.dcm", stack, syntax=DeflatedExplicitVRLittleEndian, PatientID="P2")
    assert [source.group for source in find_sources(tmp_path)] == [pseudonym("patient", "P2")] * 2


def test_a_broken_dicom_file_stays_one_sample(tmp_path: Path) -> None:
    raw = (SAMPLES / "SC_rgb_rle_2frame.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(raw[:300])
    (tmp_path / "b.dcm").write_bytes(b"")
    assert len(find_sources(tmp_path)) == 2


def test_a_file_without_a_patient_belongs_to_that_of_its_study(tmp_path: Path) -> None:
    patients = {"a": None, "b": "P7", "c": None, "d": "P8", "e": "P9"}
    for name, patient in patients.items():
        study = {"c": "9.9", "d": "5.5", "e": "5.5"}.get(name, "1.2")
        write_dicom(tmp_path / f"{name}.dcm", RAMP, PatientID=patient, StudyInstanceUID=study)
    groups = {source.path.stem: source.group for source in find_sources(tmp_path)}
    expected = {name: pseudonym("patient", patient) for name, patient in patients.items() if patient}
    assert groups == {**expected, "a": expected["b"], "c": pseudonym("study", "9.9")}
    (tmp_path / "list.csv").write_text("image,group\na.dcm,\nb.dcm,g\n")
    assert [source.group for source in find_sources(tmp_path / "list.csv")] == ["g", "g"]
    write_dicom(tmp_path / "f.dcm", RAMP, PatientID=None, StudyInstanceUID="5.5")
    with pytest.raises(UsageError, match="name no patient, in a study whose other files name several: 1"):
        find_sources(tmp_path)


def test_patients_of_a_list_become_groups_by_pseudonym(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "3.png"):
        picture(tmp_path / name)
    write_dicom(tmp_path / "4.dcm", RAMP)
    write_dicom(tmp_path / "5.dcm", RAMP)
    (tmp_path / "list.csv").write_text(
        "image,sample_id,group,patient\n1.png,,,MRN-7\n2.png,,g,MRN-8\n3.png,,,\n4.dcm,DOE-4,,MRN-7\n5.dcm,,,\n"
    )
    found = {source.path.name: source for source in find_sources(tmp_path / "list.csv")}
    seven = pseudonym("patient", "MRN-7")
    assert [found[name].group for name in ("1.png", "2.png", "3.png", "4.dcm")] == [seven, "g", None, seven]
    assert found["5.dcm"].group == pseudonym("patient", "P1")
    assert (found["4.dcm"].sample_id, found["4.dcm"].known_as) == (pseudonym("dicom", "DOE-4"), "DOE-4")
    assert "MRN" not in repr(found)


def test_faults_of_ids_and_links_name_no_dicom_file(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_dicom(home / "list" / "DOE^1.dcm", RAMP)
    write_dicom(home / "list" / "DOE^2.dcm", RAMP)
    (home / "list.csv").write_text("image,sample_id\nlist/DOE^1.dcm,caf\u00e9\nlist/DOE^2.dcm,cafe\u0301\n")
    outside = write_dicom(tmp_path / "DOE^3.dcm", RAMP)
    cases = [(home / "list.csv", "a DICOM file and a DICOM file have the same id")]
    for name, target, said in (
        ("DOE^4.dcm", outside, "a DICOM file: a symbolic"),
        ("DOE", tmp_path, "a folder: a sym"),
    ):
        (home / name.lower()).mkdir()
        (home / name.lower() / name).symlink_to(target)
        cases.append((home / name.lower(), said))
    for root, said in cases:
        with pytest.raises(UsageError, match=said) as caught:
            find_sources(root)
        assert "DOE" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("4.dcm,DOE,,\n5.dcm,DOE,,\n", "rows 2 and 3 have the same id"),
        ("1.png,,a,DOE\n2.png,,b,DOE\n", "rows 2 and 3 put one patient into two groups"),
        ("1.png,,a,DOE\n2.png,,,DOE\n", "rows 2 and 3 put one patient into two groups"),
        ("1.png,,,DOE\n2.png,,a,DOE\n", "rows 2 and 3 put one patient into two groups"),
        ("DOE/4.dcm,,,\n", "row 2: image does not exist"),
        ("/DOE.dcm,,,\n", "row 2: image is not a path inside"),
    ],
)
def test_faults_of_a_list_name_rows_and_no_patients(tmp_path: Path, rows: str, said: str) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    for name in ("4.dcm", "5.dcm"):
        write_dicom(tmp_path / name, RAMP)
    (tmp_path / "list.csv").write_text(f"image,sample_id,group,patient\n{rows}")
    with pytest.raises(UsageError, match=said) as caught:
        find_sources(tmp_path / "list.csv")
    assert "DOE" not in str(caught.value)


def test_a_volume_of_absurd_size_stays_one_sample(tmp_path: Path) -> None:
    import nibabel

    header = nibabel.Nifti2Header()
    header.set_data_shape((4, 4, 1 << 50))
    with (tmp_path / "v.nii").open("wb") as file:
        header.write_to(file)
    assert [source.slice_index for source in find_sources(tmp_path)] == [None]


def listed(tmp_path: Path, name: str, text: str) -> list[Source]:
    for image in ("a.png", "b.png"):
        Pillow.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / image)
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    return find_sources(tmp_path / name)


def test_numbers_in_a_list_are_names_like_any_other(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "sample_id": 0, "group": 0}, {"image": "b.png", "sample_id": 1, "group": 0}]
    found = listed(tmp_path, "list.jsonl", "\n".join(map(json.dumps, rows)))
    assert [(source.sample_id, source.group) for source in found] == [("0", "0"), ("1", "0")]


@pytest.mark.parametrize("value", ["1.0", "NaN", "true", '["P1"]', '{"a": 1}'])
def test_other_json_is_no_name(tmp_path: Path, value: str) -> None:
    for column in ("sample_id", "group", "patient"):
        with pytest.raises(UsageError, match=f"row 1: '{column}' is a"):
            listed(tmp_path, "list.jsonl", f'{{"image": "a.png", "{column}": {value}}}')


@pytest.mark.parametrize(
    ("header", "row", "match"),
    [
        ("image,patient_id", "a.png,P1", "unknown column 'patient_id'"),
        ("image,Group", "a.png,g", "unknown column 'Group'"),
        ("image,SampleID", "a.png,x", "unknown column 'SampleID'"),
        ("image,image", "a.png,b.png", "column 'image' is given twice"),
        ("image,group", "a.png,g,more", "row 2: more cells than columns"),
    ],
)
def test_columns_that_would_be_lost_are_refused(tmp_path: Path, header: str, row: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        listed(tmp_path, "list.csv", f"{header}\n{row}\n")


def test_spaces_around_columns_lines_in_cells_and_columns_of_the_users_own(tmp_path: Path) -> None:
    found = listed(tmp_path, "list.csv", 'image, group,note\na.png,g1,"two\nlines"\nb.png,g\u20282,\x0b\n')
    assert [source.group for source in found] == ["g1", "g\u20282"]
