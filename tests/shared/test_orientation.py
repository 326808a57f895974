"""RAS+ and back, for every way in which axes can be stored."""

from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from shared.decode import _volume
from shared.images import find_sources, read_image
from shared.orientation import Grid, from_canonical, to_canonical

VOLUME = np.random.default_rng(1).integers(1, 1000, (4, 5, 6)).astype(np.int16)  # x right, y anterior, z up
TURN = np.radians(5)  # a patient who does not lie straight
AFFINE = np.array(
    [
        [2 * np.cos(TURN), -3 * np.sin(TURN), 0, -7],
        [2 * np.sin(TURN), 3 * np.cos(TURN), 0, 5],
        [0, 0, 4, 11],
        [0, 0, 0, 1],
    ]
)


def stored(axes: tuple[int, ...], flips: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels in the same places, with other axes: values and affine."""
    values = VOLUME.transpose(axes)
    index = np.zeros((4, 4))  # stored index -> RAS+ index
    index[3, 3] = 1
    for place, axis in enumerate(axes):
        index[axis, place] = flips[place]
        if flips[place] < 0:
            values = np.flip(values, place)
            index[axis, 3] = VOLUME.shape[axis] - 1
    return np.ascontiguousarray(values), AFFINE @ index


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_there_and_back_for_all_48_orientations(axes: tuple[int, ...]) -> None:
    for flips in product((1, -1), repeat=3):
        values, affine = stored(axes, flips)
        grid = Grid.of(values.shape, affine)
        canonical = to_canonical(values, grid)
        np.testing.assert_array_equal(canonical, VOLUME)
        np.testing.assert_array_equal(from_canonical(canonical, grid), values)
        np.testing.assert_allclose(grid.spacing_mm(), np.linalg.norm(AFFINE[:3, :3], axis=0))


def test_an_axis_without_direction_is_an_error() -> None:
    with pytest.raises(ValueError, match="without direction"):
        to_canonical(VOLUME, Grid.of(VOLUME.shape, np.diag([1.0, 0.0, 1.0, 1.0])))


def test_an_export_lies_on_the_original(tmp_path: Path) -> None:
    values, affine = stored((2, 0, 1), (-1, 1, -1))
    path = tmp_path / "v.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    sources = find_sources(tmp_path)
    images = [read_image(source) for source in sources]
    assert len(images) == 6
    assert len({image.grid for image in images}) == 1
    grid = images[0].grid
    assert grid is not None
    np.testing.assert_allclose(np.array(grid.affine), affine, atol=1e-5)
    # Slices [H, W] have rows from anterior to posterior: a map of them goes back by the same way.
    stack = np.stack([image.pixels[0] for image in images], axis=-1)[::-1].transpose(1, 0, 2)
    exported = tmp_path / "out.nii"
    nibabel.save(nibabel.Nifti1Image(from_canonical(stack, grid), np.array(grid.affine)), exported)
    one, other = SimpleITK.ReadImage(str(path)), SimpleITK.ReadImage(str(exported))
    assert one.GetSize() == other.GetSize()
    np.testing.assert_allclose(one.GetDirection(), other.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(one.GetOrigin(), other.GetOrigin(), atol=1e-5)
    low, high = np.percentile(values, (0.5, 99.5))
    expected = np.clip((SimpleITK.GetArrayFromImage(one) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(SimpleITK.GetArrayFromImage(other), expected, atol=1e-6)


def test_a_volume_agrees_with_simpleitk(tmp_path: Path) -> None:
    values, affine = stored((1, 2, 0), (1, -1, -1))
    path = tmp_path / "v.nii"
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "RAS")).T
    low, high = np.percentile(theirs, (0.5, 99.5))
    ours = _volume(path, "v", (0, 0)).voxels
    np.testing.assert_allclose(ours, np.clip((theirs - low) / (high - low), 0, 1), atol=1e-6)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_header_may_have_an_extension_of_any_length(tmp_path: Path, kind: type) -> None:
    values, affine = stored((1, 2, 0), (1, -1, -1))
    for name, text in (("none.nii", b""), ("long.nii.gz", b"<AFNI/>" * 900)):
        image = kind(values, affine)
        if text:
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension("afni", text))
        nibabel.save(image, tmp_path / name)
    none, long = (
        [read_image(source).pixels for source in find_sources(tmp_path) if source.sample_id.startswith(name)]
        for name in ("none", "long")
    )
    assert len(none) == VOLUME.shape[2]
    np.testing.assert_array_equal(none, long)
