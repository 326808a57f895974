"""Sampler backends: each draws the same bits as `reference`. Add a file and one line here.

Those of the host take coverage and counts; ``fused`` is an operator that begins with the region maps, so that a batch
on a GPU stays there (`stage2_pretrain.kernels.op`).
"""

from shared.registry import Registry

IMPLS = Registry(
    "impl",
    {
        "cpu": "stage2_pretrain.kernels.cpu:draw_hidden",
        "fused": "stage2_pretrain.kernels.op:draw_hidden",
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
