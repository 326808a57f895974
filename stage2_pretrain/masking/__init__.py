"""Mask policies: where to hide and how many; they never draw. Add a file and one line here.

A policy is a class with ``Options``, ``version``, ``strata`` and ``plan`` (`stage2_pretrain.masking.plan`).
"""

from shared.registry import Registry

POLICIES = Registry(
    "policy",
    {
        "region": "stage2_pretrain.masking.region:Region",
        "uniform": "stage2_pretrain.masking.uniform:Uniform",
    },
)
