"""Label maps of axial slices, put back into volumes on the originals' affines."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipelines.answers.contract import Asked, Place
from pipelines.exportable_store import Names, table
from pipelines.volumes import lying_on
from shared.errors import UsageError
from shared.images import Source

MANIFEST = "volumes.csv"


class NiftiFiles:
    """See the module."""

    kinds: ClassVar[tuple[str, ...]] = ("labels",)

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        slices = [source for source in asked.sources if self.refuses(source) is None]
        if not slices:
            raise UsageError("--to nifti: the images hold no NIfTI volume", hint="--to png writes maps of flat images")
        self._left = Counter(source.path for source in slices)
        self._planes: dict[Path, dict[int, np.ndarray]] = defaultdict(dict)
        self._rows: dict[Path, int] = {}
        self._told: list[tuple[object, ...]] = []

    def refuses(self, source: Source) -> str | None:
        """What is no slice of a volume has no affine."""
        name = source.path.name.lower()
        return None if name.endswith((".nii", ".nii.gz")) else "not a slice of a NIfTI volume"

    def put(self, place: Place, answer: Any) -> None:
        """Keep the slice until its volume is whole."""
        assert place.source.slice_index is not None
        self._planes[place.source.path][place.source.slice_index] = answer.label
        self._rows.setdefault(place.source.path, place.row)
        self.skip(place.source)

    def skip(self, source: Source) -> None:
        """Count the slice; with the last one the volume is written."""
        if source.path not in self._left:
            return
        self._left[source.path] -= 1
        if not self._left[source.path] and (planes := self._planes.pop(source.path, None)):
            self._write(source, planes)

    def close(self) -> None:
        """Write the manifest."""
        with table(self._asked.folder / MANIFEST, "volume", "group", "file", "slices", "missing_slices") as put:
            for row in self._told:
                put(*row)

    def notes(self) -> str:
        """What the values mean."""
        numbered = ", ".join(f"{number} {name}" for number, name in enumerate(self._asked.classes, 1))
        return (
            f"A NIfTI file of uint8 labels a volume: 0 background, {numbered}. Affine, shape and axes are the "
            f"source's; nothing else of its header is copied. `{MANIFEST}` says which file is of which volume, and "
            "which axial slices (from below, in RAS+) could not be read: those hold 0, which there means unknown. Each "
            "slice was segmented by itself."
        )

    def _write(self, source: Source, planes: dict[int, np.ndarray]) -> None:
        volume_id = source.sample_id.rpartition("#")[0]
        volume = lying_on(source.path, planes, volume_id=volume_id, group=source.group or "")
        stem = Names([]).sample(self._rows[source.path], volume_id.removesuffix(".gz").removesuffix(".nii"))
        path = self._asked.folder / f"{stem}_labels.nii.gz"
        volume.save(path, volume.fill(lambda plane: plane, np.uint8))
        missing = " ".join(map(str, volume.missing))
        self._told.append((volume_id, volume.group, path.name, len(planes), missing))
