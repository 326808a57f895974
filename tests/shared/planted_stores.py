"""Region stores of real files with maps that a test has drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from shared.artifact import publish
from shared.errors import DecodeError
from shared.images import Image, Source, find_sources, read_image
from shared.region_writer import (
    Sample,
    ShardJournal,
    assemble_shard,
    create_store,
    drop_journal,
    finalise,
    pending_shards,
)
from shared.regions import RegionStore, encode_boxes, encode_scores, open_region_store

Draw = Callable[[Source, Image], np.ndarray]


def plant_store(
    folder: Path,
    images: Path,
    draw: Draw,
    *,
    regions: Sequence[str] = ("left lung", "../x"),
    grid: tuple[int, int] = (16, 24),
    without: Sequence[str] = (),
) -> RegionStore:
    """Publish a store: ``draw`` gives uint8 [K, *grid] for each image; those of ``without`` are quarantined."""
    sources = {source.sample_id: source for source in find_sources(images)}
    names = sorted(sources)
    create_store(folder, sample_ids=names, regions=regions, grid=grid)
    boxes, scores = encode_boxes(np.array([[1.0, 2.0, 5.5, 9.0]])), encode_scores(np.array([0.75]))
    last = np.array([len(regions) - 1], np.uint16)
    for shard in pending_shards(folder):
        with ShardJournal(folder, shard) as journal:
            for row in journal.missing:
                source = sources[names[row]]
                try:
                    image = None if source.sample_id in without else read_image(source)
                except DecodeError:
                    image = None
                if image is None:
                    journal.append_quarantined(
                        row, Sample(names[row]), reason="decode_failed", stage="read", message="truncated"
                    )
                    continue
                sample = Sample(
                    names[row],
                    image.source_sha256,
                    image.pixel_sha256,
                    image.pixels.shape,
                    image.spacing_mm,
                    None,
                    source.group,
                )
                journal.append_maps(row, sample, draw(source, image), boxes, scores, last)
            assemble_shard(journal)
    outputs = finalise(folder)
    drop_journal(folder)
    spec = {
        "regions": [{"name": name, "texts": [name, f"a {name}"]} for name in regions],
        "grounder": {"name": "drawn"},
        "segmenter": {"name": "none"},
    }
    publish(folder, kind="region-store", inputs=[], spec=spec, outputs=outputs)
    return open_region_store(folder)
