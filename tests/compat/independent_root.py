"""A second reading of a region store: its ids, samples and roots, from the description of the format alone.

Nothing of this project is imported; arrays are read by tensorstore. Run it on a store::

    python tests/compat/independent_root.py STORE

It prints what it computed as JSON, and one line on stderr for each thing that is not as the card says (exit 1).
What the format is, as far as this needs it:

- ``artifact.json`` is RFC 8785 JSON. ``card_sha256``: sha256 of the RFC 8785 JSON of all its other fields.
  ``artifact_id``: sha256 of the RFC 8785 JSON of ``identity``.
- ``provenance.files``: sha256 of every file but the card itself, ``run/`` and the chunks of ``regions.zarr``.
- ``outputs.samples_sha256`` and ``outputs.quarantine_sha256``: sha256 of those two files.
- Digest of a row: sha256 of its values, little-endian, C order. Digest of ``maps`` (``outputs.maps_root``): sha256 of
  the RFC 8785 JSON of ``{dtype, shape, root}``, root being the RFC 6962 Merkle tree hash (hex) whose entries are the
  32-byte digests of the rows.
- Digest of a row's detections: sha256 over its ``boxes`` int32 [m, 4], ``regions`` uint16 [m] and ``scores`` uint16
  [m], in this order; each as the length (8 bytes, little-endian) of the RFC 8785 JSON of ``{name, dtype, shape}``, that
  JSON, and the values. ``outputs.detections_root``: the Merkle tree hash of these, without dtype or shape.
- ``boxes``, ``scores`` and ``box_regions`` are flat; row i has those from ``box_offsets[i]`` to ``box_offsets[i + 1]``.
- ``maps_quarter``: means of cells of four map pixels a side, rounded half up.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import rfc8785
import tensorstore


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tree_hash(entries: list[bytes]) -> bytes:
    """RFC 6962, section 2.1."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = 1 << (len(entries) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + tree_hash(entries[:k]) + tree_hash(entries[k:])).digest()


def open_array(store: Path, name: str):
    place = {"driver": "file", "path": str(store.resolve() / "regions.zarr" / name) + "/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()


def values(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()


def detections_digest(boxes: np.ndarray, regions: np.ndarray, scores: np.ndarray) -> bytes:
    total = hashlib.sha256()
    for name, array in (("boxes", boxes), ("regions", regions), ("scores", scores)):
        head = rfc8785.dumps({"name": name, "dtype": str(array.dtype), "shape": list(array.shape)})
        total.update(len(head).to_bytes(8, "little") + head + values(array))
    return total.digest()


def quarter(maps: np.ndarray) -> np.ndarray:
    regions, height, width = maps.shape
    cells = maps.astype(np.float64).reshape(regions, height // 4, 4, width // 4, 4).mean(axis=(2, 4))
    return np.floor(cells + 0.5).astype(np.uint8)


def read_card(folder: Path, wrong: list[str]) -> dict:
    raw = (folder / "artifact.json").read_bytes()
    card = json.loads(raw)
    if rfc8785.dumps(card) != raw:
        wrong.append("artifact.json: not RFC 8785")
    if sha256(rfc8785.dumps({key: card[key] for key in card if key != "card_sha256"})) != card["card_sha256"]:
        wrong.append("artifact.json: card_sha256")
    if sha256(rfc8785.dumps(card["identity"])) != card["artifact_id"]:
        wrong.append("artifact.json: artifact_id")
    listed = card["provenance"]["files"]
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name, path in sorted(present.items()):
        if name == "artifact.json" or name.startswith("run/"):
            continue
        if name.startswith("regions.zarr/") and path.name != "zarr.json":
            continue
        if listed.get(name) != sha256(path.read_bytes()):
            wrong.append(f"{name}: not the file that the card lists")
    wrong += [f"{name}: missing" for name in listed if name not in present]
    return card


def read_maps(store: Path, samples: list[dict], wrong: list[str]) -> tuple[list[bytes], list[int]]:
    """Digest of every row of the maps; rows whose bytes cannot be read count as digests of nothing."""
    maps, small = open_array(store, "maps"), open_array(store, "maps_quarter")
    digests = []
    for row, sample in enumerate(samples):
        try:
            one, cells = maps[row].read().result(), small[row].read().result()
        except ValueError as error:
            wrong.append(f"row {row} ({sample['sample_id']}): {str(error)[:80]}")
            digests.append(b"")
            continue
        digests.append(hashlib.sha256(values(one)).digest())
        if digests[-1].hex() != sample["maps_digest"]:
            wrong.append(f"row {row} ({sample['sample_id']}): maps")
        if not np.array_equal(quarter(one), cells):
            wrong.append(f"row {row} ({sample['sample_id']}): quarter level")
    return digests, list(maps.shape)


def read_detections(store: Path, samples: list[dict], wrong: list[str]) -> list[bytes]:
    try:
        boxes, scores, regions, offsets = (
            open_array(store, name).read().result() for name in ("boxes", "scores", "box_regions", "box_offsets")
        )
    except ValueError as error:
        wrong.append(f"detections: {str(error)[:80]}")
        return []
    digests = []
    for row, sample in enumerate(samples):
        part = slice(int(offsets[row]), int(offsets[row + 1]))
        digests.append(detections_digest(boxes[part], regions[part], scores[part]))
        if digests[-1].hex() != sample["detections_digest"]:
            wrong.append(f"row {row} ({sample['sample_id']}): detections")
    return digests


def read_store(store: Path) -> tuple[dict, list[str]]:
    """Ids, counts and roots computed from what lies there, and one line for each thing that the card says otherwise."""
    wrong: list[str] = []
    card, corpus = read_card(store, wrong), read_card(store / "corpus", wrong)
    outputs = card["identity"]["outputs"]
    lines = (store / "samples.jsonl").read_bytes().splitlines()
    samples = [json.loads(line) for line in lines]
    if [sample["row"] for sample in samples] != list(range(len(samples))):
        wrong.append("samples.jsonl: line i is not row i")
    if [sample["sample_id"] for sample in samples] != sorted(sample["sample_id"] for sample in samples):
        wrong.append("samples.jsonl: not sorted by sample_id")
    if b"".join(rfc8785.dumps(sample) + b"\n" for sample in samples) != (store / "samples.jsonl").read_bytes():
        wrong.append("samples.jsonl: not RFC 8785, a line each")
    digests, shape = read_maps(store, samples, wrong)
    detections = read_detections(store, samples, wrong)
    found = {
        "artifact_id": sha256(rfc8785.dumps(card["identity"])),
        "corpus_id": sha256(rfc8785.dumps(corpus["identity"])),
        "samples": len(samples),
        "ok": sum(sample["status"] == "ok" for sample in samples),
        "samples_sha256": sha256((store / "samples.jsonl").read_bytes()),
        "quarantine_sha256": sha256((store / "quarantine.jsonl").read_bytes()),
        "maps_root": sha256(rfc8785.dumps({"dtype": "uint8", "shape": shape, "root": tree_hash(digests).hex()})),
        "detections_root": tree_hash(detections).hex(),
    }
    for key in ("samples", "ok", "samples_sha256", "quarantine_sha256", "maps_root", "detections_root"):
        if found[key] != outputs[key]:
            wrong.append(f"{key}: {found[key]}, the card says {outputs[key]}")
    if found["corpus_id"] not in [item["artifact_id"] for item in card["identity"]["inputs"]]:
        wrong.append("corpus: not the one that the card names")
    return found, wrong


if __name__ == "__main__":
    computed, complaints = read_store(Path(sys.argv[1]))
    print(json.dumps(computed, indent=2))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    sys.exit(bool(complaints))
