import gc
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import region_arrays, regions
from shared.errors import CorruptError, IncompatibleError, InputMissingError, UsageError
from shared.region_layout import quarter
from shared.regions import RegionStore, open_region_store
from tests.conftest import ROOT
from tests.shared.region_stores import Content, begin, make_content, write


@pytest.fixture(scope="module")
def content() -> Content:
    return make_content()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, content: Content) -> Path:
    path = tmp_path_factory.mktemp("regions") / "store"
    write(path, content)
    return path


def check_same(store: RegionStore, content: Content, rows: list[int]) -> None:
    maps = store.maps(rows)
    assert maps.dtype == np.uint8
    assert np.array_equal(maps, content.maps[rows])
    small = np.stack([quarter(content.maps[row]) for row in rows]) if rows else store.maps_quarter([])
    assert np.array_equal(store.maps_quarter(rows), small)
    for row in rows:
        for got, wanted in zip(store.boxes(row), content.boxes[row], strict=True):
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted)


@given(
    st.integers(1, 30),
    st.integers(1, 3),
    st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=3),
    st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, samples: int, regions: int, grid: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    content = make_content(samples, regions, grid, set(np.flatnonzero(rng.random(samples) < 0.2).tolist()), seed)
    path = tmp_path_factory.mktemp("round") / "store"
    outputs = write(path, content).identity.outputs
    store = open_region_store(path)
    check_same(store, content, rng.integers(0, samples, 2 * samples).tolist())
    assert store.grid == tuple(grid)
    assert store.regions == content.regions
    assert len(store) == samples == outputs["samples"] == outputs["ok"] + outputs["quarantined"]
    assert outputs["quarantined"] == len(content.quarantined)
    empty = (content.maps == 0).reshape(samples, regions, -1).all(axis=2).sum(axis=0)
    assert [region["empty"] for region in outputs["regions"]] == empty.tolist()


def test_no_rows_are_an_empty_batch(folder: Path, content: Content) -> None:
    assert open_region_store(folder).maps([]).shape == (0, *content.maps.shape[1:])


def test_samples_say_what_became_of_them(folder: Path, content: Content) -> None:
    store = open_region_store(f"{folder}@sha256:{open_region_store(folder).card.artifact_id}")
    assert store.sample_ids == content.sample_ids
    assert [sample.row for sample in store.samples if sample.status == "quarantined"] == [3]
    assert store.samples[4].shape == (1, 100, 100)
    assert store.samples[4].spacing_mm == (0.7, 0.7)
    assert store.row("sample-0004") == 4
    quarantine = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert quarantine == [
        {"sample_id": "sample-0003", "reason": "decode_failed", "stage": "read", "message": "truncated file"}
    ]
    with pytest.raises(UsageError, match="'sample-9'"):
        store.row("sample-9")


@pytest.mark.parametrize("rows", [[20], [0, -1]])
def test_rows_outside_are_refused(folder: Path, rows: list[int]) -> None:
    with pytest.raises(UsageError, match="rows 0 to 19"):
        open_region_store(folder).maps(rows)


def test_zarr_reads_the_same(folder: Path, content: Content) -> None:
    import zarr

    group = zarr.open_group(folder / "regions.zarr", mode="r")
    assert np.array_equal(group["maps"][:], content.maps)
    assert np.array_equal(group["maps"].oindex[[7, 2, 19]], content.maps[[7, 2, 19]])
    assert np.array_equal(group["maps_quarter"][:], np.stack([quarter(maps) for maps in content.maps]))
    assert np.array_equal(group["boxes"][:], np.concatenate([boxes[0] for boxes in content.boxes]))
    # What zarr would write is stored as zarr would read it: a rewritten shard decodes to the same by our reader.
    sharding = group["maps"].metadata.codecs[0]
    assert [codec.to_dict()["name"] for codec in sharding.codecs] == ["bytes", "blosc", "crc32c"]
    assert group["maps"].fill_value == 255


def test_shards_that_zarr_wrote_are_read(folder: Path, tmp_path: Path, content: Content) -> None:
    import zarr

    path = tmp_path / "store"
    shutil.copytree(folder, path)
    for chunk in (path / "regions.zarr" / "maps").glob("c.*"):
        chunk.unlink()
    array = zarr.open_array(path / "regions.zarr" / "maps", mode="r+").with_config({"write_empty_chunks": True})
    array[:] = content.maps
    assert np.array_equal(open_region_store(path).maps(range(20)), content.maps)


def read_in_worker(store: RegionStore, row: int) -> tuple[np.ndarray, np.ndarray]:
    return store.maps([row])[0], store.boxes(row)[0]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_reader_travels_to_other_processes(folder: Path, content: Content, method: str) -> None:
    store = open_region_store(folder)
    store.maps([0])
    with multiprocessing.get_context(method).Pool(1) as pool:
        maps, boxes = pool.apply(read_in_worker, (store, 7))
    assert np.array_equal(maps, content.maps[7])
    assert np.array_equal(boxes, content.boxes[7][0])


def test_what_is_pickled_is_small_and_pinned(folder: Path) -> None:
    store = open_region_store(folder)
    store.maps([0])
    data = pickle.dumps(store)
    assert len(data) < 500
    assert store.card.artifact_id.encode() in data


def test_a_damaged_row_is_named_and_the_others_are_read(folder: Path, tmp_path: Path, content: Content) -> None:
    path = tmp_path / "store"
    shutil.copytree(folder, path)
    shard = path / "regions.zarr" / "maps" / "c.1.0.0.0"  # rows 2 and 3
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    store = open_region_store(path)
    with pytest.raises(CorruptError, match=r"row 2 \(sample-0002\) in regions.zarr/maps/c.1.0.0.0: checksum"):
        store.maps([0, 2, 5])
    assert np.array_equal(store.maps([0, 3, 5]), content.maps[[0, 3, 5]])
    shard.unlink()
    with pytest.raises(CorruptError, match=r"row 3 \(sample-0003\).*missing"):
        open_region_store(path).maps([3])


@pytest.mark.parametrize("name", ["maps", "boxes"])
def test_changed_metadata_is_not_believed(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "store"
    shutil.copytree(folder, path)
    metadata = path / "regions.zarr" / name / "zarr.json"
    metadata.write_bytes(metadata.read_bytes().replace(b"shape", b"shapE", 1))
    store = open_region_store(path)
    with pytest.raises(CorruptError, match=f"{name}/zarr.json"):
        store.maps([0]) if name == "maps" else store.boxes(0)


@pytest.mark.parametrize("change", ["edit", "cut", "more", "missing", "long"])
def test_a_changed_list_of_samples_is_refused(folder: Path, tmp_path: Path, change: str) -> None:
    path = tmp_path / "store"
    shutil.copytree(folder, path)
    lines = path / "samples.jsonl"
    text = lines.read_bytes()
    edits = {
        "edit": text.replace(b'"0.7"', b'"0.8"', 1),
        "cut": text[: text.rindex(b"{")],
        "more": text + text[text.rindex(b"{") :],
        "long": text.replace(b'"patient"', b'"' + b"x" * 70_000 + b'"', 1),
    }
    lines.unlink() if change == "missing" else lines.write_bytes(edits[change])
    with pytest.raises(CorruptError, match=r"samples\.jsonl"):
        open_region_store(path)


def test_what_is_no_published_store_is_refused(folder: Path, tmp_path: Path, content: Content) -> None:
    with zipfile.ZipFile(tmp_path / "store.zip", "w") as archive:
        archive.write(folder / "artifact.json", "artifact.json")
    with pytest.raises(IncompatibleError, match="zip stores are refused"):
        open_region_store(tmp_path / "store.zip")
    with pytest.raises(InputMissingError, match="no such artifact"):
        open_region_store(tmp_path / "none")
    begin(tmp_path / "begun", content)
    with pytest.raises(IncompatibleError, match="not published"):
        open_region_store(tmp_path / "begun")
    with pytest.raises(IncompatibleError, match="pinned"):
        open_region_store(f"{folder}@sha256:{'0' * 64}")


def test_importing_it_loads_no_zarr() -> None:
    code = (
        "import sys, shared.regions, shared.region_writer\n"
        "assert not {'zarr', 'dask', 'torch'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def exchange(store: Path, one: int, other: int) -> None:
    """Give two shards each other's place, as a copy that went wrong does; every checksum stays right."""
    maps = store / "regions.zarr" / "maps"
    first, second = maps / f"c.{one}.0.0.0", maps / f"c.{other}.0.0.0"
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])


@pytest.mark.parametrize("read_before", [False, True])
def test_exchanged_shards_are_found_also_after_a_row_was_read(tmp_path: Path, read_before: bool) -> None:
    content = make_content(quarantined=())
    content.maps[:] = np.arange(20, dtype=np.uint8)[:, None, None, None]  # chunks of one size at the same places
    path = tmp_path / "store"
    write(path, content)
    store = open_region_store(path)
    if read_before:
        assert np.array_equal(store.maps([4, 5, 6]), content.maps[[4, 5, 6]])
    exchange(path, 2, 3)
    for reader in (store, open_region_store(path)):
        with pytest.raises(CorruptError, match=r"row 4 \(sample-0004\): its region maps are not those"):
            reader.maps([4])
        assert np.array_equal(reader.maps([0, 19]), content.maps[[0, 19]])


def test_a_row_is_digested_once_and_known_by_its_checksum_from_then_on(
    folder: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested: list[np.ndarray] = []
    known = regions.row_digest
    monkeypatch.setattr(regions, "row_digest", lambda maps: digested.append(maps) or known(maps))
    store = open_region_store(folder)
    for _ in range(3):
        assert np.array_equal(store.maps([5, 2, 5, 3]), content.maps[[5, 2, 5, 3]])
    assert len(digested) == 4  # row 5 twice, in the first call


def test_few_files_are_open_at_once_and_all_are_closed_in_the_end(
    folder: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened() -> list[str]:
        links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
        return [link for link in links if str(folder) in link]

    monkeypatch.setattr(region_arrays, "_OPEN_MAX", 3)
    store = open_region_store(folder)
    rows = np.random.default_rng(0).permutation(20).tolist() * 2
    assert np.array_equal(store.maps(rows), content.maps[rows])
    assert len(opened()) == 3 + 1  # and the list of samples
    del store
    gc.collect()
    assert not opened()


def test_rows_that_are_waited_for_are_announced_and_are_the_same(
    folder: Path, tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(region_arrays, "_SLOW_S", 0.0)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, advice: announced.append((start, length)))
    path = tmp_path / "store"
    shutil.copytree(folder, path)
    store = open_region_store(path)
    assert np.array_equal(store.maps([7, 1]), content.maps[[7, 1]])
    assert not announced
    assert np.array_equal(store.maps([9, 0, 4]), content.maps[[9, 0, 4]])
    assert len(announced) == 3
    (path / "regions.zarr" / "maps" / "c.8.0.0.0").unlink()  # rows 16 and 17
    with pytest.raises(CorruptError, match=r"row 16 .*missing"):
        store.maps([16, 9])
