"""NIfTI volumes of probability or of labels, put back on the volumes that were localized slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from pipelines.exportable_store import (
    THRESHOLD,
    ExportableStore,
    Names,
    ReadBack,
    image_size,
    ordered_labels,
    resample,
    table,
)
from pipelines.volumes import find_volumes, probability
from shared.config import Strict
from shared.errors import UsageError
from shared.region_layout import SampleRow

MANIFEST = "volumes.csv"
LABELS_MAX = 255


class NiftiOptions(Strict):
    """Settings of the NIfTI export."""

    content: Literal["probability", "labels"] = Field(
        "probability",
        description="probability: float32 in [0, 1], a file a region. labels: uint8, one file: 0 none, region k as "
        "k + 1 in the order of the recipe; where regions overlap, the later one.",
    )
    threshold: float = THRESHOLD


class NiftiVolumes:
    """See the module."""

    Options = NiftiOptions
    needs_images = True

    def __init__(self, options: NiftiOptions) -> None:
        self.options = options

    def write(self, source: ExportableStore, folder: Path) -> list[ReadBack]:
        """Write one volume of one region at a time; each is read back as soon as it is written."""
        if len(source.regions) > LABELS_MAX and self.options.content == "labels":
            raise UsageError(f"{len(source.regions)} regions: labels of 8 bits hold {LABELS_MAX}")
        names = Names(source.regions)
        count = 0
        with table(folder / MANIFEST, "volume", "group", "region", "file", "slices", "missing_slices") as put:
            for volume in find_volumes(source):
                stem = names.sample(volume.row, volume.volume_id.removesuffix(".gz").removesuffix(".nii"))
                missing = " ".join(map(str, volume.missing))
                for index in self._files(source):
                    name = "labels" if index is None else names.region(index)
                    path = folder / f"{stem}_{name}.nii.gz"
                    volume.save(path, volume.fill(partial(self._plane, source, index), self._dtype))
                    region = "all" if index is None else source.regions[index]
                    put(volume.volume_id, volume.group, region, path.name, len(volume.slices), missing)
                    count += 1
        return [ReadBack("volumes, their voxels and affines", count)]

    def notes(self, source: ExportableStore) -> str:
        """What lies where."""
        if self.options.content == "labels":
            numbers = ", ".join(f"{number} {name}" for number, name in enumerate(source.regions, 1))
            told = f"Labels at probability {self.options.threshold:g} or more: 0 none, {numbers}; of two, the later."
        else:
            told = "Probability in [0, 1], a file a volume and region."
        return (
            f"{told} Affine, shape and axes are the source's; nothing else of its header is copied. `{MANIFEST}` says "
            "which file is of which volume, and which axial slices (from below, in RAS+) had no maps: those hold 0, "
            "which there means unknown."
        )

    @property
    def _dtype(self) -> type:
        return np.float32 if self.options.content == "probability" else np.uint8

    def _files(self, source: ExportableStore) -> Sequence[int | None]:
        return range(len(source.regions)) if self.options.content == "probability" else (None,)

    def _plane(self, source: ExportableStore, region: int | None, sample: SampleRow) -> np.ndarray:
        maps = source.store.maps([sample.row])[0]
        if region is None:
            return ordered_labels(resample(maps, image_size(sample)), self.options.threshold)
        return probability(resample(maps[region : region + 1], image_size(sample)))[0]
