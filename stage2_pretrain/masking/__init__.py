"""Mask policies: where to hide and how many; they never draw. Add a file and one line here.

A policy is a class with ``Options``, ``version``, ``strata`` and ``tables`` (`stage2_pretrain.masking.plan`). One
that follows a network also has ``guide`` and ``levels``.
"""

from shared.registry import Registry

POLICIES = Registry(
    "policy",
    {
        "attention": "stage2_pretrain.masking.attention:Attention",
        "hard": "stage2_pretrain.masking.hard:Hard",
        "inverted": "stage2_pretrain.masking.inverted:Inverted",
        "oracle": "stage2_pretrain.masking.oracle:Oracle",
        "region": "stage2_pretrain.masking.region:Region",
        "region-hard": "stage2_pretrain.masking.region_hard:RegionHard",
        "region-soft": "stage2_pretrain.masking.region_soft:RegionSoft",
        "shuffled": "stage2_pretrain.masking.shuffled:Shuffled",
        "uniform": "stage2_pretrain.masking.uniform:Uniform",
    },
)
