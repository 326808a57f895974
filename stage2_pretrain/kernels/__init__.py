"""Sampler backends: each draws the same bits as `reference`. Add a file and one line here."""

from shared.registry import Registry

IMPLS = Registry(
    "impl",
    {
        "cpu": "stage2_pretrain.kernels.cpu:draw_hidden",
        "reference": "stage2_pretrain.kernels.reference:draw_hidden",
    },
)

POOLS = Registry(
    "pool",
    {
        "cpu": "stage2_pretrain.kernels.pooling:pool",
        "reference": "stage2_pretrain.masking.coverage:pool",
    },
)
"""How coverage is pooled on the host, with the same bits: ``reference`` for that sampler, ``cpu`` for all others."""
