"""A folder that ``timm.create_model("local-dir:...", pretrained=True)`` reads.

Source: the layout of timm's own checkpoints (``config.json`` beside ``model.safetensors``).
"""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.exportable import Difference, Exportable, compare
from shared.artifact import write_atomic
from shared.backbones import CONFIG, WEIGHTS


def export_timm(source: Exportable, folder: Path) -> list[Difference]:
    """Write the folder and compare what timm makes of it, to the bit.

    Args:
        source: What to export.
        folder: Exists, and is empty.
    """
    write_timm(source, folder)
    import timm

    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return compare(source.outputs(source.model), source.outputs(loaded))


def write_timm(source: Exportable, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, the values as they were published."""
    # Images are squashed to a square in every stage; encoders of before do not say so, and timm would cut them.
    config = {**source.config, "pretrained_cfg": {"crop_mode": "squash", **source.config["pretrained_cfg"]}}
    write_atomic(folder / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(folder / WEIGHTS, (source.path / source.card.identity.kind / WEIGHTS).read_bytes())
