"""`inspect`: what an artifact is, what a region store knows of a sample, and what an encoder was shown of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.artifact import CARD, find_beside, read_card, write_atomic
from shared.errors import InputMissingError, UsageError
from shared.workspace import refuse_inside_artifact

if TYPE_CHECKING:
    from shared.images import Image
    from shared.region_layout import SampleRow
    from shared.regions import RegionStore
    from stage2_pretrain.redraw import OneMask

_SIDE_PX = 420


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


def inspect_sample(
    path: Path,
    sample: str,
    *,
    images: Path | None = None,
    regions: Path | None = None,
    epoch: int | None = None,
    view: int | None = None,
    out: Path | None = None,
) -> tuple[dict[str, Any], bool]:
    """What is known of one sample; with an encoder, the mask it had in an epoch, drawn again.

    Args:
        path: A region store, an encoder, or a chain's folder, which means its encoder.
        sample: Sample id.
        images: The store's images, for a picture.
        regions: The encoder's region store, where it is not beside it.
        epoch: Of an encoder's run, from 0; negative counts from the end; None: the last.
        view: Draw within the epoch; None: 0.
        out: PNG to write; needs ``images``.

    Returns:
        The facts, and whether the mask is the recorded one (True also where none is recorded).

    Raises:
        UsageError: Ids, epochs or options that do not fit.
        InputMissingError: The encoder's region store is not at hand.
    """
    if out is not None and images is None:
        raise UsageError("--out needs --images", hint="a store holds maps, not pixels")
    if out is not None:
        refuse_inside_artifact(out)
    if not (path / CARD).exists() and (path / "encoder" / CARD).exists():
        path = path / "encoder"
    kind = read_card(path).identity.kind
    if kind not in ("region-store", "encoder", "corpus"):
        raise UsageError(f"{path}: a {kind} holds no samples", hint="--sample needs a region store or an encoder")
    if kind != "encoder" and (epoch is not None or view is not None):
        raise UsageError(f"{path}: a {kind} has no epochs", hint="give the encoder that was made from it")
    if kind == "corpus":
        if out is not None:
            raise UsageError(f"{path}: a corpus lists files", hint="give the region store, for a picture")
        return _listed(path, sample), True
    store = _store_of(path, regions) if kind == "encoder" else _open(path)
    row = _row(store, sample)
    facts: dict[str, Any] = {
        "sample": sample,
        "row": row.row,
        "status": row.status,
        "image": f"{'x'.join(map(str, row.shape or ()))} (channels, rows, columns)" if row.shape else "unknown",
        "source": f"sha256:{row.source_sha256}" if row.source_sha256 else "unknown",
    }
    if row.status != "ok":
        if epoch is not None or out is not None or kind == "encoder":
            raise UsageError(f"sample {sample!r}: has no maps: {_why(store, sample)}")
        return facts | {"quarantined": _why(store, sample)}, True
    maps = store.maps([row.row])[0]
    for name, region_map in zip(store.regions, maps, strict=True):
        facts[f"region {name}"] = f"{float((region_map >= 127).mean()):.1%} of the image at 0.5 or above"
    image = _image(images, row) if images is not None and out is not None else None
    same = True
    if kind == "region-store":
        panels = None if image is None else _panels(store, image, maps)
    else:
        from stage2_pretrain.redraw import redraw_one

        card = read_card(path)
        number = -1 if epoch is None else epoch
        mask = redraw_one(store, card.identity.spec, path, sample, epoch=number, view=view or 0)
        number %= mask.spec.epochs
        told, same = _mask_facts(mask, sample, number, view or 0)
        facts |= told | {"encoder": f"sha256:{card.artifact_id}"}
        panels = None if image is None else _mask_panels(store, image, mask, card.identity.spec, facts)
    facts["region store"] = f"sha256:{store.card.artifact_id}"
    if panels is not None and out is not None:
        from shared.figures import sheet

        if not out.parent.is_dir():
            raise UsageError(f"--out {out}: its folder does not exist")
        write_atomic(out, sheet(panels, foot=f"{sample}, store {store.card.artifact_id[:12]}"))
        facts["picture"] = out.as_posix()
    return facts, same


def _listed(path: Path, sample: str) -> dict[str, Any]:
    """What a corpus says of a sample."""
    from shared.corpus import open_corpus
    from stage2_pretrain.redraw import near

    rows = open_corpus(path)[1]
    found = next(((place, row) for place, row in enumerate(rows) if row.sample_id == sample), None)
    if found is None:
        raise UsageError(f"sample {sample!r}: not in this corpus", hint=near(sample, [row.sample_id for row in rows]))
    place, row = found
    return {
        "sample": sample,
        "row": place,
        "source": f"sha256:{row.source_sha256}",
        "slice": "none: the file is one image" if row.slice_index is None else row.slice_index,
        "group": row.group or "none",
    }


def _open(path: Path) -> RegionStore:
    from shared.regions import open_region_store

    return open_region_store(path)


def _store_of(encoder: Path, regions: Path | None) -> RegionStore:
    """The region store that an encoder was made from: the one given, or one beside it."""
    wanted = next(item.artifact_id for item in read_card(encoder).identity.inputs if item.kind == "region-store")
    if regions is not None:
        store = _open(regions)
        if store.card.artifact_id != wanted:
            found = store.card.artifact_id
            raise UsageError(f"--regions {regions}: sha256:{found[:16]}, the encoder was made from {wanted[:16]}")
        return store
    beside = find_beside(encoder, wanted)
    if beside is not None:
        return _open(beside)
    raise InputMissingError(
        f"{encoder}: its region store sha256:{wanted[:16]} is not beside it", hint="--regions PATH names it"
    )


def _row(store: RegionStore, sample: str) -> SampleRow:
    from stage2_pretrain.redraw import near

    if sample not in set(store.sample_ids):
        raise UsageError(
            f"sample {sample!r}: not in region store {store.path.name}", hint=near(sample, store.sample_ids)
        )
    return store.samples[store.row(sample)]


def _why(store: RegionStore, sample: str) -> str:
    from shared.region_layout import QUARANTINE

    for line in (store.path / QUARANTINE).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("sample_id") == sample:
            return f"{entry['reason']} in stage {entry['stage']}"
    return "quarantined for an unknown reason"


def _image(images: Path, row: SampleRow) -> Image:
    from shared.images import find_sources, read_image

    source = next((item for item in find_sources(images) if item.sample_id == row.sample_id), None)
    if source is None:
        raise UsageError(f"--images {images}: has no sample {row.sample_id!r}")
    image = read_image(source)
    if image.source_sha256 != row.source_sha256:
        raise UsageError(
            f"--images {images}: {row.sample_id!r} is not the file that was localized",
            hint="give the images that the store was made from",
        )
    return image


def _mask_facts(mask: OneMask, sample: str, epoch: int, view: int) -> tuple[dict[str, Any], bool]:
    from stage2_pretrain.steps import INSIDE

    top, left, height, width, _, _, flip, turns = mask.window.tolist()
    spec, inside = mask.spec, mask.coverage >= INSIDE
    moved = [*(["mirrored"] if flip else []), *([f"turned by {turns} quarters"] if turns else [])]
    counts = [
        f"{int((mask.hidden & part).sum())} of {int(part.sum())} {name}"
        for name, part in (("inside regions", inside), ("outside", ~inside))
    ]
    same = mask.recorded is None or bool((mask.recorded == mask.bits).all())
    if mask.recorded is None:
        witness = f"not recorded: {mask.witnesses} of {spec.samples} samples are witnesses, this is none"
    elif same:
        witness = "matches the recorded bits"
    else:
        wrong = int(np.unpackbits(mask.recorded ^ mask.bits).sum())
        witness = f"DIFFERS from the recorded bits in {wrong} of {spec.patches} patches"
    return {
        "epoch": f"{epoch} of 0 to {spec.epochs - 1}" + (f", view {view}" if spec.views > 1 else ""),
        "window": f"rows {top} to {top + height}, columns {left} to {left + width}"
        + (f", {', '.join(moved)}" if moved else ""),
        "patches": f"{spec.grid[0]}x{spec.grid[1]}",
        "policy": f"{spec.policy.name} {spec.policy_at(epoch).options.model_dump_json()}",
        **({"region maps of": mask.maps_of} if mask.maps_of != sample else {}),
        "coverage": f"{mask.coverage.mean() / 254:.1%} of the window",
        "hidden": f"{int(mask.hidden.sum())} of {spec.patches}: {', '.join(counts)}"
        + ("; budget could not be met" if mask.drawn.clamped[0] else ""),
        "draw": f"sha256:{mask.digest(sample, view)}",
        "witness": witness,
    }, same


def _layers(names: Sequence[str], maps: np.ndarray[Any, Any]) -> list[tuple[np.ndarray[Any, Any], Any]]:
    from shared.figures import REGION_COLOURS

    return [
        (region_map.astype(np.float32) / np.float32(254), REGION_COLOURS[place % len(REGION_COLOURS)])
        for place, region_map in enumerate(maps)
    ]


def _panels(store: RegionStore, image: Image, maps: np.ndarray[Any, Any]) -> list[tuple[str, str, Any]]:
    from shared.figures import paint

    layers = _layers(store.regions, maps)
    shown = [("Image", " x ".join(map(str, image.pixels.shape[1:])) + " px", paint(image.pixels, side_px=_SIDE_PX))]
    for name, region_map, layer in zip(store.regions, maps, layers, strict=True):
        told = f"{float((region_map >= 127).mean()):.1%} at 0.5 or above"
        shown.append((name, told, paint(image.pixels, [layer], side_px=_SIDE_PX)))
    return shown


def _mask_panels(
    store: RegionStore, image: Image, mask: OneMask, spec: dict[str, Any], facts: dict[str, Any]
) -> list[tuple[str, str, Any]]:
    from shared.figures import paint
    from stage2_pretrain.data import as_stored, view_image
    from stage2_pretrain.pictures import window_maps

    whole = _outlined(paint(image.pixels, _layers(store.regions, mask.maps), side_px=_SIDE_PX), mask.window)
    seen = view_image(as_stored(image.pixels), mask.window, spec["size_px"], spec["channels"]).numpy()
    layers = _layers(store.regions, window_maps(mask.maps, mask.window) * 254)
    cell = max(1, _SIDE_PX // max(mask.spec.grid))
    blocks = np.kron(mask.coverage.astype(np.float32) / 254, np.ones((cell, cell), np.float32))
    return [
        ("Image", f"regions: {', '.join(store.regions)}; window framed", whole),
        ("Window", f"epoch {facts['epoch'].split()[0]}: {facts['window']}", paint(seen, layers, side_px=_SIDE_PX)),
        ("Coverage of the patches", facts["coverage"], paint(blocks, side_px=_SIDE_PX)),
        ("Hidden", facts["hidden"], paint(seen, layers, mask.hidden, side_px=_SIDE_PX)),
    ]


def _outlined(picture: np.ndarray[Any, Any], window: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A picture of the whole image with the window framed."""
    from PIL import Image, ImageDraw

    top, left, height, width, image_height, image_width, *_ = window.tolist()
    drawn = Image.fromarray(picture)
    y, x = picture.shape[0] / image_height, picture.shape[1] / image_width
    frame = (left * x, top * y, (left + width) * x - 1, (top + height) * y - 1)
    ImageDraw.Draw(drawn).rectangle(frame, outline=(255, 255, 255), width=2)
    return np.asarray(drawn)
