"""A small published region store over real files, for runs of the whole stage."""

from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from shared.artifact import publish
from shared.images import find_sources, read_image
from shared.region_writer import (
    Sample,
    ShardJournal,
    assemble_shard,
    create_store,
    drop_journal,
    finalise,
    pending_shards,
)

NO_BOXES = np.zeros((0, 4), np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint16)


def write_discs(folder: Path, count: int) -> Path:
    """Smooth images with one bright disc each, of different sizes."""
    folder.mkdir(parents=True)
    for number in range(count):
        height, width = 70 + number, 90 - number
        y, x = np.mgrid[:height, :width]
        away = np.hypot(y - height * (0.3 + 0.03 * number), x - width * 0.5)
        grey = 60 + 40 * np.sin(x / 9 + number) + 120 * (away < 14)
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


def write_store(images: Path, folder: Path, *, grid_px: int = 64, quarantined: tuple[int, ...] = ()) -> Path:
    """Publish a store whose maps are the bright pixels; one region more is found nowhere."""
    folder.mkdir(parents=True)
    sources = find_sources(images)
    names = [source.sample_id for source in sources]
    create_store(folder, sample_ids=names, regions=("disc", "nothing"), grid=(grid_px, grid_px))
    for shard in pending_shards(folder):
        with ShardJournal(folder, shard) as journal:
            for row in journal.missing:
                append(journal, row, sources[row], grid_px, row in quarantined)
            assemble_shard(journal)
    outputs = finalise(folder)
    drop_journal(folder)
    publish(folder, kind="region-store", inputs=(), spec={"planted": grid_px}, outputs=outputs)
    return folder


def append(journal, row, source, grid_px, absent):
    if absent:
        named = Sample(source.sample_id)
        journal.append_quarantined(row, named, reason="decode_failed", stage="read", message="truncated file")
        return
    image = read_image(source)
    grey = Image.fromarray((image.pixels[0] * 255).astype(np.uint8)).resize((grid_px, grid_px))
    maps = np.zeros((2, grid_px, grid_px), np.uint8)
    maps[0] = (np.asarray(grey) > 150) * np.uint8(254)
    known = sha256(source.path.read_bytes()).hexdigest()
    entry = Sample(source.sample_id, known, image.pixel_sha256, image.pixels.shape, None, None, None)
    journal.append_maps(row, entry, maps, *NO_BOXES)
