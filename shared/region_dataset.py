"""A region store as a torch dataset: images beside their region maps, for anybody's training loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from shared.region_images import find_images, flat_samples, read_localized
from shared.regions import RegionStore, decode_probability

Item = dict[str, Any]


class RegionMaps(Dataset[Any]):
    """The samples of a store that have maps, in the store's order; pickles, so loader workers may be spawned.

    An item is a dict, or what ``transform`` makes of it:

    =============  ====================================================================================
    ``maps``       float32 [K, h, w], probability in [0, 1], in the order of ``store.regions``. Its frame is
                   the whole image's, whatever its shape: resize both to one size to lay one on the other
    ``image``      float32 [C, H, W] in [0, 1], C 1 or 3, in the image's own size; only with ``images``
    ``sample_id``  str
    ``row``        int, in the store
    ``group``      str, what must stay on one side of a split; empty where there is none
    =============  ====================================================================================

    Args:
        store: Of 2D images.
        images: Folder or list that the store was made from; None: items without ``image``.
        transform: Takes an item, gives what the loader is to collate. Must pickle for spawned workers.

    Attributes:
        sample_ids: Ids of the items.
        left_out: Quarantined samples, which have no maps and are no items.

    Raises:
        UsageError: No sample has maps, or the store is not of 2D images.
        InputMissingError: The images lack a sample of the store.
    """

    def __init__(
        self,
        store: RegionStore,
        images: Path | str | None = None,
        transform: Callable[[Item], Any] | None = None,
    ) -> None:
        samples = flat_samples(store.samples, store.grid)
        self.store = store
        self.transform = transform
        self.sample_ids, rows = [], []
        for sample in samples:
            self.sample_ids.append(sample.sample_id)
            rows.append(sample.row)
        self.left_out = len(store.samples) - len(samples)
        self._rows = np.array(rows)  # a row's line stays on disk: each takes a kilobyte
        self._sources = None if images is None else find_images(samples, Path(images).absolute())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        sample = self.store.samples[int(self._rows[index])]
        item: Item = {
            "maps": torch.from_numpy(decode_probability(self.store.maps([sample.row])[0])),
            "sample_id": sample.sample_id,
            "row": sample.row,
            "group": sample.group or "",
        }
        if self._sources is not None:
            item["image"] = torch.from_numpy(read_localized(sample, self._sources).pixels)
        return item if self.transform is None else self.transform(item)
