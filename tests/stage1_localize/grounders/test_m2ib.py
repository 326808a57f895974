"""M2IB against the formulas in plain float64, one draw at a time, and against planted models with known answers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stage1_localize.grounders.m2ib import Noise, divergence, normals, saliency

TOKENS, CHANNELS, WIDTH, DRAWS, STEPS, BETA = 5, 6, 4, 3, 10, 0.1


def draws(step: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(step).standard_normal((DRAWS, TOKENS, CHANNELS)).astype(np.float32))


def adam(alpha: Tensor, gradient: Tensor, m: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
    return alpha - (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8), m, v


def test_it_is_the_formulas() -> None:
    rng = np.random.default_rng(7)
    x, first, second, text = (
        torch.from_numpy(rng.standard_normal(shape)) for shape in ((TOKENS, CHANNELS), (CHANNELS, 8), (8, WIDTH), WIDTH)
    )

    def above(tokens: Tensor) -> Tensor:
        attended = torch.softmax(tokens @ tokens.mT, dim=-1) @ tokens
        return (torch.tanh(attended @ first.to(tokens.dtype)) @ second.to(tokens.dtype)).mean(dim=-2)

    alpha = torch.full((TOKENS, CHANNELS), 5.0, dtype=torch.float64)
    m = v = torch.zeros_like(alpha)
    capacity = torch.zeros_like(alpha)
    for step in range(STEPS):
        alpha = alpha.detach().requires_grad_()
        lam = 1 / (1 + torch.exp(-alpha))
        mu, var = lam * x, (1 - lam) ** 2
        capacity = -0.5 * (1 + torch.log(var) - mu**2 - var)
        cosines = []
        for noise in draws(step).double():
            image = above(lam * x + (1 - lam) * noise)
            cosines.append((image @ text) / (image.norm() * text.norm()))
        loss = BETA * capacity.mean() - sum(cosines) / DRAWS
        (gradient,) = torch.autograd.grad(loss, alpha)
        alpha, m, v = adam(alpha.detach(), gradient, m, v, step + 1)
    found = saliency(x, text, above, draws, beta=BETA, steps=STEPS)
    np.testing.assert_allclose(found.numpy(), capacity.detach().sum(dim=-1).numpy(), rtol=2e-3)


def test_one_patch_that_the_text_needs_stands_out_and_the_rest_follows_the_divergence_alone() -> None:
    needed = 3
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((TOKENS, CHANNELS)).astype(np.float32)) + 2
    project = torch.eye(CHANNELS)[:, :WIDTH]
    found = saliency(x, x[needed] @ project, lambda t: t[:, needed] @ project, draws, beta=BETA, steps=STEPS)
    assert found[1:].argmax() == needed - 1
    assert found[needed] > 3 * found.sort().values[-2]
    # A token that the model never reads: Adam on its own divergence, whatever the noise.
    alpha = torch.full_like(x, 5.0, dtype=torch.float64)
    m = v = torch.zeros_like(alpha)
    for t in range(1, STEPS):
        lam = torch.sigmoid(alpha)
        slope = (lam * x**2 - (1 - lam) + 1 / (1 - lam)) * lam * (1 - lam)
        alpha, m, v = adam(alpha, BETA * slope / x.numel(), m, v, t)
    rest = torch.tensor([token != needed for token in range(TOKENS)])
    np.testing.assert_allclose(found[rest], divergence(alpha, x.double()).sum(-1)[rest], rtol=1e-3)


def test_divergence_is_that_of_two_normals_and_finite_at_the_ends() -> None:
    alpha, x = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.5, -0.5]])
    lam = alpha.sigmoid()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(lam * x, 1 - lam), normal(torch.zeros(1, 2), torch.ones(1, 2)))
    torch.testing.assert_close(divergence(alpha, x), expected)
    assert divergence(torch.tensor([[60.0, -60.0]]), x).isfinite().all()


def test_noise_is_standard_normal_and_a_function_of_its_names() -> None:
    table = normals(0, 1 << 16).astype(np.float64)
    assert abs(table.mean()) < 0.02
    assert table.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(table) < 1).mean() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)
    np.testing.assert_allclose(table[:2], [-0.47390032, -0.6069942], rtol=1e-6)
    noise = Noise(0, (3, 4))
    drawn = noise.draw(12345, 2, 5)
    assert drawn.shape == (5, 3, 4)
    assert torch.equal(drawn, Noise(0, (3, 4)).draw(12345, 2, 5))
    assert torch.equal(drawn[:2], noise.draw(12345, 2, 2))
    for other in (noise.draw(12346, 2, 5), noise.draw(12345, 3, 5), Noise(1, (3, 4)).draw(12345, 2, 5)):
        assert not torch.equal(drawn, other)
