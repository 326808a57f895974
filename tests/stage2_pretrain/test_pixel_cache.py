"""Decoded pixels on disk: never other pixels than the file's, whatever happens to the cache or to its writers."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.errors import DiskFullError, UsageError
from stage2_pretrain import pixel_cache
from stage2_pretrain.data import RegionDataset, SourceChangedError
from stage2_pretrain.pixel_cache import open_pixel_cache
from stage2_pretrain.samples import usable_samples
from stage2_pretrain.window import WindowOptions
from tests.conftest import ROOT
from tests.stage2_pretrain.fake_store import FakeStore, write_images
from tests.stage2_pretrain.stores import write_discs, write_store
from tests.stage2_pretrain.test_train import run

COUNT = 6
SCRIPT = """
import sys
from pathlib import Path
from tests.stage2_pretrain.test_pixel_cache import build, COUNT
images, cache = map(Path, sys.argv[1:])
print("ready", flush=True)
while True:
    build(images, cache).batch(range(COUNT), 0)
    for part in cache.glob("*/*"):
        part.write_bytes(b"")  # so that there is always something to write
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Grey and coloured ones, and one whose 16 bits do not fit into 8."""
    folder = tmp_path / "images"
    folder.mkdir()
    write_images(folder, COUNT - 1)
    deep = np.random.default_rng(1).integers(0, 1 << 16, (50, 60)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    return folder


def build(images: Path, cache: Path | None, *, out: Path = Path("nowhere/out")) -> RegionDataset:
    """A data set that keeps nothing in memory."""
    store: Any = FakeStore(images)
    kept = open_pixel_cache("off" if cache is None else str(cache), usable_samples(store), out)
    options: dict[str, Any] = {"size_px": 32, "channels": 1, "window": WindowOptions(), "seed": 3, "memory_bytes": 0}
    return RegionDataset(store, images, pixel_cache=kept, **options)


def check_same(one: RegionDataset, other: RegionDataset, epoch: int = 0) -> None:
    here, there = (dataset.batch(range(COUNT), epoch) for dataset in (one, other))
    assert set(here) == set(there)
    for key in here:
        assert torch.equal(here[key], there[key]), key


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage2_pretrain.data.read_image", lambda source: pytest.fail(f"decoded {source.sample_id}"))


def test_nothing_is_decoded_twice_and_nothing_changes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first = build(images, None), build(images, tmp_path / "cache")
    wanted = [plain.batch(range(COUNT), epoch) for epoch in (0, 1)]
    assert first._pixels(COUNT - 1).dtype == np.float32
    check_same(first, plain)
    for dataset in (first, build(images, tmp_path / "cache"), pickle.loads(pickle.dumps(first))):
        with monkeypatch.context() as patched:
            patched.setattr("stage2_pretrain.data.read_image", lambda source: pytest.fail("decoded"))
            for epoch in (0, 1):
                with warnings.catch_warnings(action="error"):
                    found = dataset.batch(range(COUNT), epoch)
                assert all(torch.equal(found[key], wanted[epoch][key]) for key in found)


@pytest.mark.parametrize("change", ["bytes", "missing"])
def test_a_changed_source_is_found_by_the_next_run(images: Path, tmp_path: Path, change: str) -> None:
    build(images, tmp_path / "cache").batch(range(COUNT), 0)
    later = build(images, tmp_path / "cache")
    path = images / "003.png"
    path.write_bytes(path.read_bytes() + b"x") if change == "bytes" else path.unlink()
    later.batch([0, 1], 0)
    with pytest.raises(SourceChangedError, match=r"003\.png: (sha256|readable when localized, now missing)"):
        later.batch([3], 0)


def test_each_file_is_looked_at_once_a_process(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(images, tmp_path / "cache").batch(range(COUNT), 0)
    looked: list[Path] = []
    known = pixel_cache.hashlib.sha256
    monkeypatch.setattr(
        "stage2_pretrain.data.file_sha256", lambda path: looked.append(path) or known(path.read_bytes()).hexdigest()
    )
    later = build(images, tmp_path / "cache")
    for epoch in range(3):
        later.batch(range(COUNT), epoch)
    assert sorted(path.name for path in looked) == sorted(path.name for path in images.iterdir())


@pytest.mark.parametrize("name", ["records", "pixels.u8", "pixels.f32"])
@pytest.mark.parametrize("damage", ["flip", "cut", "zeros", "gone", "noise"])
def test_a_damaged_cache_is_not_believed(images: Path, tmp_path: Path, name: str, damage: str) -> None:
    build(images, tmp_path / "cache").batch(range(COUNT), 0)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    data = bytearray(path.read_bytes())
    start = next(place for place, value in enumerate(data) if value)
    if damage == "flip":
        data[start + 3] ^= 1
    elif damage == "cut":
        data = data[: start + 5]
    elif damage == "zeros":
        data[start:] = bytes(len(data) - start)
    elif damage == "noise":
        data = bytearray(np.random.default_rng(0).bytes(len(data)))
    path.unlink() if damage == "gone" else path.write_bytes(data)
    check_same(build(images, tmp_path / "cache"), build(images, None), 1)
    check_same(build(images, tmp_path / "cache"), build(images, None), 2)


def test_the_pixels_of_one_image_never_pass_for_another_s(images: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40), 7, np.uint8)).save(images / "000.png")
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(images / "001.png")
    build(images, tmp_path / "cache").batch(range(COUNT), 0)
    (folder,) = (tmp_path / "cache").iterdir()
    records, pixels = bytearray((folder / "records").read_bytes()), bytearray((folder / "pixels.u8").read_bytes())
    records[:16] = records[8:16] + records[:8]
    pixels[:3200] = pixels[1600:3200] + pixels[:1600]
    (folder / "records").write_bytes(records)
    (folder / "pixels.u8").write_bytes(pixels)
    check_same(build(images, tmp_path / "cache"), build(images, None))


def test_images_that_decode_otherwise_than_the_store_says_are_not_kept(images: Path, tmp_path: Path) -> None:
    store: Any = FakeStore(images)
    samples = usable_samples(store)
    kept = open_pixel_cache(str(tmp_path / "cache"), samples, tmp_path / "out")
    assert kept is not None
    pixels = np.zeros(samples[0].shape or (), np.uint8)
    kept.write(0, pixels, "0" * 64)
    assert kept.read(0) is None
    kept.write(0, pixels, samples[0].pixel_sha256 or "")
    assert np.array_equal(kept.read(0), pixels)


def test_other_images_have_another_place(images: Path, tmp_path: Path) -> None:
    build(images, tmp_path / "cache")
    (images / "004.png").unlink()
    shutil.copy(images / "003.png", images / "moved.png")
    build(images, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_only_the_owner_can_read_it(images: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    for root in (tmp_path / "new" / "cache", shared):
        build(images, root).batch(range(COUNT), 0)
        (folder,) = root.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert [part.stat().st_mode & 0o777 for part in folder.iterdir()] == [0o600] * 3
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o700


def test_auto_is_the_user_s_cache_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    kept = open_pixel_cache("auto", usable_samples(FakeStore(images)), tmp_path / "out")
    assert kept is not None
    assert kept.folder.parent == tmp_path / "home" / "mask-what-matters" / "images"


def test_a_place_that_cannot_be_is_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="inside the run's folder"):
        build(images, out / "run" / "cache", out=out)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "artifact.json").write_text("{}")
    for inside in (tmp_path / "artifact", tmp_path / "artifact" / "cache"):
        with pytest.raises(UsageError, match="inside the published artifact"):
            build(images, inside)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made or written"):
        build(images, tmp_path / "file")


def test_a_full_disk_is_told(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = build(images, tmp_path / "cache")

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError, match="disk full"):
            dataset.batch([0], 0)
    check_same(dataset, build(images, None))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(DiskFullError, match="are needed for the decoded images, 0 are free"):
            build(images, tmp_path / "other")


@pytest.mark.slow
def test_killed_and_competing_writers_leave_nothing_that_is_believed(images: Path, tmp_path: Path) -> None:
    """Two processes fill and clear one cache and are killed at any moment; a third reads meanwhile, and after."""
    cache, plain = tmp_path / "cache", build(images, None)
    wanted = plain.batch(range(COUNT), 0)["image"]
    command = [sys.executable, "-c", SCRIPT, str(images), str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        reader, until = build(images, cache), time.monotonic() + 2
        while time.monotonic() < until:
            assert torch.equal(reader.batch(range(COUNT), 0)["image"], wanted)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    check_same(build(images, cache), plain)
    check_same(build(images, cache), plain)


@pytest.mark.slow
def test_a_run_has_the_same_id_with_it_and_its_place_stays_private(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    write_discs(corpus / "images", 9)
    write_store(corpus / "images", corpus / "regions", quarantined=(5,))
    cache = str(tmp_path / "Jane Doe" / "cache")
    made = [
        run(corpus, tmp_path / name, **changes)
        for name, changes in {
            "without": {},
            "filling": {"image_cache": cache, "cache_mib": 0},
            "filled": {"image_cache": cache, "cache_mib": 0, "loader_workers": 1},
        }.items()
    ]
    assert len({artifact.card.artifact_id for artifact in made}) == 1
    assert (tmp_path / "Jane Doe").exists()
    for path in (tmp_path / "filling").rglob("*"):
        assert path.is_dir() or b"Jane Doe" not in path.read_bytes(), path
