"""Encoders that are published without having been trained, for tests of what is made of them."""

from pathlib import Path
from typing import Any

import torch

from shared.artifact import Card, Input, publish, read_card
from shared.backbones import build, export_encoder
from shared.merkle import tensor_digest

GOLDEN = Path(__file__).parents[1] / "compat" / "v0.1.0"


def plant_encoder(out: Path, name: str, *, size_px: int, in_chans: int = 1, **args: Any) -> Card:
    """Publish an encoder of an architecture with random weights, all else as on the golden encoder's card."""
    stride = args.pop("output_stride", None)
    backbone = build(name, in_chans=in_chans, output_stride=stride, model_args=args, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # statistics of batches and scales that are not those of a constructor
        for value in backbone.model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator) * 0.05)
    out.mkdir(parents=True)
    mean, std = [0.5, 0.4, 0.3][:in_chans], [0.25, 0.2, 0.3][:in_chans]
    export_encoder(backbone, out / "encoder", size_px=size_px, mean=mean, std=std)
    golden = read_card(GOLDEN / "encoder").identity
    state = {key: value.numpy() for key, value in backbone.model.state_dict().items()}
    return publish(
        out,
        kind="encoder",
        inputs=[Input(role=item.role, kind=item.kind, artifact_id=item.artifact_id) for item in golden.inputs],
        spec={**golden.spec, "backbone": name, "size_px": size_px, "channels": in_chans},
        outputs={**golden.outputs, "weights": tensor_digest(state)},
    )
