"""M2IB: which tokens of a vision layer a text needs, by a bottleneck of noise (the localiser's mathematics).

At a layer's output x, lambda = sigmoid(alpha) says how much of each element passes, noise replaces the rest:
t = lambda x + (1 - lambda) e, e standard normal. alpha starts at 5 (nearly all passes) and follows Adam on
``beta * mean KL - cos(text, image(t))``, where KL = -0.5 (1 + log var - mu^2 - var) with mu = lambda x and
var = (1 - lambda)^2. A token's saliency is the sum of its KL over channels.

As the release has it: x is taken as it is (no mean or deviation of features enters, its ``vvar`` setting is never
read), alpha has one value a token and channel, CLS included, and the KL is that of the last loss evaluated, so the
last update counts for nothing and is not made here.

Source: Wang, Rudner and Wilson, Visual explanations of image-text representations via multi-modal information
bottleneck attribution (NeurIPS 2023); settings of MedCLIP-SAMv2 (Koleilat et al.).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from shared.rng import below, draw_u32, seed_key

ALPHA_START = 5.0
LEARNING_RATE = 1.0
COSINE_EPS = 1e-6
TABLE_LAYERS = 16
"""The table of normals holds at least so many times what one draw takes."""


def saliency(
    x: Float[Tensor, "T C"],
    text: Float[Tensor, "D"],
    above: Callable[[Float[Tensor, "n T C"]], Float[Tensor, "n D"]],
    noise: Callable[[int], Float[Tensor, "n T C"]],
    *,
    beta: float,
    steps: int,
) -> Float[Tensor, "T"]:
    """Information about the text that each token carries.

    Args:
        x: Tokens of one image at the layer, CLS first.
        text: Embedding of the wording; its length does not matter.
        above: The layers above, with frozen parameters; gradients flow to the tokens alone.
        noise: Step (0 .. steps - 2) -> draws of the noise, all in one batch.
        beta: Weight of the compression against the fit.
        steps: Losses that the published loop evaluates; its last update is not made, see above.

    Returns:
        KL summed over channels, nats, at least 0; of all tokens, CLS first.
    """
    x = x.float()
    alpha = torch.full_like(x, ALPHA_START).requires_grad_()
    optimiser = torch.optim.Adam([alpha], lr=LEARNING_RATE)
    with torch.enable_grad():
        for step in range(steps - 1):
            optimiser.zero_grad()
            kept, lost = alpha.sigmoid(), (-alpha).sigmoid()
            images = above(kept * x + lost * noise(step))
            fit = F.cosine_similarity(text[None].float(), images.float(), eps=COSINE_EPS).mean()
            loss = beta * divergence(alpha, x).mean() - fit
            loss.backward()
            optimiser.step()
    return divergence(alpha.detach(), x).sum(dim=-1)


def divergence(alpha: Float[Tensor, "T C"], x: Float[Tensor, "T C"]) -> Float[Tensor, "T C"]:
    """KL of N(lambda x, (1 - lambda)^2) from N(0, 1), nats; finite where lambda rounds to 1."""
    lost = (-alpha).sigmoid()
    return 0.5 * ((alpha.sigmoid() * x) ** 2 + lost**2 - 1) - F.logsigmoid(-alpha)


class Noise:
    """Standard normals of an image, the same for each of its wordings, so that two maps differ by their words alone.

    Each draw is a stretch of one table. Where it starts is a function of seed, pixels, step and draw: neither
    neighbours, nor order, nor device, nor a library's generator enter. The table is made once: fresh normals for
    every image would cost more than a GPU spends on the rest; one noise for all images would leave one pattern in all.
    """

    def __init__(self, seed: int, shape: tuple[int, int], device: str = "cpu") -> None:
        """Shape: tokens and channels of a layer."""
        self.shape = shape
        self._key = seed_key("m2ib-noise", seed)
        size = 1 << max(16, (TABLE_LAYERS * shape[0] * shape[1] - 1).bit_length())
        self._table = torch.from_numpy(normals(seed, size)).to(device)

    def draw(self, pixels_key: int, step: int, draws: int) -> Float[Tensor, "n T C"]:
        """The noise of a step.

        Args:
            pixels_key: Of the image, below 2^64.
            step: From 0.
            draws: n.
        """
        elements = self.shape[0] * self.shape[1]
        words = draw_u32(self._key, [pixels_key], epoch=step, n=draws)[0]
        starts = below(words, len(self._table) - elements + 1).tolist()
        return torch.stack([self._table[start : start + elements] for start in starts]).view(draws, *self.shape)


def normals(seed: int, size: int) -> Float32[np.ndarray, "n"]:
    """Standard normals by Box and Muller from Philox words; ``size`` is even."""
    words = draw_u32(seed_key("m2ib-table", seed), [0], epoch=0, n=size)[0].astype(np.float64)
    radius = np.sqrt(-2 * np.log((words[0::2] + 1) / 2**32))
    angle = words[1::2] * (2 * np.pi / 2**32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32)
