"""In which order samples are seen: a function of seed, sample ids and epoch; never of a generator's past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shared.rng import draw_u32, sample_keys, seed_key


def order(sample_ids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Indices of the samples in the order of an epoch: a function of seed, ids and epoch.

    Each sample draws 64 bits by its own name; adding or removing one moves no other two past each other.

    Args:
        sample_ids: Distinct ids.
        seed: Any integer in [0, 2^64).
        epoch: In [0, 2^24).
    """
    keys = sample_keys(sample_ids)
    words = draw_u32(seed_key("order", seed), keys, epoch=epoch, n=2).astype(np.uint64)
    return [int(i) for i in np.lexsort((keys, words[:, 0] | words[:, 1] << np.uint64(32)))]


def schedule(sample_ids: Sequence[str], batch: int, seed: int, begun: int = 0) -> Iterator[tuple[int, list[int]]]:
    """Endless ``(epoch, indices)`` of the batches from step ``begun`` on.

    Every epoch has every sample once, in ``steps_per_epoch`` batches whose sizes differ by at most one:
    no sample is dropped, and no batch is much smaller than the others.
    """
    count = steps_per_epoch(len(sample_ids), batch)
    epoch, first = divmod(begun, count)
    while True:
        parts = np.array_split(np.array(order(sample_ids, seed, epoch)), count)
        for part in parts[first:]:
            yield epoch, [int(i) for i in part]
        epoch, first = epoch + 1, 0


def steps_per_epoch(samples: int, batch: int) -> int:
    """Batches an epoch: the fewest that hold at most ``batch`` samples each."""
    return -(-samples // batch)
