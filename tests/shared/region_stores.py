"""Small region stores for tests."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.artifact import Card, publish
from shared.region_writer import (
    Sample,
    ShardJournal,
    assemble_shard,
    create_store,
    drop_journal,
    finalise,
    pending_shards,
)

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass
class Content:
    """What a store should hold: maps [N, K, *grid], detections by row, rows without maps."""

    maps: np.ndarray
    boxes: list[Boxes]
    quarantined: Collection[int] = ()
    regions: tuple[str, ...] = ()

    @property
    def sample_ids(self) -> list[str]:
        return [f"sample-{row:04d}" for row in range(len(self.maps))]


def make_content(
    samples: int = 20,
    regions: int = 2,
    grid: Sequence[int] = (8, 12),
    quarantined: Collection[int] = (3,),
    seed: int = 0,
) -> Content:
    rng = np.random.default_rng(seed)
    # Few distinct values: chunks that really compress.
    maps = rng.integers(0, 4, (samples, regions, *grid), dtype=np.uint8) * 80
    maps[::5, 0] = 0
    boxes = []
    for row in range(samples):
        count = 0 if row in quarantined else int(rng.integers(0, 4))
        boxes.append(
            (
                rng.integers(0, 4096, (count, 4), dtype=np.int32),
                rng.integers(0, 65536, count, dtype=np.uint16),
                rng.integers(0, regions, count, dtype=np.uint16),
            )
        )
    for row in quarantined:
        maps[row] = 255
    return Content(maps, boxes, quarantined, tuple(f"region {number}" for number in range(regions)))


def sample(content: Content, row: int) -> Sample:
    if row in content.quarantined:
        return Sample(content.sample_ids[row])
    spatial = (100,) * (content.maps.ndim - 2)
    return Sample(content.sample_ids[row], "0" * 64, "1" * 64, (1, *spatial), (0.7,) * len(spatial), None, "patient")


def append(journal: ShardJournal, content: Content, row: int) -> None:
    if row in content.quarantined:
        journal.append_quarantined(
            row, sample(content, row), reason="decode_failed", stage="read", message="truncated file"
        )
    else:
        journal.append_maps(row, sample(content, row), content.maps[row], *content.boxes[row])


def begin(folder: Path, content: Content) -> None:
    create_store(folder, sample_ids=content.sample_ids, regions=content.regions, grid=content.maps.shape[2:])


def write(folder: Path, content: Content) -> Card:
    """The whole of a job, which also continues an interrupted one."""
    begin(folder, content)
    for shard in pending_shards(folder):
        with ShardJournal(folder, shard) as journal:
            for row in journal.missing:
                append(journal, content, row)
            assemble_shard(journal)
    outputs = finalise(folder)
    drop_journal(folder)
    return publish(folder, kind="region-store", inputs=[], spec={"purpose": "test"}, outputs=outputs)
