import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.artifact import published_files, read_card, verify
from shared.errors import CorruptError, SpecMismatchError, UsageError
from shared.region_shards import encode_chunk
from shared.region_writer import (
    Sample,
    ShardJournal,
    assemble_shard,
    create_store,
    drop_journal,
    finalise,
    pending_shards,
)
from shared.regions import open_region_store, verify_store
from tests.conftest import ROOT
from tests.shared.region_stores import append, begin, make_content, write

CONTENT = make_content(20)


def fill(folder: Path) -> None:
    begin(folder, CONTENT)
    for shard in pending_shards(folder):
        with ShardJournal(folder, shard) as journal:
            for row in journal.missing:
                append(journal, CONTENT, row)
            assemble_shard(journal)


def test_a_published_store_holds_what_the_design_lists(tmp_path: Path) -> None:
    card = write(tmp_path / "store", CONTENT)
    arrays = ["box_offsets", "box_regions", "boxes", "maps", "maps_quarter", "scores"]
    files = [*(f"regions.zarr/{name}/zarr.json" for name in arrays), "regions.zarr/zarr.json"]
    assert sorted(card.provenance.files) == sorted(["quarantine.jsonl", "samples.jsonl", *files])
    assert verify(tmp_path / "store", card) == []
    assert set(card.identity.outputs) == {
        "samples",
        "ok",
        "quarantined",
        "quarantine_reasons",
        "regions",
        "grid",
        "detections",
        "maps_root",
        "detections_root",
        "samples_sha256",
        "quarantine_sha256",
    }
    assert card.identity.outputs["quarantine_reasons"] == {"decode_failed": 1}
    assert not list((tmp_path / "store").rglob("*.tmp"))


def test_the_id_is_of_the_content_not_of_the_order_of_work(tmp_path: Path) -> None:
    begin(tmp_path / "b", CONTENT)
    for shard in reversed(pending_shards(tmp_path / "b")):
        with ShardJournal(tmp_path / "b", shard) as journal:
            for row in reversed(journal.missing):
                append(journal, CONTENT, row)
            assemble_shard(journal)
    assert write(tmp_path / "a", CONTENT).artifact_id == write(tmp_path / "b", CONTENT).artifact_id
    other = make_content(20)
    other.maps[7, 1, 2, 3] ^= 1
    assert write(tmp_path / "c", other).artifact_id != read_card(tmp_path / "a").artifact_id


def test_what_a_kill_leaves_of_a_file_of_zarr_is_cleared_away(tmp_path: Path) -> None:
    begin(tmp_path, CONTENT)
    for place in ("zarr", "maps/zarr", "maps_quarter/zarr"):  # as zarr itself names what it has not finished
        (tmp_path / f"regions.zarr/{place}.33d7d8d29cd4411a9ea7434529defa95.partial").write_text("{")
    card = write(tmp_path, CONTENT)
    assert verify_store(tmp_path, card) == []
    assert verify(tmp_path, card) == []
    assert not list(tmp_path.rglob("*.partial"))


def test_assembling_needs_every_row_and_happens_once(tmp_path: Path) -> None:
    begin(tmp_path, CONTENT)
    with ShardJournal(tmp_path, 1) as journal:
        append(journal, CONTENT, 3)
        with pytest.raises(UsageError, match=r"1 rows are missing, e\.g\. 2"):
            assemble_shard(journal)
        append(journal, CONTENT, 2)
        first = assemble_shard(journal)
        assert (first.shard, first.rows, first.quarantined) == (1, 2, 1)
        assert journal.missing == []
        assert journal.path.stat().st_size == 0  # its room is given back
        with pytest.raises(UsageError, match="not missing"):
            append(journal, CONTENT, 2)
    with ShardJournal(tmp_path, 1) as journal:
        assert journal.missing == []
        assert assemble_shard(journal) == first
    assert pending_shards(tmp_path) == [0, *range(2, 10)]


def test_finalise_needs_every_shard_and_the_journal_outlives_it(tmp_path: Path) -> None:
    begin(tmp_path, CONTENT)
    with pytest.raises(UsageError, match="10 of 10 shards are not assembled"):
        finalise(tmp_path)
    with pytest.raises(UsageError, match="journal is still needed"):
        drop_journal(tmp_path)
    fill(tmp_path)
    seen: list[tuple[int, int]] = []
    outputs = finalise(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 20) for done in range(2, 21, 2)]
    assert finalise(tmp_path) == outputs
    drop_journal(tmp_path)
    drop_journal(tmp_path)
    # Between journal and card: the same command finds everything done.
    begin(tmp_path, CONTENT)
    assert pending_shards(tmp_path) == []
    assert finalise(tmp_path) == outputs
    assert not [name for name in published_files(tmp_path, "region-store") if "journal" in name]


def test_a_shard_that_rotted_before_finalise_is_named_and_made_again(tmp_path: Path) -> None:
    fill(tmp_path)
    shard = tmp_path / "regions.zarr" / "maps" / "c.2.0.0.0"
    whole = shard.read_bytes()
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(CorruptError, match=r"row 4 \(sample-0004\)") as caught:
        finalise(tmp_path)
    assert caught.value.hint is not None
    assert "journal/shard-00002.done" in caught.value.hint
    (tmp_path / "journal" / "shard-00002.done").unlink()
    assert pending_shards(tmp_path) == [2]
    fill(tmp_path)
    finalise(tmp_path)
    assert shard.read_bytes() == whole


def test_a_whole_but_wrong_row_is_noticed_by_finalise(tmp_path: Path) -> None:
    fill(tmp_path)
    import zarr

    zarr.open_array(tmp_path / "regions.zarr" / "maps", mode="r+")[4] = 7
    with pytest.raises(CorruptError, match="stored maps differ from those computed"):
        finalise(tmp_path)


@pytest.mark.parametrize("place", [0, 5, 30, -1])
def test_a_rotten_mark_of_a_shard_is_named(tmp_path: Path, place: int) -> None:
    fill(tmp_path)
    done = tmp_path / "journal" / "shard-00003.done"
    data = bytearray(done.read_bytes())
    data[place] ^= 1
    done.write_bytes(data)
    with pytest.raises(CorruptError, match=r"shard-00003\.done: damaged"):
        finalise(tmp_path)


def test_another_store_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, CONTENT)
    wanted = {"sample_ids": CONTENT.sample_ids, "regions": CONTENT.regions, "grid": (8, 12)}
    assert create_store(tmp_path, **wanted).samples == 20
    others = [{"sample_ids": [*CONTENT.sample_ids[:-1], "z"]}, {"regions": ["a", "b"]}, {"grid": (12, 8)}]
    for other in others:
        with pytest.raises(SpecMismatchError, match="holds 20 samples"):
            create_store(tmp_path, **{**wanted, **other})


@pytest.mark.parametrize(
    ("ids", "regions"),
    [(["b", "a"], ["r"]), (["a", "a"], ["r"]), ([], ["r"]), (["a"], []), (["a"], ["r", "r"]), (["a"], [""])],
)
def test_ids_and_regions_that_cannot_be(tmp_path: Path, ids: list[str], regions: list[str]) -> None:
    with pytest.raises(UsageError, match="expected"):
        create_store(tmp_path, sample_ids=ids, regions=regions, grid=(8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_another_sample_is_noticed(tmp_path: Path) -> None:
    begin(tmp_path, CONTENT)
    for shard in pending_shards(tmp_path):
        with ShardJournal(tmp_path, shard) as journal:
            for row in journal.missing:
                name = "sample-0000" if row == 19 else CONTENT.sample_ids[row]
                journal.append_quarantined(row, Sample(name), reason="decode_failed", stage="read", message="")
            assemble_shard(journal)
    with pytest.raises(CorruptError, match="other sample ids"):
        finalise(tmp_path)


def test_room_is_estimated_from_above(tmp_path: Path) -> None:
    noise = make_content(20)
    noise.maps[:] = np.random.default_rng(0).integers(0, 255, noise.maps.shape)
    noise.maps[3] = 255
    layout = create_store(tmp_path, sample_ids=noise.sample_ids, regions=noise.regions, grid=(8, 12))
    write(tmp_path, noise)
    assert sum(path.stat().st_size for path in tmp_path.rglob("c.*")) < layout.bytes_max
    assert len(encode_chunk(noise.maps[0], compressed=True)) < layout.bytes_max / 20


# One process that forks: a child with a kill at its n-th durable act, then a child that continues.
KILLS = """
import itertools, json, os, random, signal, sys, time
from pathlib import Path
import numpy, zarr, google_crc32c, numcodecs, pydantic
from shared import region_layout
region_layout.SHARDS_MIN = 2
from tests.shared.region_stores import make_content, write
import shutil

content = make_content(6, grid=(4, 8), quarantined=(4,))
root = Path(sys.argv[1])


def run(folder, kill_at=None):
    count = 0
    def deadly(act, after):
        def do(*arguments, **options):
            nonlocal count
            count += 1
            if count == kill_at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = act(*arguments, **options)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return do
    child = os.fork()
    if child:
        return child
    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, deadly(getattr(os, name), after=kill_at and kill_at % 2))
    shutil.rmtree = deadly(shutil.rmtree, after=False)
    write(folder, content)
    os._exit(0)


def wait(child):
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def identity(folder):
    return json.loads((folder / "artifact.json").read_bytes())["artifact_id"]


started = time.monotonic()
assert not wait(run(root / "whole"))
took = time.monotonic() - started
ids = {identity(root / "whole")}
killed = 0
if sys.argv[2] == "acts":
    for number in itertools.count(1, 3):
        folder = root / f"act-{number}"
        if not wait(run(folder, number)):
            break
        killed += 1
        if not (folder / "artifact.json").exists():
            assert not wait(run(folder))
        ids.add(identity(folder))
else:
    random.seed(1)
    for number in range(6):
        folder = root / f"moment-{number}"
        for attempt in itertools.count(1):
            child = run(folder)
            # Within the first half of a whole run, and longer each time: machines differ, and their moods.
            time.sleep(random.random() * 0.5 * took * attempt)
            os.kill(child, signal.SIGKILL)
            killed += wait(child)
            if (folder / "artifact.json").exists():
                break
        ids.add(identity(folder))
print(json.dumps({"killed": killed, "ids": sorted(ids), "last": str(folder)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "least"), [("acts", 13), ("moments", 4)])
def test_killed_anywhere_the_same_command_ends_with_the_same_id(tmp_path: Path, how: str, least: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), how], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["killed"] >= least
    assert len(result["ids"]) == 1
    last = Path(result["last"])
    assert verify_store(last, read_card(last)) == []
    assert verify(last, read_card(last)) == []
    assert len(open_region_store(last).maps(range(6))) == 6
