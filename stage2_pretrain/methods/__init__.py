"""Pretraining methods by name. Add a file and one line here.

A method is a torch module with ``Options``, ``version``, ``backbone``, ``encoder``, ``grid``,
``loss(image, visible)``, the mean over the hidden patches of ``errors(image, visible)``, ``reconstruct(image,
visible)`` and ``attention(image)``; `PixelMethod` makes three of them from features of patches, and
`stage2_pretrain.methods.simmim` is the shortest.
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
