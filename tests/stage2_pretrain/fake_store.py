"""A region store in memory, with the attributes that stage 2 reads."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from shared.images import find_sources, read_image
from shared.merkle import row_digest
from shared.region_layout import ABSENT, SampleRow


class FakeStore:
    """Maps of random blobs for the images of a folder; ``quarantined`` samples have none."""

    def __init__(
        self, images: Path, *, regions: Sequence[str] = ("lung",), map_px: int = 32, quarantined: str = ""
    ) -> None:
        self.regions = tuple(regions)
        self.grid = (map_px, map_px)
        self.samples: list[SampleRow] = []
        rng = np.random.default_rng(0)
        sources = find_sources(images)
        self.all_maps = rng.integers(0, 255, (len(sources), len(regions), map_px, map_px), dtype=np.uint8)
        self.all_maps[:, :, map_px // 2 :] //= 8
        for row, source in enumerate(sources):
            image = read_image(source)
            absent = source.sample_id == quarantined
            if absent:
                self.all_maps[row] = ABSENT
            self.samples.append(
                SampleRow(
                    row=row,
                    sample_id=source.sample_id,
                    status="quarantined" if absent else "ok",
                    source_sha256=sha256(source.path.read_bytes()).hexdigest(),
                    pixel_sha256=image.pixel_sha256,
                    frame={},
                    shape=None if absent else image.pixels.shape,
                    spacing_mm=None,
                    group=None,
                    maps_digest=row_digest(self.all_maps[row]).hex(),
                    detections_digest="",
                )
            )

    @property
    def sample_ids(self) -> list[str]:
        return [sample.sample_id for sample in self.samples]

    def maps(self, rows: Sequence[int]) -> np.ndarray:
        return self.all_maps[list(rows)]


def write_images(folder: Path, count: int, *, seed: int = 0) -> None:
    """Noise images, grey and colour in turn, of different sizes."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = rng.integers(40, 90, 2)
        shape = (height, width, 3) if number % 2 else (height, width)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number:03}.png")
