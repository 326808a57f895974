import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rfc8785

from shared.artifact import Card, Finding, read_card
from shared.region_shards import crc32c, encode_chunk
from shared.regions import verify_store
from tests.shared.region_stores import make_content, write

CONTENT = make_content(20, quarantined=(3,))  # two rows a shard
SHARD = "regions.zarr/maps/c.2.0.0.0"  # rows 4 and 5
SMALL = "regions.zarr/maps_quarter/c.2.0.0.0"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Card]:
    path = tmp_path_factory.mktemp("verify") / "store"
    return path, write(path, CONTENT)


@pytest.fixture
def store(published: tuple[Path, Card], tmp_path: Path) -> tuple[Path, Card]:
    shutil.copytree(published[0], tmp_path / "store")
    return tmp_path / "store", published[1]


def rebuild(path: Path, order: list[bytes]) -> None:
    """Write a shard with a right index and right checksums, as somebody who means to deceive would."""
    ends = np.cumsum([0, *(len(chunk) for chunk in order)])
    index = np.array([(ends[place], len(chunk)) for place, chunk in enumerate(order)], "<u8").tobytes()
    path.write_bytes(b"".join(order) + index + crc32c(index))


def chunks(path: Path) -> list[bytes]:
    data = path.read_bytes()
    spans = struct.unpack("<4Q", data[-36:-4])
    return [data[start : start + length] for start, length in (spans[:2], spans[2:])]


def test_a_sound_store_has_no_findings(published: tuple[Path, Card]) -> None:
    assert verify_store(*published) == []
    assert verify_store(*published, rows=4) == []
    assert verify_store(*published, rows=1000) == []
    assert verify_store(*published, rows=[0, 7, 7]) == []


def test_a_flipped_bit_anywhere_is_found(published: tuple[Path, Card]) -> None:
    path, card = published
    rng = np.random.default_rng(0)
    files = [file for file in sorted((path / "regions.zarr").rglob("*")) if file.name.startswith("c.")]
    assert len(files) == 20 + 4
    flips = [(files[number], None) for number in rng.integers(0, len(files), 40)]
    flips += [(path / SHARD, -place) for place in range(1, 37)]  # every byte of an index
    for file, place in flips:
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole))) if place is None else place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            found = verify_store(path, card)
        finally:
            file.write_bytes(whole)
        assert found, f"{file.name} {place}"
        array = file.parent.name
        assert any(array in finding.file + finding.problem for finding in found), found
    assert verify_store(path, card) == []


def cut(path: Path) -> None:
    (path / SHARD).write_bytes((path / SHARD).read_bytes()[:-7])


def cut_to_nothing(path: Path) -> None:
    (path / SHARD).write_bytes(b"")


def append_bytes(path: Path) -> None:
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(b"\0" * 16 + data)


def delete_shard(path: Path) -> None:
    (path / SHARD).unlink()


def delete_small(path: Path) -> None:
    (path / SMALL).unlink()


def delete_boxes(path: Path) -> None:
    (path / "regions.zarr/boxes/c.0.0").unlink()


def delete_arrays(path: Path) -> None:
    shutil.rmtree(path / "regions.zarr")


def swap_chunks(path: Path) -> None:
    rebuild(path / SHARD, chunks(path / SHARD)[::-1])


def swap_shards(path: Path) -> None:
    other = path / "regions.zarr/maps/c.4.0.0.0"
    first, second = (path / SHARD).read_bytes(), other.read_bytes()
    (path / SHARD).write_bytes(second)
    other.write_bytes(first)


def forge_row(path: Path) -> None:
    row = CONTENT.maps[4].copy()
    row[0, 0, 0] ^= 1
    rebuild(path / SHARD, [encode_chunk(row, compressed=True), chunks(path / SHARD)[1]])


def forge_quarter(path: Path) -> None:
    row = np.zeros((2, 2, 3), np.uint8)
    rebuild(path / SMALL, [encode_chunk(row, compressed=False), chunks(path / SMALL)[1]])


def forge_size(path: Path) -> None:
    row = np.zeros((2, 8, 16), np.uint8)
    rebuild(path / SHARD, [encode_chunk(row, compressed=True), chunks(path / SHARD)[1]])


def drop_chunk(path: Path) -> None:
    first = chunks(path / SHARD)[0]
    index = struct.pack("<4Q", 0, len(first), 2**64 - 1, 2**64 - 1)
    (path / SHARD).write_bytes(first + index + crc32c(index))


def share_chunk(path: Path) -> None:
    first = chunks(path / SHARD)[0]
    index = struct.pack("<4Q", 0, len(first), 0, len(first))
    (path / SHARD).write_bytes(first + index + crc32c(index))


def point_outside(path: Path) -> None:
    data = (path / SHARD).read_bytes()
    index = struct.pack("<4Q", 0, 50, 2**63, 2**62)
    (path / SHARD).write_bytes(data[:-36] + index + crc32c(index))


def stray_file(path: Path) -> None:
    (path / "regions.zarr/maps/c.10.0.0.0").write_bytes(b"x")


def stray_folder(path: Path) -> None:
    (path / "regions.zarr/extra").mkdir()
    (path / "regions.zarr/extra/zarr.json").write_text("{}")


def link_shard(path: Path) -> None:
    shutil.move(path / SHARD, path.parent / "shard")
    (path / SHARD).symlink_to(path.parent / "shard")


def link_arrays(path: Path) -> None:
    shutil.move(path / "regions.zarr", path.parent / "regions.zarr")
    (path / "regions.zarr").symlink_to(path.parent / "regions.zarr")


def edit_fill_value(path: Path) -> None:
    metadata = path / "regions.zarr/maps/zarr.json"
    metadata.write_bytes(metadata.read_bytes().replace(b"255", b"0"))


def huge_shape(path: Path) -> None:
    metadata = path / "regions.zarr/boxes/zarr.json"
    body = json.loads(metadata.read_bytes())
    body["shape"][0] = 10**15
    metadata.write_text(json.dumps(body))


def no_metadata(path: Path) -> None:
    (path / "regions.zarr/maps_quarter/zarr.json").unlink()


def edit_line(path: Path) -> None:
    lines = path / "samples.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b'"0.7"', b'"0.9"', 1))


def no_lines(path: Path) -> None:
    (path / "samples.jsonl").unlink()


def binary_lines(path: Path) -> None:
    (path / "samples.jsonl").write_bytes(b"\xff\xfe\n" * 20)


def edit_quarantine(path: Path) -> None:
    (path / "quarantine.jsonl").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (cut, SHARD, "rows 4 to 5"),
        (cut_to_nothing, SHARD, "shorter than its index"),
        (append_bytes, SHARD, "do not fill the shard"),
        (delete_shard, SHARD, "missing"),
        (delete_small, SMALL, "missing"),
        (delete_boxes, "regions.zarr/boxes/c.0.0", "missing"),
        (delete_arrays, "regions.zarr/zarr.json", "missing"),
        (swap_chunks, SHARD, "row 4 (sample-0004): its maps are not"),
        (swap_shards, SHARD, "row 5 (sample-0005): its maps are not"),
        (forge_row, SHARD, "row 4 (sample-0004): its maps are not"),
        (forge_quarter, SMALL, "row 4 (sample-0004): its quarter level"),
        (forge_size, SHARD, "row 4 (sample-0004): its chunk has another size"),
        (drop_chunk, SHARD, "row 5 (sample-0005): its chunk is missing"),
        (share_chunk, SHARD, "do not fill the shard"),
        (point_outside, SHARD, "row 5 (sample-0005): its chunk lies outside"),
        (stray_file, "regions.zarr/maps/c.10.0.0.0", "does not belong"),
        (stray_folder, "regions.zarr/extra/zarr.json", "does not belong"),
        (link_shard, SHARD, "does not belong"),
        (link_arrays, "regions.zarr", "does not belong"),
        (edit_fill_value, "regions.zarr/maps/zarr.json", "changed since"),
        (huge_shape, "regions.zarr/boxes/zarr.json", "changed since"),
        (no_metadata, "regions.zarr/maps_quarter/zarr.json", "missing"),
        (edit_line, "samples.jsonl", "changed since"),
        (no_lines, "samples.jsonl", "missing"),
        (binary_lines, "samples.jsonl", "line 1"),
        (edit_quarantine, "quarantine.jsonl", "changed since"),
    ],
)
def test_damage_is_a_finding(store: tuple[Path, Card], damage: Callable[[Path], None], file: str, problem: str) -> None:
    path, card = store
    damage(path)
    found = verify_store(path, card)
    assert [finding for finding in found if finding.file == file and problem in finding.problem], found


def test_a_lost_shard_is_one_finding(store: tuple[Path, Card]) -> None:
    delete_shard(store[0])
    assert verify_store(*store) == [Finding(SHARD, "missing")]


def test_only_the_rows_asked_are_compared(store: tuple[Path, Card]) -> None:
    forge_row(store[0])
    assert verify_store(*store, rows=[0, 5, 6]) == []
    assert len(verify_store(*store, rows=[4])) == 1
    assert len(verify_store(*store, rows=20)) == 1


def test_lines_that_do_not_add_up_to_the_roots(store: tuple[Path, Card]) -> None:
    """Maps, lines and their digest on the card exchanged together: the root still tells."""
    path, card = store
    forge_row(path)
    outputs = {**card.identity.outputs, "maps_root": "0" * 64}
    forged = card.model_copy(update={"identity": card.identity.model_copy(update={"outputs": outputs})})
    assert "its digests do not add up to the roots on the card" in [item.problem for item in verify_store(path, forged)]


@pytest.mark.parametrize("outputs", [{}, {"samples": "many"}, {"samples": 20, "regions": 3, "grid": [8, 8]}])
def test_a_card_of_something_else_is_a_finding(published: tuple[Path, Card], outputs: dict[str, object]) -> None:
    path, card = published
    other = card.model_copy(update={"identity": card.identity.model_copy(update={"outputs": outputs})})
    assert [finding.file for finding in verify_store(path, other)] == ["artifact.json"]


@pytest.mark.parametrize("name", ["maps", "box_offsets"])
def test_metadata_that_the_card_lists_but_is_wrong(store: tuple[Path, Card], name: str) -> None:
    """A card made over broken metadata: no exception either."""
    path, card = store
    for body in ({}, {"shape": [20], "chunk_grid": {"configuration": {"chunk_shape": [0]}}}, {"shape": 3}, [1]):
        metadata = path / "regions.zarr" / name / "zarr.json"
        metadata.write_bytes(rfc8785.dumps(body))
        files = {**card.provenance.files, f"regions.zarr/{name}/zarr.json": sha256(metadata)}
        forged = card.model_copy(update={"provenance": card.provenance.model_copy(update={"files": files})})
        assert verify_store(path, forged)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_card_survives_reading(published: tuple[Path, Card]) -> None:
    assert verify_store(published[0], read_card(published[0], "region-store")) == []


def test_an_unreadable_file_is_a_finding_too(store: tuple[Path, Card]) -> None:
    path, card = store
    (path / SHARD).unlink()
    os.mkdir(path / SHARD)
    assert [finding for finding in verify_store(path, card) if finding.file == SHARD]
