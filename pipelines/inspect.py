"""`inspect`: what an artifact is, and what a region store knows of one sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.artifact import read_card
from shared.errors import UsageError


def inspect_artifact(path: Path) -> dict[str, Any]:
    """The facts of a card, in the order a reader wants them."""
    card = read_card(path)
    identity, provenance = card.identity, card.provenance
    facts: dict[str, Any] = {
        "kind": f"{identity.kind} {identity.kind_version}",
        "id": f"sha256:{card.artifact_id}",
        "created": f"{provenance.created} by {provenance.tool}",
        "command": provenance.command,
    }
    facts |= {f"input {item.role}": f"{item.kind} sha256:{item.artifact_id}" for item in identity.inputs}
    facts |= {f"output {key}": value for key, value in identity.outputs.items()}
    facts |= {f"metric {key}": value for key, value in provenance.metrics.items()}
    facts["files"] = len(provenance.files)
    facts["notice"] = provenance.notice
    return facts


def inspect_sample(path: Path, sample: str, images: Path | None, out: Path | None) -> dict[str, Any]:
    """What a region store knows of one sample; with images and ``out`` also a picture.

    Args:
        path: A region store.
        sample: Sample id.
        images: The store's images.
        out: PNG to write: the image beside one overlay a region.

    Raises:
        UsageError: ``out`` without ``images``, or an id that the store does not have.
    """
    from shared.regions import open_region_store

    if out is not None and images is None:
        raise UsageError("--out needs --images", hint="the store holds maps, not pixels")
    store = open_region_store(path)
    row = store.row(sample)
    known = store.samples[row]
    facts: dict[str, Any] = {"sample": sample, "row": row, "status": known.status, "shape": list(known.shape or ())}
    if known.status == "ok":
        for name, region_map in zip(store.regions, store.maps([row])[0], strict=True):
            facts[f"region {name}"] = f"{float((region_map >= 127).mean()):.1%} of the image at 0.5 or above"
    if out is not None and images is not None:
        _draw(store, row, sample, images, out)
        facts["picture"] = out.as_posix()
    return facts


def _draw(store: Any, row: int, sample: str, images: Path, out: Path) -> None:
    import numpy as np
    from PIL import Image

    from shared.figures import overlay
    from shared.images import find_sources, read_image

    source = next((item for item in find_sources(images) if item.sample_id == sample), None)
    if source is None:
        raise UsageError(f"--images {images}: has no sample '{sample}'")
    pixels = read_image(source).pixels
    panels = [overlay(pixels)] + [overlay(pixels, region_map / 254) for region_map in store.maps([row])[0]]
    Image.fromarray(np.concatenate(panels, axis=1)).save(out)
