"""The images behind a region store: found by sample id, and read only as the files that were localized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import CorruptError, InputMissingError, UsageError
from shared.images import Image, Source, find_sources, read_image
from shared.region_samples import SomeSamples

if TYPE_CHECKING:
    from shared.region_layout import SampleRow

_GIVE = "give the images that the store was made from"


def find_images(samples: Iterable[SampleRow], images: Path) -> dict[str, Source]:
    """Sources of some samples of a store, by sample id.

    Args:
        samples: Those wanted.
        images: Folder or list that the store was made from; it may hold more.

    Raises:
        InputMissingError: No such folder or list, or it lacks a sample.
        UsageError: As `shared.images.find_sources`.
    """
    wanted = {sample.sample_id for sample in samples}
    found = {source.sample_id: source for source in find_sources(images) if source.sample_id in wanted}
    missing = sorted(wanted - found.keys())
    if missing:
        salted = "; DICOM ids also need the salt that they were made with (MWM_SALT_FILE)"
        raise InputMissingError(
            f"images {images}: {len(missing)} of {len(wanted)} samples of the region store are not there, "
            f"first {missing[0]!r}",
            hint=_GIVE + (salted if missing[0].startswith("dicom-") else ""),
        )
    return found


def read_localized(sample: SampleRow, sources: Mapping[str, Source]) -> Image:
    """Decode a sample, if its file is the one that its maps were made from.

    Raises:
        CorruptError: Its bytes are other ones.
        DecodeError: As `shared.images.read_image`.
    """
    image = read_image(sources[sample.sample_id])
    refuse_changed(sample, image.source_sha256)
    return image


def refuse_changed(sample: SampleRow, source_sha256: str) -> None:
    """Raise CorruptError where a file is not the one that the sample's maps were made from."""
    if source_sha256 != sample.source_sha256:
        raise CorruptError(
            f"image {sample.sample_id!r}: sha256 {source_sha256[:12]}, "
            f"was {str(sample.source_sha256)[:12]} when it was localized",
            hint=f"{_GIVE}, or localize again",
        )


def flat_samples(
    samples: Sequence[SampleRow], grid: Sequence[int], wanted: Callable[[SampleRow], bool] = lambda sample: True
) -> SomeSamples:
    """Samples that have maps, of a store of 2D images, read from disk when asked for.

    Args:
        samples: Of the store.
        grid: Of its maps.
        wanted: Which of them are meant.

    Raises:
        UsageError: The store's maps have another number of axes, or no sample has any.
    """
    if len(grid) != 2:
        raise UsageError(f"region store: maps of {len(grid)} axes, expected 2")
    used = SomeSamples(samples, lambda sample: sample.status == "ok" and sample.shape is not None and wanted(sample))
    if not used:
        raise UsageError(f"region store: none of its {len(samples)} samples has region maps")
    return used
