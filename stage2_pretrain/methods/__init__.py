"""Pretraining methods by name. Add a file and one line here.

A method is a torch module with ``Options``, ``version``, ``backbone``, ``encoder``, ``grid``,
``loss(image, visible)``, the mean over the hidden patches of ``errors(image, visible)``, ``reconstruct(image,
visible)`` and ``attention(image)``; `stage2_pretrain.methods.spark` is the example.
"""

from shared.registry import Registry

METHODS = Registry("method", {"spark": "stage2_pretrain.methods.spark:SparK"})
