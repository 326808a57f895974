"""One ONNX file: pixels in [0, 1] go in, the normalisation is part of the graph; any number of images at once.

An encoder gives ``features`` (deepest scale) and ``embedding`` (pooled), a model ``probabilities``, ``logits`` and
``embedding``.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.exportable import BATCH, Difference, Exportable, compare
from shared.artifact import NOT_FOR_DIAGNOSIS, write_atomic
from shared.errors import UsageError

FILE = "model.onnx"
INPUT = "pixels"
OPSET = 20
"""What torch's exporter translates to without a converter; onnxruntime reads it from 1.17 on."""

RELATIVE = 1e-4
"""Largest difference allowed, in float32, in units of the output's largest value: other kernels add in other orders."""

_BYTES_MAX = (1 << 31) - (1 << 24)
_INSTALL = "pip install 'mask-what-matters[onnx]'"


class FromPixels(nn.Module):
    """A timm model that takes pixels in [0, 1] and gives every output of the ONNX file."""

    mean: Tensor
    std: Tensor

    def __init__(self, source: Exportable) -> None:
        super().__init__()
        self.model: Any = source.model
        self.classes = bool(source.classes)
        self.names = ("probabilities", "logits", "embedding") if self.classes else ("features", "embedding")
        self.register_buffer("mean", source.per_channel("mean"))
        self.register_buffer("std", source.per_channel("std"))

    def forward(self, pixels: Float[Tensor, "B C S S"]) -> tuple[Tensor, ...]:
        """The outputs in the order of ``names``."""
        image = (pixels - self.mean) / self.std
        # With the last norm, where an architecture has one, the map is of the features that timm itself gives last.
        last, maps = self.model.forward_intermediates(image, indices=1, norm=True, output_fmt="NCHW")
        embedding = self.model.forward_head(last, pre_logits=self.classes)
        if not self.classes:
            return maps[-1], embedding
        logits = self.model.forward_head(last)
        return logits.softmax(dim=-1), logits, embedding


def export_onnx(source: Exportable, folder: Path) -> list[Difference]:
    """Write the file and compare what onnxruntime makes of it, for one image and for several.

    Args:
        source: What to export.
        folder: Exists, and is empty.

    Raises:
        UsageError: The packages that this takes are absent, or the architecture has no ONNX form.
    """
    check_packages()
    import onnxruntime

    write_atomic(folder / FILE, _serialised(source))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / FILE, options, providers=["CPUExecutionProvider"])
    whole = FromPixels(source).eval()
    found = []
    for count in (1, BATCH):
        pixels = source.pixels(count)
        with torch.inference_mode():
            expected = dict(zip(whole.names, whole(pixels), strict=True))
        given = session.run(list(whole.names), {INPUT: pixels.numpy()})
        read = {name: torch.from_numpy(value) for name, value in zip(whole.names, given, strict=True)}
        found.append(compare(expected, read, relative=RELATIVE))
    return [max(pair, key=_badness) for pair in zip(*found, strict=True)]


def _badness(item: Difference) -> tuple[bool, float]:
    return not item.accepted, item.largest / max(item.scale, 1e-30)  # NaN is not accepted, and compares with nothing


def check_packages() -> None:
    """Raise UsageError where a package of the extra ``onnx`` is absent."""
    from importlib.util import find_spec

    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if absent:
        raise UsageError(f"--to onnx: {', '.join(absent)} not installed", hint=_INSTALL)


def facts(source: Exportable) -> dict[str, str]:
    """What the file says of itself, in its ``metadata_props``."""
    pretrained = source.config["pretrained_cfg"]
    told = {
        "mwm.artifact": f"{source.card.identity.kind} sha256:{source.card.artifact_id}",
        "mwm.input": f"{INPUT}: float32 [batch, {', '.join(map(str, source.input_size))}], pixels in [0, 1]; "
        "mean and std are part of the graph",
        "mwm.mean": json.dumps(pretrained["mean"]),
        "mwm.std": json.dumps(pretrained["std"]),
        "mwm.architecture": source.config["architecture"],
        "mwm.notice": NOT_FOR_DIAGNOSIS,
    }
    return told | ({"mwm.classes": json.dumps(source.classes, ensure_ascii=False)} if source.classes else {})


def _serialised(source: Exportable) -> bytes:
    size = sum(value.numel() * value.element_size() for value in source.model.state_dict().values())
    if size > _BYTES_MAX:
        raise UsageError(f"{size} bytes of weights; one ONNX file holds at most {_BYTES_MAX}")
    whole = FromPixels(source).eval()
    batch = torch.export.Dim("batch")
    with _quiet():
        try:
            program = torch.onnx.export(
                whole,
                (source.pixels(2),),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=[INPUT],
                output_names=list(whole.names),
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            name, told = source.config["architecture"], str(error.__cause__ or error).strip().splitlines()
            raise UsageError(
                f"torch {torch.__version__} cannot write '{name}' as ONNX: {' '.join(told[:1])}"
            ) from error
    assert program is not None
    return _plain(program.model_proto, facts(source))


def _plain(model: Any, props: Mapping[str, str]) -> bytes:
    """Serialise without the exporter's notes: its stack traces hold paths of this machine."""
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for items in (graph.node, graph.value_info):
            for item in items:
                _forget(item)
                graphs += [part.g for part in getattr(item, "attribute", ()) if part.HasField("g")]
        for name in ("input", "output", "initializer"):
            for item in getattr(graph, name, ()):
                if not isinstance(item, str):  # a function's inputs are names alone
                    _forget(item)
        _forget(graph)
    _forget(model)
    for key, value in sorted(props.items()):
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


def _forget(item: Any) -> None:
    item.ClearField("metadata_props")
    item.ClearField("doc_string")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's talk off the user's terminal: what matters is compared afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
