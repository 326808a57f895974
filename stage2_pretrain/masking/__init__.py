"""Mask policies: where to hide and how many; they never draw. Add a file and one line here.

A policy is a class with ``Options``, ``version``, ``strata`` and ``tables`` (`stage2_pretrain.masking.plan`).
"""

from shared.registry import Registry

POLICIES = Registry(
    "policy",
    {
        "inverted": "stage2_pretrain.masking.inverted:Inverted",
        "region": "stage2_pretrain.masking.region:Region",
        "region-soft": "stage2_pretrain.masking.region_soft:RegionSoft",
        "shuffled": "stage2_pretrain.masking.shuffled:Shuffled",
        "uniform": "stage2_pretrain.masking.uniform:Uniform",
    },
)
