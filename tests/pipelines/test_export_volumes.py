"""Stores of slices put back into volumes, and nnU-Net folders: every voxel where it was drawn."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from shared.images import Image as Pixels
from shared.images import Source
from shared.orientation import Grid, to_canonical
from tests.shared.planted_stores import plant_store
from tests.shared.test_orientation import AFFINE

SHAPE = (8, 12, 6)  # x to the right, y anterior, z up
GRID = (12, 8)  # of maps: a slice's own, rows from anterior to posterior, so that nothing is interpolated
PATIENT = b"Jane Roe 1.1.1970"


def drawn(region: int) -> np.ndarray:
    """A region [x, y, z] without any symmetry, uint8 0..254."""
    values = np.random.default_rng(region).integers(0, 255, SHAPE, dtype=np.uint8)
    values[0, 0, 0], values[-1, 2, 1] = 254, 1
    return values


def stored(codes: str) -> np.ndarray:
    """Affine of a file whose axes run along ``codes``, of a patient who lies askew."""
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    return AFFINE @ nibabel.orientations.inv_ornt_aff(turn, SHAPE)


def write_volumes(folder: Path, codes: tuple[str, ...]) -> None:
    folder.mkdir()
    voxels = np.random.default_rng(9).integers(-500, 1500, SHAPE).astype(np.int16)
    for place, name in enumerate(codes):
        affine = stored(name)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(name)
        )
        values = np.ascontiguousarray(nibabel.apply_orientation(voxels, turn))
        kind = nibabel.Nifti2Image if place % 2 else nibabel.Nifti1Image
        image = kind(values[..., None] if place == 0 else values, affine)
        if place == 1:  # a scanner's file: the affine is in the quaternion alone
            image.set_qform(affine, 1)
            image.set_sform(None, 0)
        image.header["descrip"] = PATIENT
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", PATIENT))
        nibabel.save(image, folder / f"{name}.nii{'.gz' if place else ''}")


def draw(source: Source, _: Pixels) -> np.ndarray:
    """The planted regions' slices, as a reader of the patient's axes would see them."""
    assert source.slice_index is not None
    return np.stack([drawn(region)[:, ::-1, source.slice_index].T for region in range(2)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    write_volumes(folder / "images", ("LPS", "SRP", "RAS"))
    plant_store(
        folder / "store", folder / "images", draw, regions=("a", "b c"), grid=GRID, without=["RAS.nii.gz#z0002"]
    )
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def canonical(path: Path) -> np.ndarray:
    """Voxels [x, y, z] in RAS+, by nibabel alone."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    return np.asanyarray(image.dataobj).reshape(SHAPE)


def test_every_voxel_is_where_it_was_drawn(root: Path, tmp_path: Path, mwm) -> None:
    out = tmp_path / "x"
    code, told, err = mwm("export", root / "store", "--to", "nifti", "--images", root / "images", "--out", out)
    assert code == 0, err
    assert "6 volumes, their voxels and affines equal" in told
    manifest = rows(out / "volumes.csv")
    assert len(manifest) == 6
    for row in manifest:
        source, found = nibabel.load(root / "images" / row["volume"]), nibabel.load(out / row["file"])
        assert found.shape == source.shape
        np.testing.assert_array_equal(found.affine, source.affine)
        np.testing.assert_array_equal(found.get_qform(), source.get_qform())
        assert found.header.get_zooms() == source.header.get_zooms()
        wanted = drawn(["a", "b c"].index(row["region"])) / np.float32(254)
        if row["volume"].startswith("RAS"):
            assert row["missing_slices"] == "2"
            assert row["slices"] == "5"
            wanted[:, :, 2] = 0
        else:
            assert row["missing_slices"] == ""
        values = canonical(out / row["file"])
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, wanted)
    for path in out.rglob("*"):
        data = path.read_bytes()
        assert PATIENT not in (gzip.decompress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("to", ["nifti", "nnunet"])
def test_a_volume_that_has_changed_is_refused(root: Path, tmp_path: Path, mwm, to: str) -> None:
    shutil.copytree(root / "images", tmp_path / "images")
    image = nibabel.load(root / "images" / "LPS.nii")
    moved = image.affine + np.eye(4)[:, :1] * np.eye(4)[3]  # the same voxels, one mm beside
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), moved), tmp_path / "images" / "LPS.nii")
    images = tmp_path / "images"
    code, _, err = mwm("export", root / "store", "--to", to, "--images", images, "--out", tmp_path / "x")
    assert code == 4
    assert "when it was localized" in err
    assert not (tmp_path / "x").exists()


def test_labels_follow_the_order_of_the_recipe(root: Path, tmp_path: Path, mwm) -> None:
    out = tmp_path / "x"
    settings = ["--set", "content=labels", "--set", "threshold=0.75"]
    code, _, err = mwm("export", root / "store", "--to", "nifti", "--images", root / "images", "--out", out, *settings)
    assert code == 0, err
    wanted = np.zeros(SHAPE, np.uint8)
    for region in range(2):
        wanted[drawn(region) >= 0.75 * 254] = region + 1
    found = {row["volume"]: canonical(out / row["file"]) for row in rows(out / "volumes.csv")}
    assert found["LPS.nii"].dtype == np.uint8
    np.testing.assert_array_equal(found["LPS.nii"], wanted)
    np.testing.assert_array_equal(found["SRP.nii.gz"], wanted)


@pytest.mark.parametrize("overlap", ["later", "regions"])
def test_nnunet_volumes(root: Path, tmp_path: Path, mwm, overlap: str) -> None:
    out = tmp_path / "Dataset001_Test"
    settings = ["--set", f"overlap={overlap}", "--set", "channel=CT"]
    code, told, err = mwm(
        "export", root / "store", "--to", "nnunet", "--images", root / "images", "--out", out, *settings
    )
    assert code == 0, err
    assert "1 volume with 1 slices without maps" in told  # as background, nnU-Net would learn it
    dataset = json.loads((out / "dataset.json").read_bytes())
    assert dataset["channel_names"] == {"0": "CT"}
    assert (dataset["numTraining"], dataset["file_ending"]) == (2, ".nii.gz")
    cases = rows(out / "cases.csv")
    assert [case["sample_id"] for case in cases] == ["LPS.nii", "SRP.nii.gz"]
    for case in cases:
        image = nibabel.load(out / "imagesTr" / f"{case['case']}_0000.nii.gz")
        label = nibabel.load(out / "labelsTr" / f"{case['case']}.nii.gz")
        source = nibabel.load(root / "images" / case["sample_id"])
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), np.asanyarray(source.dataobj))
        assert image.shape == label.shape == source.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        assert PATIENT not in image.header.binaryblock
        assert not image.header.extensions
        values = canonical(out / "labelsTr" / f"{case['case']}.nii.gz")
        inside = [drawn(region) >= 127 for region in range(2)]
        if overlap == "later":
            assert dataset["labels"] == {"background": 0, "a": 1, "b c": 2}
            assert "regions_class_order" not in dataset
            np.testing.assert_array_equal(values == 2, inside[1])
            np.testing.assert_array_equal(values == 1, inside[0] & ~inside[1])
        else:
            assert dataset["regions_class_order"] == [1, 2]
            for name, wanted in zip(("a", "b c"), inside, strict=True):
                np.testing.assert_array_equal(np.isin(values, dataset["labels"][name]), wanted)


def test_nnunet_flat_images(tmp_path: Path, mwm) -> None:
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (20, 30), dtype=np.uint8), rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "images" / "grey.png")
    Image.fromarray(colour).save(tmp_path / "images" / "colour.png")
    maps = np.zeros((1, 16, 24), np.uint8)
    maps[:, :8] = 254
    plant_store(tmp_path / "store", tmp_path / "images", lambda *_: maps, regions=("lung",))
    images = tmp_path / "images"
    code, _, err = mwm("export", tmp_path / "store", "--to", "nnunet", "--images", images, "--out", tmp_path / "x")
    assert code == 0, err
    dataset = json.loads((tmp_path / "x" / "dataset.json").read_bytes())
    assert dataset["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert dataset["overwrite_image_reader_writer"] == "NaturalImage2DIO"
    case = {row["sample_id"]: row["case"] for row in rows(tmp_path / "x" / "cases.csv")}
    for name, wanted in (("colour.png", colour), ("grey.png", np.repeat(grey[..., None], 3, -1))):
        image = np.asarray(Image.open(tmp_path / "x" / "imagesTr" / f"{case[name]}_0000.png"))
        np.testing.assert_array_equal(image, wanted)
        label = np.asarray(Image.open(tmp_path / "x" / "labelsTr" / f"{case[name]}.png"))
        half = np.arange(len(wanted))[:, None] < (len(wanted) + 1) // 2
        np.testing.assert_array_equal(label, np.broadcast_to(half, wanted.shape[:2]))


def test_a_name_that_nnunet_keeps_is_refused(tmp_path: Path, mwm) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "images" / "a.png")
    maps = np.zeros((1, 16, 24), np.uint8)
    plant_store(tmp_path / "store", tmp_path / "images", lambda *_: maps, regions=("Background",))
    images = tmp_path / "images"
    code, _, err = mwm("export", tmp_path / "store", "--to", "nnunet", "--images", images, "--out", tmp_path / "x")
    assert code == 2
    assert "nnU-Net keeps this name" in err


def test_the_planted_axes_are_askew() -> None:
    assert Grid.of(SHAPE, stored("RAS")).spacing_mm().round(3).tolist() == [2, 3, 4]
    turned = to_canonical(np.empty((6, 8, 12)), Grid.of((6, 8, 12), stored("SRP")))
    assert turned.shape == SHAPE
