"""A raw dataset of nnU-Net v2 whose labels are the region maps, cut: PNG for flat images, NIfTI for volumes.

Source: nnU-Net's description of its dataset format, version 2 (Isensee et al., Nature Methods 2021).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from pydantic import Field

from pipelines.exportable_store import (
    THRESHOLD,
    ExportableStore,
    Names,
    ReadBack,
    cut,
    image_size,
    ordered_labels,
    refuse_difference,
    resample,
    table,
)
from pipelines.volumes import find_volumes, is_slice
from shared.config import Strict
from shared.errors import UsageError
from shared.region_layout import SampleRow

CASES = "cases.csv"
DATASET = "dataset.json"
_IMAGES, _LABELS = "imagesTr", "labelsTr"
_OVERLAP_MAX = 8
_RESERVED = ("background", "ignore")


class NnunetOptions(Strict):
    """Settings of the nnU-Net export."""

    threshold: float = THRESHOLD
    overlap: Literal["later", "regions"] = Field(
        "later",
        description="Where regions overlap. later: the later one of the recipe has the pixel. regions: a number for "
        "every combination of at most 8 regions, for nnU-Net's region-based training.",
    )
    format: Literal["auto", "png", "nifti"] = Field(
        "auto", description="auto: nifti where every sample is a slice of a NIfTI volume, else png."
    )
    channel: str = Field(
        "image", min_length=1, description="Name of a grey channel. 'CT' makes nnU-Net normalise as for CT."
    )


class NnunetFolder:
    """See the module."""

    Options = NnunetOptions
    needs_images = True

    def __init__(self, options: NnunetOptions) -> None:
        self.options = options

    def write(self, source: ExportableStore, folder: Path) -> list[ReadBack]:
        """Write case by case, each read back as soon as it is written; then the list of cases is compared."""
        labels, order = self._labels(source.regions)
        for name in (_IMAGES, _LABELS):
            (folder / name).mkdir()
        flat = self._is_flat(source)
        channels = ["R", "G", "B"] if flat and _colours(source.samples) else [self.options.channel]
        with table(folder / CASES, "case", "sample_id", "group", "source_sha256") as put:
            cases = self._flat_cases(source, folder, len(channels)) if flat else self._volume_cases(source, folder)
            count = 0
            for cells in cases:
                put(*cells)
                count += 1
        if not count:
            raise UsageError("no case is left for nnU-Net", hint="; ".join(sorted(set(source.left_out.values()))))
        ending = ".png" if flat else ".nii.gz"
        body: dict[str, Any] = {
            "channel_names": {str(place): name for place, name in enumerate(channels)},
            "labels": labels,
            **({"regions_class_order": order} if order else {}),
            "numTraining": count,
            "file_ending": ending,
            **({"overwrite_image_reader_writer": "NaturalImage2DIO"} if flat else {}),
            "description": "Labels are region maps, cut: nobody has drawn them. Not for diagnosis.",
            "reference": f"region store sha256:{source.store.card.artifact_id}",
        }
        (folder / DATASET).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        images = {path.name.removesuffix(f"_0000{ending}") for path in (folder / _IMAGES).iterdir()}
        drawn = {path.name.removesuffix(ending) for path in (folder / _LABELS).iterdir()}
        refuse_difference(images == drawn and len(drawn) == count, folder / DATASET)
        return [ReadBack("cases, their images and labels", count)]

    def notes(self, source: ExportableStore) -> str:
        """What lies where."""
        overlap = {
            "later": "Where regions overlap, the later one of the list has the pixel.",
            "regions": "Every combination of regions has a number, so that nnU-Net trains on regions.",
        }
        return (
            "nnU-Net v2 reads this folder as `$nnUNet_raw/DatasetNNN_NAME`: name it so. "
            f"Labels: {', '.join(source.regions)}, at probability {self.options.threshold:g} or more. "
            f"{overlap[self.options.overlap]} The labels are what a tool has found for words: nobody has drawn them. "
            f"`{CASES}` has each case's sample and `group`: nnU-Net splits by case, so where groups have several cases "
            "(slices of one patient), give it a `splits_final.json` that keeps each group on one side. Volumes with a "
            "slice without maps are left out: nnU-Net would learn it as background."
        )

    def _labels(self, regions: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
        """``labels`` and, for overlapping regions, ``regions_class_order`` of ``dataset.json``."""
        if taken := [name for name in regions if name.lower() in _RESERVED]:
            raise UsageError(
                f"region '{taken[0]}': nnU-Net keeps this name for itself", hint="give the region another name"
            )
        if self.options.overlap == "later":
            if len(regions) > 255:
                raise UsageError(f"{len(regions)} regions: labels of 8 bits hold 255")
            return {"background": 0} | {name: number for number, name in enumerate(regions, 1)}, []
        if len(regions) > _OVERLAP_MAX:
            raise UsageError(f"--set overlap=regions: {len(regions)} regions, at most {_OVERLAP_MAX}")
        numbers = range(1, 2 ** len(regions))
        held = {name: [number for number in numbers if number >> bit & 1] for bit, name in enumerate(regions)}
        return {"background": 0, **held}, [1 << bit for bit in range(len(regions))]

    def _label(self, maps: UInt8[np.ndarray, "K h w"], sample: SampleRow) -> UInt8[np.ndarray, "H W"]:
        levels: Float32[np.ndarray, "K H W"] = resample(maps, image_size(sample))
        if self.options.overlap == "later":
            return ordered_labels(levels, self.options.threshold)
        inside = cut(levels, self.options.threshold)
        return np.packbits(inside, axis=0, bitorder="little")[0]

    def _is_flat(self, source: ExportableStore) -> bool:
        slices = Counter(is_slice(source, sample) for sample in source.samples)
        return self.options.format == "png" or (self.options.format == "auto" and slices[False] > 0)

    def _flat_cases(self, source: ExportableStore, folder: Path, channels: int) -> Iterator[tuple[Any, ...]]:
        for sample, maps in source.maps(source.samples):
            case = Names(source.regions).sample(sample.row, sample.sample_id)
            image = source.read_image(sample)
            shallow = channels == 3 or image.intensity.startswith(("uint8", "bit"))
            pixels = np.floor(image.pixels * (255 if shallow else 65535) + 0.5)
            pixels = np.repeat(pixels, channels, axis=0) if len(pixels) < channels else pixels
            values = pixels.transpose(1, 2, 0) if channels == 3 else pixels[0]
            _save(folder / _IMAGES / f"{case}_0000.png", values.astype(np.uint8 if shallow else np.uint16))
            _save(folder / _LABELS / f"{case}.png", self._label(maps, sample))
            yield case, sample.sample_id, sample.group or "", sample.source_sha256

    def _volume_cases(self, source: ExportableStore, folder: Path) -> Iterator[tuple[Any, ...]]:
        for volume in find_volumes(source):
            if volume.missing:
                source.left_out[volume.volume_id] = f"volume with {len(volume.missing)} slices without maps"
                continue
            case = Names(source.regions).sample(volume.row, re.sub(r"\.nii(\.gz)?$", "", volume.volume_id))
            volume.save(folder / _IMAGES / f"{case}_0000.nii.gz", volume.voxels())
            label = volume.fill(lambda item: self._label(source.store.maps([item.row])[0], item), np.uint8)
            volume.save(folder / _LABELS / f"{case}.nii.gz", label)
            yield case, volume.volume_id, volume.group, next(iter(volume.slices.values())).source_sha256


def _colours(samples: Sequence[SampleRow]) -> bool:
    return any((sample.shape or (1,))[0] == 3 for sample in samples)


def _save(path: Path, values: np.ndarray) -> None:
    Image.fromarray(np.ascontiguousarray(values)).save(path, compress_level=1)
    with Image.open(path) as read:
        refuse_difference(np.array_equal(np.asarray(read), values), path)
