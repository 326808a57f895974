"""Scores of patches for the policies that follow a network: by how badly a teacher draws them, or where it looks.

The teacher is the moving average of the trained weights. Of its scores whole numbers remain (`levels` of a policy),
from which the mask is drawn as any other: an audit draws a witness again from its recorded levels, on any machine.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt64
from torch import Tensor

from stage2_pretrain.masking.plan import build_policy
from stage2_pretrain.masking.sampler import MaskSampler

VIEW = 255
"""View of the teacher's own masks, which no student sees."""


class Guide:
    """A teacher and what it is asked for.

    Args:
        method: Trained; the teacher is a copy of it as it is now.
        asks: ``loss`` or ``attention``, the ``guide`` of a policy.
        seed: Of the run.

    Attributes:
        teacher: In evaluation, without gradients. Whoever trains moves its state dict in place.
    """

    def __init__(self, method: Any, asks: str, *, seed: int) -> None:
        self.teacher: Any = deepcopy(method).eval().requires_grad_(False)
        self._asks = asks
        self._halves = MaskSampler(
            build_policy("uniform", {"hide": 500}), grid=method.grid, seed=seed, regions=("none",), impl="cpu"
        )

    @torch.no_grad()
    def score(
        self, image: Float32[Tensor, "B C S S"], sample_keys: UInt64[np.ndarray, "B"], epoch: int
    ) -> Float32[np.ndarray, "B L"]:
        """Score the patches of a batch; the higher, the rather to be hidden.

        A loss is that of a patch while it is hidden: one half of the patches is drawn from the other, then the other
        from the one. Each sample by itself, whatever the batch.

        Args:
            image: As the method takes it.
            sample_keys: Of the samples.
            epoch: From 0.
        """
        if self._asks == "attention":
            looked: Tensor = self.teacher.attention(image)
            return looked.float().cpu().numpy()
        blank = np.zeros((len(image), self._halves.grid[0] * self._halves.grid[1]), np.uint8)
        hidden = torch.from_numpy(self._halves.draw_covered(blank, sample_keys, epoch, VIEW).hidden).to(image.device)
        grid = (-1, *self._halves.grid)
        one = self.teacher.errors(image, ~hidden.view(grid))
        other = self.teacher.errors(image, hidden.view(grid))
        return torch.where(hidden, one, other).float().cpu().numpy()
