"""`localize` in this process: right maps, one id however it was cut off, and no failure that goes unsaid."""

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo

from shared.artifact import read_card, verify
from shared.errors import (
    ConfigError,
    CorruptError,
    DiskFullError,
    InterruptedRun,
    LockedError,
    QuarantineError,
    SpecMismatchError,
)
from shared.images import find_sources, read_image
from shared.lease import Lease
from shared.region_journal import ShardJournal
from shared.regions import RegionStore, verify_store
from stage1_localize.job import even_micro_batch, localize
from tests.stage1_localize.planted_corpus import disc_map, recipe, start, write_image, write_images

COUNT = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), COUNT)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RegionStore:
    return localize(recipe(), images=images, out=tmp_path_factory.mktemp("whole") / "out", command="mwm localize")


def test_the_maps_are_those_planted(whole: RegionStore, images: Path) -> None:
    assert whole.regions == ("spot", "hill")
    assert whole.sample_ids == [f"{i:03d}.png" for i in range(COUNT)]
    maps = whole.maps(range(COUNT))
    for row in range(COUNT):
        np.testing.assert_array_equal(maps[row, 0], disc_map(row))
    assert 0 < maps[:, 1].astype(float).sum() / maps[:, 0].astype(float).sum() < 0.4
    first = whole.samples[0]
    image = read_image(find_sources(images)[0])
    assert (first.source_sha256, first.pixel_sha256, first.shape) == (
        image.source_sha256,
        image.pixel_sha256,
        (1, 60, 80),
    )
    boxes, scores, regions = whole.boxes(3)
    assert scores.tolist() == [65535, 65535]
    assert regions.tolist() == [0, 1]
    assert boxes.shape == (2, 4)


def test_what_is_published_is_whole_and_floatless(whole: RegionStore) -> None:
    assert not verify(whole.path, whole.card)
    assert not verify_store(whole.path, whole.card)
    assert not verify(whole.path / "corpus", read_card(whole.path / "corpus", "corpus"))
    identity = whole.card.identity
    assert identity.inputs[0].artifact_id == read_card(whole.path / "corpus", "corpus").artifact_id
    assert identity.spec["regions"] == [
        {"name": "spot", "texts": ["disc"]},
        {"name": "hill", "texts": ["cone", "nothing"]},
    ]
    assert identity.spec["grounder"]["options"] == {"score_milli": 1000, "level_milli": 800}
    assert identity.spec["numeric"] == {"dtype": "float32", "device": "cpu", "threads": 1, "micro_batch": 2}
    left = {path.name for path in whole.path.iterdir()}
    assert {
        "artifact.json",
        "samples.jsonl",
        "quarantine.jsonl",
        "regions.zarr",
        "corpus",
        "resolved.yaml",
        "report.html",
    } <= left
    assert not {"journal", "lease.json"} & left


def test_the_report_shows_what_was_asked_and_found(whole: RegionStore) -> None:
    page = (whole.path / "report.html").read_text()
    assert page.count('data-why="evenly spread"') == 8
    assert page.count('data-why="unusual coverage"') == 2
    assert page.count("<img") == 3 * page.count('<div class="case">')
    for said in ("spot", "hill", "disc", ">cone<", ">nothing<", "000.png", "019.png", "20 images"):
        assert said in page


def test_the_same_command_is_done_and_another_is_refused(whole: RegionStore, images: Path, tmp_path: Path) -> None:
    before = (whole.path / "artifact.json").stat().st_mtime_ns
    again = localize(recipe(workers=1, max_failures=3), images=images, out=whole.path)
    assert again.card == whole.card
    assert (whole.path / "artifact.json").stat().st_mtime_ns == before
    with pytest.raises(SpecMismatchError, match="micro_batch"):
        localize(recipe(micro_batch=1), images=images, out=whole.path)
    shutil.copytree(images, tmp_path / "images")
    write_image(tmp_path / "images" / "004.png", 77)
    with pytest.raises(SpecMismatchError, match="inputs"):
        localize(recipe(), images=tmp_path / "images", out=whole.path)


def test_fresh_keeps_the_old_run_aside(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = localize(recipe(regions={"a": "disc"}), images=images, out=out)
    second = localize(recipe(regions={"b": "disc"}), images=images, out=out, fresh=True)
    assert second.regions == ("b",)
    assert read_card(tmp_path / "out.old-1", "region-store") == first.card


def test_a_region_that_is_never_found_is_said(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = localize(recipe(regions={"spot": "disc", "void": "nothing"}), images=images, out=tmp_path / "out")
    assert not store.maps([0])[0, 1].any()
    said = "region 'void' was found in none of 20 images"
    assert said in capsys.readouterr().err
    assert said in (tmp_path / "out" / "run" / "run.log").read_text()


@pytest.mark.parametrize("asked", [1, 2, 7, 8, 256])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 100, 1024])
def test_micro_batches_waste_less_than_a_row_a_piece(asked: int, rows: int) -> None:
    size = even_micro_batch(asked, rows)
    assert 1 <= size <= asked
    pieces = -(-rows // size)
    assert pieces == -(-rows // asked)
    assert size * pieces - rows < pieces


def test_nothing_is_begun_when_prompts_or_parts_cannot_work(images: Path, tmp_path: Path) -> None:
    for config in (recipe(regions={"a": "heart"}), recipe(regions={"a": "box"}), recipe(grounder="plantet")):
        with pytest.raises((ConfigError, ValueError)):
            localize(config, images=images, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def broken_corpus(folder: Path) -> Path:
    """Eight good images and five that cannot be used, each in its way; two carry a patient's name."""
    write_images(folder, 8)
    noise = np.random.default_rng(0).integers(0, 255, (60, 80)).astype(np.uint8)
    info = PngInfo()
    info.add_text("PatientName", "Jane^Secret")
    Pillow.fromarray(noise).save(folder / "cut.png", pnginfo=info)
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-2000])
    (folder / "text.png").write_text("Jane^Secret")
    Pillow.fromarray(np.full((4, 4), np.nan, np.float32)).save(folder / "nan.tif")
    (folder / "volume.nii.gz").write_bytes(b"Jane^Secret")
    Pillow.fromarray(noise).save(folder / "pages.tif", save_all=True, append_images=[Pillow.fromarray(noise)])
    return folder


def test_what_fails_is_counted_named_and_kept_private(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    corpus = broken_corpus(tmp_path / "images")
    store = localize(recipe(max_failures=5), images=corpus, out=tmp_path / "out")
    assert store.card.identity.outputs["quarantine_reasons"] == {
        "decode_failed": 3,
        "nonfinite": 1,
        "unsupported": 1,
    }
    bad = [row for row in store.samples if row.status == "quarantined"]
    assert [row.sample_id for row in bad] == ["cut.png", "nan.tif", "pages.tif", "text.png", "volume.nii.gz"]
    assert all(row.source_sha256 for row in bad)
    assert (store.maps([bad[0].row]) == 255).all()
    np.testing.assert_array_equal(store.maps([7])[0, 0], disc_map(7))
    said = capsys.readouterr().err + "".join(
        path.read_bytes().decode("latin-1") for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert "3 of 13 images quarantined: decode_failed" in said
    assert "Secret" not in said
    assert str(tmp_path) not in said


def test_too_many_failures_end_the_run_and_nothing_is_lost(tmp_path: Path) -> None:
    corpus = broken_corpus(tmp_path / "images")
    with pytest.raises(QuarantineError, match="max_failures allows 2"):
        localize(recipe(max_failures=2), images=corpus, out=tmp_path / "out")
    assert not (tmp_path / "out" / "artifact.json").exists()
    with pytest.raises(QuarantineError):
        localize(recipe(), images=corpus, out=tmp_path / "out")
    continued = localize(recipe(max_failures=5), images=corpus, out=tmp_path / "out")
    assert (
        continued.card.artifact_id
        == localize(recipe(max_failures=5), images=corpus, out=tmp_path / "other").card.artifact_id
    )


def test_a_corpus_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no")
    with pytest.raises(QuarantineError, match="none of 1 images"):
        localize(recipe(max_failures=1), images=tmp_path / "images", out=tmp_path / "out")


# Where a run may be killed: the attribute that is replaced by an endless sleep, after its call number n began.
STALLS = {
    "corpus": ("shared.corpus", "publish", 0),
    "rows": ("shared.region_journal.ShardJournal", "append_maps", 5),
    "assembly": ("shared.region_writer", "write_shard", 3),
    "before done": ("shared.region_writer", "write_atomic", 2),
    "finalise": ("shared.region_writer", "create_detections", 0),
    "before drop": ("stage1_localize.job", "drop_journal", 0),
    "before card": ("stage1_localize.job", "publish", 0),
}


def stalled(images: Path, out: Path, where: str, name: str, number: int) -> "subprocess.Popen[str]":
    """A run that has come to a call and stays in it; see `STALLS`."""
    module, _, _ = where.partition(".ShardJournal")
    target = "module.ShardJournal" if where.endswith("ShardJournal") else "module"
    marker = out.with_name("stalled")
    patch = f"""
import importlib, pathlib, time
module = importlib.import_module({module!r})
plain, calls = {target}.{name}, []
def stall(*args, **kwargs):
    calls.append(0)
    if len(calls) > {number}:
        pathlib.Path({str(marker)!r}).touch()
        time.sleep(600)
    return plain(*args, **kwargs)
{target}.{name} = stall
"""
    process = start(images, out, recipe(), patch)
    try:
        limit = time.monotonic() + 120
        while not marker.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < limit
            time.sleep(0.02)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process


@pytest.mark.parametrize("phase", STALLS)
def test_kill_nine_anywhere_changes_no_id(phase: str, whole: RegionStore, images: Path, tmp_path: Path) -> None:
    process = stalled(images, tmp_path / "out", *STALLS[phase])
    try:
        with pytest.raises(LockedError):
            localize(recipe(), images=images, out=tmp_path / "out")
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "out" / "artifact.json").exists()
    continued = localize(recipe(), images=images, out=tmp_path / "out")
    assert continued.card.artifact_id == whole.card.artifact_id
    assert not verify_store(continued.path, continued.card)
    assert not [path for path in continued.path.rglob("*.tmp") if "run" not in path.parts]


def test_a_continued_run_says_what_it_keeps(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    process = stalled(images, tmp_path / "out", "shared.region_journal.ShardJournal", "append_maps", 4)
    process.kill()
    process.communicate()
    localize(recipe(), images=images, out=tmp_path / "out")
    assert "continuing: 4 of 20 images are done" in capsys.readouterr().err


def test_a_signal_stops_it_cleanly(
    images: Path, whole: RegionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = ShardJournal.append_maps

    def press(*args: Any) -> None:
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(*args)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ShardJournal, "append_maps", press)
    with pytest.raises(InterruptedRun, match=r"SIGTERM after .* of 20 images") as caught:
        localize(recipe(), images=images, out=tmp_path / "out")
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert localize(recipe(), images=images, out=tmp_path / "out").card.artifact_id == whole.card.artifact_id


def test_a_full_disk_is_named_and_survived(
    images: Path, whole: RegionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shared.region_journal as journal

    calls: list[int] = []
    plain = journal.frame

    def full(payload: bytes) -> bytes:
        calls.append(0)
        if len(calls) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(payload)

    with monkeypatch.context() as patch:
        patch.setattr(journal, "frame", full)
        with pytest.raises(DiskFullError, match="bytes") as caught:
            localize(recipe(), images=images, out=tmp_path / "out")
    assert caught.value.exit_code == 75
    assert localize(recipe(), images=images, out=tmp_path / "out").card.artifact_id == whole.card.artifact_id


def test_no_room_is_said_before_anything_is_computed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskFullError, match=r"about [0-9]+ bytes are needed for 20 images, 1000 are free"):
        localize(recipe(), images=images, out=tmp_path / "out")


def test_a_lost_journal_is_no_silent_new_run(images: Path, tmp_path: Path) -> None:
    process = stalled(images, tmp_path / "out", *STALLS["rows"])
    process.kill()
    process.communicate()
    shutil.rmtree(tmp_path / "out" / "journal")
    with pytest.raises(CorruptError, match="its journal is gone"):
        localize(recipe(), images=images, out=tmp_path / "out")


def test_two_writers_are_one_too_many(images: Path, tmp_path: Path) -> None:
    with Lease(tmp_path / "out"), pytest.raises(LockedError):
        localize(recipe(), images=images, out=tmp_path / "out")
