"""Repair and migration: the id that the store had, whatever was damaged; and never in place."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli import main
from shared import artifact
from shared.artifact import read_card, verify
from shared.errors import CorruptError, InterruptedRun, QuarantineError, SpecMismatchError, UsageError
from shared.region_arrays import create_detections, read_detections
from shared.region_layout import ARRAYS
from shared.region_verify import verify_store
from shared.regions import RegionStore, open_region_store
from stage1_localize.made_again import NOTES, note, read_notes
from stage1_localize.repair import lines, migrate, repair
from tests.stage1_localize.planted_corpus import ROOT, planted_store

GOLDEN = ROOT / "tests" / "compat" / "v0.1.0" / "regions"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RegionStore, Path]:
    return planted_store(tmp_path_factory.mktemp("repair"))


@pytest.fixture
def damaged(made, tmp_path) -> Path:
    return shutil.copytree(made[0].path, tmp_path / "damaged")


def chunk(store: Path, shard: int, array: str = "maps") -> Path:
    return store / "regions.zarr" / array / f"c.{shard}.0.0.0"


def flip(path: Path, place: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def lose(path: Path) -> None:
    path.unlink()


def swap(one: Path, other: Path) -> None:
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def other_boxes(store: Path) -> None:
    """Other values under checksums that are right."""
    boxes, scores, regions, offsets = read_detections(store / ARRAYS, 22, 42)
    create_detections(store / ARRAYS, boxes + np.int32(16), scores, regions, offsets)


DAMAGE = {
    "other boxes, checksums right": other_boxes,
    "a bit of a map": lambda store: flip(chunk(store, 1)),
    "a shard is gone": lambda store: lose(chunk(store, 3)),
    "two shards swapped": lambda store: swap(chunk(store, 0), chunk(store, 4)),
    "a quarter level": lambda store: flip(chunk(store, 2, "maps_quarter")),
    "boxes": lambda store: flip(store / "regions.zarr" / "boxes" / "c.0.0"),
    "boxes are gone": lambda store: lose(store / "regions.zarr" / "boxes" / "c.0.0"),
    "metadata": lambda store: flip(store / "regions.zarr" / "maps" / "zarr.json"),
    "the recipe": lambda store: flip(store / "resolved.yaml"),
    "the report": lambda store: lose(store / "report.html"),
    "the corpus": lambda store: flip(store / "corpus" / "samples.jsonl"),
    "a file too many": lambda store: (store / "note.txt").write_text("mine"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_whatever_is_damaged_the_new_store_has_the_old_id(made, damaged, tmp_path, what):
    store, images = made
    DAMAGE[what](damaged)
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    done = repair(damaged, images=images, out=tmp_path / "new")
    assert done.findings
    assert done.store.card.artifact_id == store.card.artifact_id == done.store.card.provenance.supersedes
    assert not verify(done.store.path, done.store.card)
    assert not verify_store(done.store.path, done.store.card)
    assert not verify(done.store.path / "corpus", read_card(done.store.path / "corpus", "corpus"))
    assert before == {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    assert any("the id that it had" in line for line in lines(done))
    again = repair(damaged, images=images, out=tmp_path / "new")
    assert "already done: region-store" in lines(again)


def test_a_whole_store_needs_no_repair(made, tmp_path):
    done = repair(made[0].path, images=made[1], out=tmp_path / "new")
    assert done.store is None
    assert not (tmp_path / "new").exists()


def test_only_damaged_rows_are_made_again(made, damaged, tmp_path):
    store, images = made
    lose(chunk(damaged, 3))
    lost = [sample.sample_id for sample in store.samples if sample.row // 2 == 3]
    keep = tmp_path / "images"
    keep.mkdir()
    for name in lost:
        shutil.copy(images / name, keep / name)
    done = repair(damaged, images=keep, out=tmp_path / "new")
    assert list(done.recomputed) == lost
    assert done.differing == ()


@pytest.mark.parametrize("name", ["samples.jsonl", "quarantine.jsonl"])
def test_what_rows_are_compared_with_cannot_be_made_again(made, damaged, tmp_path, name):
    flip(damaged / name, 12)
    with pytest.raises(CorruptError, match=name):
        repair(damaged, images=made[1], out=tmp_path / "new")


def test_a_damaged_row_whose_image_is_gone_stops_it_and_the_rest_is_kept(made, damaged, tmp_path):
    store, images = made
    flip(chunk(damaged, 5))
    poor = shutil.copytree(images, tmp_path / "images")
    row = next(s for s in store.samples if s.row // 2 == 5)
    (poor / row.sample_id).unlink()
    with pytest.raises(QuarantineError, match=f"{row.sample_id}.*its image is not there"):
        repair(damaged, images=poor, out=tmp_path / "new")
    done = repair(damaged, images=images, out=tmp_path / "new")
    assert done.store.card.artifact_id == store.card.artifact_id


def test_what_was_made_before_and_is_damaged_since_is_not_done(made, damaged, tmp_path):
    flip(chunk(damaged, 1))
    repair(damaged, images=made[1], out=tmp_path / "new")
    flip(chunk(tmp_path / "new", 2))
    with pytest.raises(CorruptError, match="was made before, and is damaged"):
        repair(damaged, images=made[1], out=tmp_path / "new")


def test_another_stores_repair_is_not_continued(made, damaged, tmp_path):
    from stage1_localize.repair import ORIGIN

    flip(chunk(damaged, 5))
    poor = shutil.copytree(made[1], tmp_path / "images")
    (poor / next(s for s in made[0].samples if s.row // 2 == 5).sample_id).unlink()
    with pytest.raises(QuarantineError):
        repair(damaged, images=poor, out=tmp_path / "new")
    (tmp_path / "new" / ORIGIN).write_text("ab" * 32)
    with pytest.raises(SpecMismatchError, match="begun from store abababababab"):
        repair(damaged, images=made[1], out=tmp_path / "new")
    (tmp_path / "new" / ORIGIN).unlink()
    with pytest.raises(SpecMismatchError, match="begun from another run"):
        repair(damaged, images=made[1], out=tmp_path / "new")


def test_never_in_place(made, damaged):
    flip(chunk(damaged, 1))
    with pytest.raises(UsageError, match="never edited"):
        repair(damaged, images=made[1], out=damaged)


def test_a_kill_in_the_middle_continues(made, damaged, tmp_path):
    store, images = made
    for shard in range(8):
        flip(chunk(damaged, shard))
    code = f"""
import sys, time
from pathlib import Path
from shared.region_journal import ShardJournal
whole = ShardJournal.append_maps
def slow(self, row, *rest):
    whole(self, row, *rest)
    self.sync()
    print(row, flush=True)
    time.sleep(0.05)
ShardJournal.append_maps = slow
from stage1_localize.repair import repair
repair(Path({str(damaged)!r}), images=Path({str(images)!r}), out=Path({str(tmp_path / "new")!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 9:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    done = repair(damaged, images=images, out=tmp_path / "new")
    assert done.store.card.artifact_id == store.card.artifact_id
    at_once = repair(damaged, images=images, out=tmp_path / "at once")
    assert list(done.recomputed) == list(at_once.recomputed)
    assert f"made: region-store ({len(at_once.recomputed)} of 22 rows made again)" in lines(done)
    assert done.store.card.provenance.metrics["recomputed"] == len(at_once.recomputed) > 5
    assert repair(damaged, images=images, out=tmp_path / "new").recomputed == done.recomputed


def test_a_note_torn_by_a_kill_is_none(tmp_path):
    (tmp_path / "run").mkdir()
    note(tmp_path, "a", True)
    with (tmp_path / NOTES).open("a") as file:
        file.write('{"sample_id": "b", "as_pub')
    note(tmp_path, "c", True)
    note(tmp_path, "c", False)
    assert read_notes(tmp_path) == {"a": True, "c": False}


def test_another_id_ends_with_3_also_when_it_was_done_before(made, damaged, tmp_path, monkeypatch, capsys):
    """A tool that answers otherwise by now: the row is not what was published, and neither is the store's id."""
    from stage1_localize import repair as module

    make = module._Work._make

    def make_otherwise(self, row):
        made_again = make(self, row)
        return replace(made_again, answer=replace(made_again.answer, maps=254 - made_again.answer.maps))

    flip(chunk(damaged, 1))
    monkeypatch.setattr(module._Work, "_make", make_otherwise)
    arguments = ["repair", str(damaged), "--images", str(made[1]), "--out", str(tmp_path / "new")]
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 3
        assert "another id than before; 1 rows differ from what was published, e.g. " in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused_without_an_option_that_repair_lacks(made, damaged, tmp_path):
    flip(chunk(damaged, 1))
    (tmp_path / "new" / "run").mkdir(parents=True)
    (tmp_path / "new" / "run" / "spec.json").write_text('{"kind": "encoder"}')
    with pytest.raises(SpecMismatchError, match="holds a run of another specification") as told:
        repair(damaged, images=made[1], out=tmp_path / "new")
    assert "--fresh" not in f"{told.value} {told.value.hint}"
    (tmp_path / "new" / "run" / "spec.json").write_text("torn")
    with pytest.raises(CorruptError) as told:
        repair(damaged, images=made[1], out=tmp_path / "new")
    assert "--fresh" not in f"{told.value} {told.value.hint}"


def test_a_stop_is_said_and_continued(made, damaged, tmp_path, monkeypatch):
    from stage1_localize import repair as module

    store, images = made
    flip(chunk(damaged, 1))
    started = time.monotonic()
    make = module._Work._make

    def make_and_stop(self, row):
        os.kill(os.getpid(), signal.SIGTERM)
        return make(self, row)

    monkeypatch.setattr(module._Work, "_make", make_and_stop)
    with pytest.raises(InterruptedRun, match=r"SIGTERM before row \d+ of 22"):
        repair(damaged, images=images, out=tmp_path / "new")
    monkeypatch.undo()
    assert repair(damaged, images=images, out=tmp_path / "new").store.card.artifact_id == store.card.artifact_id
    assert time.monotonic() - started < 120


def test_a_store_of_this_version_is_not_migrated(tmp_path):
    assert migrate(GOLDEN, out=tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_the_golden_store_migrates_to_a_newer_version_with_every_map_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(artifact.KIND_VERSIONS, "region-store", (1, 1))
    old = read_card(GOLDEN, "region-store")
    new = migrate(GOLDEN, out=tmp_path / "new")
    card = new.card
    assert card.identity.kind_version == "1.1"
    assert card.provenance.supersedes == old.artifact_id != card.artifact_id
    assert card.identity.outputs == old.identity.outputs
    assert not verify_store(new.path, card)
    assert migrate(GOLDEN, out=tmp_path / "new").card.artifact_id == card.artifact_id
    assert open_region_store(new.path).maps([0]).tobytes() == RegionStore(GOLDEN, old).maps([0]).tobytes()


def test_a_damaged_old_store_is_repaired_first(tmp_path, monkeypatch):
    copy = shutil.copytree(GOLDEN, tmp_path / "old")
    flip(next((copy / "regions.zarr" / "maps").glob("c.1.*")))
    monkeypatch.setitem(artifact.KIND_VERSIONS, "region-store", (1, 1))
    with pytest.raises(CorruptError, match=r"c\.1\..*row "):
        migrate(copy, out=tmp_path / "new")
