import errno
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import region_journal
from shared.artifact import full_disk_is_named
from shared.errors import DiskFullError, InputMissingError, LockedError, SpecMismatchError, UsageError
from shared.region_journal import ShardJournal
from shared.region_record import Sample
from tests.shared.region_stores import append, begin, make_content, sample

CONTENT = make_content(64, quarantined=(1,))  # eight rows a shard
HOLD = """
import sys, time
from pathlib import Path
from shared.region_journal import ShardJournal
with ShardJournal(Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    begin(tmp_path / "store", CONTENT)
    return tmp_path / "store"


def check_entries(journal: ShardJournal, rows: list[int]) -> None:
    entries = list(journal.entries())
    assert [entry.line.row for entry in entries] == rows
    for entry in entries:
        assert entry.line.sample_id == CONTENT.sample_ids[entry.line.row]
        for got, wanted in zip(entry.boxes(), CONTENT.boxes[entry.line.row], strict=True):
            assert got.dtype == wanted.dtype
            assert np.array_equal(got, wanted)


def test_rows_come_back_after_reopening_in_any_order(store: Path) -> None:
    with ShardJournal(store, 0) as journal:
        assert journal.missing == list(range(8))
        for row in (5, 1, 0):
            append(journal, CONTENT, row)
        assert journal.missing == [2, 3, 4, 6, 7]
    with ShardJournal(store, 0) as journal:
        assert journal.missing == [2, 3, 4, 6, 7]
        assert journal.cut_bytes == 0
        check_entries(journal, [0, 1, 5])
        quarantined = next(entry for entry in journal.entries() if entry.quarantine)
    assert quarantined.quarantine == {"reason": "decode_failed", "stage": "read", "message": "truncated file"}
    assert quarantined.line.status == "quarantined"


def ends_of_records(store: Path) -> list[int]:
    """Length of the file after its head, and after each row."""
    with ShardJournal(store, 0) as journal:
        ends = [journal.path.stat().st_size]
        for row in range(4):
            append(journal, CONTENT, row)
            ends.append(journal.path.stat().st_size)
    return ends


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_torn_tail_leaves_the_complete_rows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path, whole, ends = journal_bytes(tmp_path_factory)
    size = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:size])
    complete = [row for row in range(4) if ends[row + 1] <= size]
    with ShardJournal(path.parents[1], 0) as journal:
        assert journal.cut_bytes == (size - ends[len(complete)] if size >= ends[0] else size)
        check_entries(journal, complete)
        for row in journal.missing:
            append(journal, CONTENT, row)
    with ShardJournal(path.parents[1], 0) as journal:
        check_entries(journal, list(range(8)))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit_leaves_the_rows_before_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path, whole, ends = journal_bytes(tmp_path_factory)
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    with ShardJournal(path.parents[1], 0) as journal:
        check_entries(journal, [row for row in range(4) if ends[row + 1] <= place])


_made: list[tuple[Path, bytes, list[int]]] = []


def journal_bytes(factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[int]]:
    if not _made:
        store = factory.mktemp("journal") / "store"
        begin(store, CONTENT)
        ends = ends_of_records(store)
        path = store / "journal" / "shard-00000.rows"
        _made.append((path, path.read_bytes(), ends))
    return _made[0]


def test_a_failed_write_is_taken_back_and_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardJournal(store, 0) as journal:
        append(journal, CONTENT, 0)
        whole = journal.path.read_bytes()
        file = journal._file

        class Full:
            def write(self, data: memoryview) -> int:
                if len(data) > 100:
                    return file.write(data[:100])
                raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

        monkeypatch.setattr(journal, "_file", Full())
        with pytest.raises(DiskFullError, match="bytes more were needed") as caught:
            append(journal, CONTENT, 2)
        monkeypatch.undo()
        assert caught.value.exit_code == 75
        assert journal.path.read_bytes() == whole
        append(journal, CONTENT, 2)
        check_entries(journal, [0, 2])


def test_other_errors_than_a_full_disk_pass() -> None:
    with pytest.raises(PermissionError), full_disk_is_named(Path("x"), 1):
        raise PermissionError(errno.EACCES, "no")


def test_a_second_writer_is_refused_until_the_first_is_gone(store: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(store)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match="another process"):
            ShardJournal(store, 0)
        ShardJournal(store, 1).close()
        process.kill()
    ShardJournal(store, 0).close()


def test_open_for_writing_it_cannot_be_pickled(store: Path) -> None:
    with ShardJournal(store, 0) as journal, pytest.raises(UsageError, match="cannot be pickled"):
        pickle.dumps(journal)


def test_a_journal_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    other = make_content(64, regions=3)
    begin(tmp_path / "other", other)
    with ShardJournal(tmp_path / "other", 0) as journal:
        append(journal, other, 0)
        foreign = journal.path.read_bytes()
    (store / "journal" / "shard-00000.rows").write_bytes(foreign)
    with pytest.raises(SpecMismatchError, match="another store"):
        ShardJournal(store, 0)
    assert (store / "journal" / "shard-00000.rows").read_bytes() == foreign


def test_no_store_in_the_making(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="no region store in the making"):
        ShardJournal(tmp_path, 0)


MAPS = CONTENT.maps[0]
NONE = (np.zeros((0, 4), np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint16))
ONE = (np.zeros((1, 4), np.int32), np.zeros(1, np.uint16), np.zeros(1, np.uint16))


@pytest.mark.parametrize(
    ("row", "maps", "boxes"),
    [
        (8, MAPS, NONE),
        (-1, MAPS, NONE),
        (0, MAPS[:1], NONE),
        (0, MAPS.astype(np.int16), NONE),
        (0, np.full_like(MAPS, 255), NONE),
        (0, MAPS, (ONE[0].astype(np.int64), *ONE[1:])),
        (0, MAPS, (ONE[0][0], *ONE[1:])),
        (0, MAPS, (ONE[0], NONE[1], ONE[2])),
        (0, MAPS, (ONE[0], ONE[1], ONE[2] + np.uint16(2))),
    ],
)
def test_what_does_not_belong_is_refused(
    store: Path, row: int, maps: np.ndarray, boxes: tuple[np.ndarray, ...]
) -> None:
    with ShardJournal(store, 0) as journal:
        with pytest.raises(UsageError, match=f"row {row}"):
            journal.append_maps(row, sample(CONTENT, 0), maps, *boxes)
        assert journal.missing == list(range(8))


def test_a_row_is_kept_once(store: Path) -> None:
    with ShardJournal(store, 0) as journal:
        append(journal, CONTENT, 0)
        with pytest.raises(UsageError, match="not missing"):
            append(journal, CONTENT, 0)
        with pytest.raises(UsageError, match="not missing"):
            journal.append_quarantined(0, Sample("sample-0000"), reason="x", stage="read", message="")


def test_the_frame_says_how_large_a_map_pixel_is(store: Path) -> None:
    with ShardJournal(store, 0) as journal:
        append(journal, CONTENT, 0)
        line = next(iter(journal.entries())).line
    assert line.frame == {
        "kind": "2d",
        "grid": [8, 12],
        "spacing_mm": [repr(0.7 * 100 / 8), repr(0.7 * 100 / 12)],
        "orientation": None,
    }


def test_rows_are_synced_every_32_rows_or_30_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_content(800, regions=1, grid=(4, 4), quarantined=())
    begin(tmp_path / "many", content)
    now = [0.0]
    monkeypatch.setattr(region_journal.time, "monotonic", lambda: now[0])
    synced: list[int] = []
    with ShardJournal(tmp_path / "many", 0) as journal:
        monkeypatch.setattr(region_journal.os, "fsync", lambda file: synced.append(row))
        for row in range(75):
            now[0] += 31 if row == 40 else 0.1
            append(journal, content, row)
        assert synced == [31, 40, 72]
