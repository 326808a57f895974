"""A repository for a model hub: transformers' ``AutoModel`` and ``AutoImageProcessor`` read it, and so does timm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.exportable import Difference, Exportable, compare
from pipelines.exporters.timm_folder import write_timm


def export_huggingface(source: Exportable, folder: Path) -> list[Difference]:
    """Write the folder and compare what transformers makes of it, to the bit: features, and an image's preprocessing.

    Args:
        source: What to export.
        folder: Exists, and is empty.
    """
    write_timm(source, folder)
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    with _quiet(), torch.inference_mode():
        auto: Any = AutoModelForImageClassification if source.classes else AutoModel
        loaded = auto.from_pretrained(folder).eval()
        processor = AutoImageProcessor.from_pretrained(folder)
        pixels = source.pixels()
        read = torch.cat([processor(_picture(image))["pixel_values"] for image in pixels])
        given = loaded(source.normalise(pixels))
    expected = source.outputs(source.model)
    if source.classes:
        found = {"features": loaded.timm_model.forward_features(source.normalise(pixels)), "logits": given.logits}
    else:
        found = {"features": given.last_hidden_state, "embedding": given.pooler_output}
    return [*compare(expected, found), *compare({"input": source.normalise(pixels)}, {"input": read})]


def _picture(pixels: Tensor) -> Image.Image:
    levels = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the user's terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
