"""Pretraining methods by name. Add a file and one line here.

A method is a torch module with ``Options``, ``version``, ``backbone``, ``encoder``, ``grid``,
``loss(image, visible)`` and ``reconstruct(image, visible)``; `stage2_pretrain.methods.spark` is the example.
"""

from shared.registry import Registry

METHODS = Registry(
    "method",
    {
        "fcmae": "stage2_pretrain.methods.fcmae:FCMAE",
        "mae": "stage2_pretrain.methods.mae:MAE",
        "simmim": "stage2_pretrain.methods.simmim:SimMIM",
        "spark": "stage2_pretrain.methods.spark:SparK",
    },
)
