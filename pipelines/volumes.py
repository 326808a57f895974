"""NIfTI volumes behind a store of their axial slices, and files that lie on them: same affine, shape and axes.

Nothing of a source's header but its geometry is copied: free text and extensions may name a patient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float32, Shaped

from pipelines.exportable_store import ExportableStore, refuse_difference
from shared.artifact import file_sha256
from shared.errors import InputMissingError, UsageError
from shared.orientation import Grid, from_canonical, to_canonical
from shared.region_images import refuse_changed
from shared.region_layout import SampleRow

_GEOMETRY = (
    "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


T = TypeVar("T")


@dataclass(frozen=True)
class Volume(Generic[T]):
    """One NIfTI file, and its slices that have maps.

    Attributes:
        volume_id: The slices' id without its ``#z0000``.
        path: The file.
        slices: Axial slice in RAS+, from below -> its sample, or what else is known of it.
        missing: Slices of the file without maps.
        shape: As stored, with trailing axes of one.
        grid: Its three axes as stored.
        group: Of its slices.
    """

    volume_id: str
    path: Path
    slices: Mapping[int, T]
    missing: tuple[int, ...]
    shape: tuple[int, ...]
    grid: Grid
    group: str

    @property
    def row(self: Volume[SampleRow]) -> int:
        """The first of its rows."""
        return min(sample.row for sample in self.slices.values())

    def fill(self, planes: Callable[[T], Shaped[np.ndarray, "H W"]], dtype: Any) -> Shaped[np.ndarray, "*stored"]:
        """Put slices [H, W] back where they were cut, in the file's own order; 0 where one is missing.

        Rows of a slice run from anterior to posterior, columns from left to right (`shared.images.Image`).
        """
        empty = np.zeros(self.grid.shape, dtype)
        turned = to_canonical(empty, self.grid)
        stack = np.zeros(turned.shape, dtype)
        for height, sample in self.slices.items():
            stack[:, :, height] = planes(sample)[::-1].T
        return np.ascontiguousarray(from_canonical(stack, self.grid)).reshape(self.shape)

    def voxels(self) -> Shaped[np.ndarray, "*stored"]:
        """The file's own values, scaled as it says; at most 32 bits each."""
        import nibabel

        source: Any = nibabel.load(self.path)
        values = np.asanyarray(source.dataobj)
        return values.astype(np.float32) if values.dtype.itemsize > 4 else values

    def save(self, path: Path, values: Shaped[np.ndarray, "*stored"]) -> None:
        """Write values on the volume's grid, read the file back, and compare voxels and affine to the bit.

        Raises:
            DriftError: They are not equal.
        """
        import nibabel

        source: Any = nibabel.load(self.path)
        header = type(source.header)()
        for name in _GEOMETRY:
            header[name] = source.header[name]
        header.set_data_dtype(values.dtype)
        type(source)(values, None, header=header).to_filename(path)
        read: Any = nibabel.load(path)
        same = np.array_equal(read.affine, source.affine) and read.shape == source.shape
        refuse_difference(same and np.array_equal(np.asanyarray(read.dataobj), values), path)


def find_volumes(source: ExportableStore) -> Iterator[Volume[SampleRow]]:
    """The volumes of a store, by their first row; samples that are no slice of one are left out, with the reason.

    One by one: of the others, only the places of their slices are in memory.

    Raises:
        UsageError: The store has no slice of a NIfTI volume.
        InputMissingError: The images were not given.
        CorruptError: A file is not the one that was localized.
    """
    if source.sources is None:
        raise InputMissingError(
            "the volumes are needed, for their affines", hint="--images FOLDER, those the store was made from"
        )
    slices: dict[Path, list[tuple[int, int]]] = defaultdict(list)  # in the order of their first rows
    for index, sample in enumerate(source.samples):
        place = source.sources[sample.sample_id]
        if is_slice(source, sample) and place.slice_index is not None:
            slices[place.path].append((place.slice_index, index))
        else:
            source.left_out[sample.sample_id] = "not a slice of a NIfTI volume"
    if not slices:
        raise UsageError(
            "the store has no slice of a NIfTI volume", hint="--to png or --to coco writes maps of flat images"
        )
    for path, found in slices.items():
        yield _volume(path, {height: source.samples[index] for height, index in found})


def is_slice(source: ExportableStore, sample: SampleRow) -> bool:
    """Whether a sample is an axial slice of a NIfTI volume."""
    return source.sources is not None and source.sources[sample.sample_id].path.name.lower().endswith(
        (".nii", ".nii.gz")
    )


def _volume(path: Path, slices: Mapping[int, SampleRow]) -> Volume[SampleRow]:
    first = next(iter(slices.values()))
    digest = file_sha256(path)
    for sample in slices.values():
        refuse_changed(sample, digest)
    return lying_on(path, slices, volume_id=first.sample_id.rpartition("#")[0], group=first.group or "")


def lying_on(path: Path, slices: Mapping[int, T], *, volume_id: str, group: str) -> Volume[T]:
    """A volume of what is known of a file's axial slices, on the file's own grid."""
    import nibabel

    image: Any = nibabel.load(path)
    x, y, z = [*image.shape, 1][:3]
    grid = Grid.of((x, y, z), image.affine)
    count = to_canonical(np.empty(grid.shape, np.bool_), grid).shape[2]
    missing = tuple(sorted(set(range(count)) - set(slices)))
    return Volume(volume_id, path, dict(slices), missing, tuple(image.shape), grid, group)


def probability(levels: Float32[np.ndarray, "*n"]) -> Float32[np.ndarray, "*n"]:
    """Resampled levels as probabilities."""
    return levels / np.float32(254)
