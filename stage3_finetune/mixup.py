"""Mixup: images and their targets blended in pairs, as names say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from shared.rng import draw_u32, sample_keys, seed_key


def draw_mixup(
    sample_ids: Sequence[str], epoch: int, *, seed: int, alpha: float
) -> tuple[list[int], Float[np.ndarray, "B"]]:
    """Partner and own share of each sample of a batch: a function of seed, ids and epoch.

    Samples are put in a circle in the order of a drawn word; each is blended with the next one. Its own share is
    max(s, 1 - s) of s ~ Beta(alpha, alpha), by inversion of the distribution at a second word.

    Args:
        sample_ids: Of the batch, distinct.
        epoch: From 0.
        seed: Run seed.
        alpha: Above 0; near 0 hardly anything is blended.

    Source: Zhang et al., mixup (ICLR 2018).
    """
    from scipy.special import betaincinv

    keys = sample_keys(sample_ids)
    words = draw_u32(seed_key("finetune/mixup", seed), keys, epoch=epoch, n=2)
    circle = np.lexsort((keys, words[:, 0]))
    partner = np.empty(len(circle), np.int64)
    partner[circle] = np.roll(circle, -1)
    share = betaincinv(alpha, alpha, (words[:, 1] + 0.5) / 2.0**32)
    return partner.tolist(), np.maximum(share, 1 - share)


def mix(values: Float32[Tensor, "B ..."], partner: Sequence[int], share: Float[np.ndarray, "B"]) -> Tensor:
    """Each row blended with its partner's."""
    own = torch.from_numpy(share).to(values).reshape(-1, *[1] * (values.dim() - 1))
    return own * values + (1 - own) * values[list(partner)]
