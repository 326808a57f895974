"""`mwm export` of a region store: what others open is what the store holds, and nothing appears that is not."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from torch import from_numpy
from torch.nn.functional import interpolate

from pipelines.exportable_store import cut, resample
from pipelines.exporters import EXPORTERS, STORE_EXPORTERS, coco_files
from shared.lease import Lease
from shared.regions import RegionStore
from tests.conftest import ROOT
from tests.pipelines.exports import GOLDEN
from tests.shared.planted_stores import plant_store

SIZES = {"a/b.png": (40, 56), "a-b.png": (16, 24), "Ä b.png": (33, 7), "bad.png": (8, 8), ("n" * 60 + ".png"): (90, 64)}


def smooth(name: str) -> np.ndarray:
    """Maps uint8 [2, 16, 24]: smooth hills, others for each name; the second region of one image is empty."""
    rng = np.random.default_rng(len(name))
    y, x = np.mgrid[0:16, 0:24]
    hills = [
        254 * np.exp(-((y - rng.uniform(3, 12)) ** 2 + (x - rng.uniform(4, 20)) ** 2) / rng.uniform(9, 40))
        for _ in range(2)
    ]
    maps = np.stack(hills).astype(np.uint8)
    maps[1] *= name != "a-b.png"
    return maps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (height, width), dtype=np.uint8)
        Image.fromarray(values).save(path)
    plant_store(folder / "store", folder / "images", lambda source, _: smooth(source.sample_id), without=["bad.png"])
    return folder


@pytest.fixture
def store(root: Path) -> RegionStore:
    from shared.regions import open_region_store

    return open_region_store(root / "store")


def at_size(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps 0..254 at an image's size, by torch: float64 [K, H, W]."""
    return interpolate(from_numpy(maps.astype(np.float64))[None], size, mode="bilinear", align_corners=False)[0].numpy()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_maps_are_resampled_with_half_pixel_centres() -> None:
    maps = np.random.default_rng(0).integers(0, 255, (2, 16, 24), dtype=np.uint8)
    for size in ((16, 24), (40, 56), (5, 9), (1, 1), (16, 100)):
        np.testing.assert_allclose(resample(maps, size), at_size(maps, size), atol=1e-3)
    even = np.full((1, 7, 7), 127, np.uint8)
    assert cut(resample(even, (33, 20)), 0.5).all()  # equal values stay what they are: a cut there does not flicker


def test_coco_is_what_pycocotools_reads(root: Path, store: RegionStore, tmp_path: Path, mwm) -> None:
    code, out, err = mwm("export", root / "store", "--to", "coco", "--out", tmp_path / "x", "--set", "threshold=0.3")
    assert code == 0, err
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "made", "where", "digest", "compared", "skipped", "next",
    ]  # fmt: skip
    assert "1 quarantined: decode_failed" in out
    coco = COCO(tmp_path / "x" / "annotations.json")
    assert [item["name"] for item in coco.loadCats(coco.getCatIds())] == ["left lung", "../x"]
    assert {item["file_name"] for item in coco.imgs.values()} == set(SIZES) - {"bad.png"}
    seen = 0
    for image in coco.imgs.values():
        size = SIZES[image["file_name"]]
        assert (image["height"], image["width"]) == size
        maps = store.maps([image["id"]])[0]
        levels = at_size(maps, size)
        for region in range(2):
            wanted = levels[region] >= 0.3 * 254
            found = coco.loadAnns(coco.getAnnIds(image["id"], [region + 1]))
            assert len(found) == wanted.any()
            for item in found:
                seen += 1
                mask = coco.annToMask(item)
                assert (mask != wanted).mean() < 0.001
                ys, xs = np.nonzero(mask)
                assert item["area"] == mask.sum()
                assert item["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert item["score"] == pytest.approx(levels[region].max() / 254, abs=1e-3)
    assert seen == 7
    results = coco.loadRes(str(tmp_path / "x" / "detections.json"))
    assert len(results.anns) == 4
    assert results.anns[1]["bbox"] == [1, 2, 4.5, 7]
    assert results.anns[1]["category_id"] == 2
    assert results.anns[1]["score"] == pytest.approx(0.75, abs=1e-4)


@pytest.mark.parametrize(("bits", "size"), [(8, "image"), (16, "map")])
def test_png_values_are_probabilities(
    root: Path, store: RegionStore, tmp_path: Path, mwm, bits: int, size: str
) -> None:
    out = tmp_path / "x"
    more = ["--set", f"bits={bits}", "--set", f"size={size}", "--set", "overlays=true", "--images", root / "images"]
    code, _, err = mwm("export", root / "store", "--to", "png", "--out", out, *more)
    assert code == 0, err
    manifest = rows(out / "manifest.csv")
    assert [row["sample_id"] for row in manifest] == [name for name in sorted(SIZES) if name != "bad.png" for _ in "ab"]
    assert len({row["file"].lower() for row in manifest}) == len(manifest)
    for row in manifest:
        path = out / row["file"]
        assert path.resolve().parent.parent == out.resolve()
        with Image.open(path) as image:
            values = np.asarray(image)
        assert values.dtype == (np.uint8 if bits == 8 else np.uint16)
        maps = store.maps([int(row["row"])])[0]
        wanted = at_size(maps, SIZES[row["sample_id"]]) if size == "image" else maps
        assert values.shape == wanted.shape[1:] == (int(row["height"]), int(row["width"]))
        np.testing.assert_allclose(
            values / (2**bits - 1), wanted[store.regions.index(row["region"])] / 254, atol=0.51 / (2**bits - 1)
        )
    assert len(list((out / "overlays").iterdir())) == 4
    assert all(path.suffix in (".png", ".csv", ".json", ".md") for path in out.rglob("*") if path.is_file())


def test_an_export_says_where_it_comes_from(root: Path, store: RegionStore, tmp_path: Path, mwm) -> None:
    code, out, _ = mwm("export", root / "store", "--to", "coco", "--out", tmp_path / "x", "--json")
    assert code == 0
    assert json.loads(out)["left_out"] == {"quarantined: decode_failed": 1}
    told = json.loads((tmp_path / "x" / "export.json").read_bytes())
    assert told["artifact"]["artifact_id"] == store.card.artifact_id
    assert told["settings"] == {"threshold": 0.5}
    assert told["regions"][0] == {"name": "left lung", "texts": ["left lung", "a left lung"]}
    assert told["samples"] == {"in_store": 5, "with_maps": 4}
    assert rows(tmp_path / "x" / "left_out.csv") == [{"sample_id": "bad.png", "reason": "quarantined: decode_failed"}]
    note = (tmp_path / "x" / "README.md").read_text()
    for needle in ("Not for diagnosis", store.card.artifact_id, "a left lung", "1 quarantined", "drawn"):
        assert needle in note
    for path in (tmp_path / "x").rglob("*"):
        assert str(root).encode() not in path.read_bytes()


def test_what_cannot_be_exported_is_one_clear_line(root: Path, tmp_path: Path, mwm) -> None:
    def refused(code: int, told: str, *arguments: object) -> None:
        found, out, err = mwm("export", *arguments, "--out", tmp_path / "x")
        assert (found, out) == (code, ""), err
        assert told in err
        assert not (tmp_path / "x").exists()

    store, images = root / "store", root / "images"
    refused(5, "--to coco, nifti, nnunet, png", store, "--to", "timm")
    refused(5, "--to huggingface, onnx, timm", GOLDEN / "encoder", "--to", "png")
    refused(2, "Did you mean 'png'?", store, "--to", "pmg")
    refused(2, "Did you mean 'threshold'?", store, "--to", "coco", "--set", "treshold=.3")
    refused(2, "threshold: expected", store, "--to", "coco", "--set", "threshold=0")
    refused(2, "needs --images", store, "--to", "nifti")
    refused(2, "needs --images", store, "--to", "png", "--set", "overlays=true")
    refused(2, "no slice of a NIfTI volume", store, "--to", "nifti", "--images", images)
    refused(2, "are not there", store, "--to", "nnunet", "--images", images / "a")
    refused(2, "--set are for exports of region stores", GOLDEN / "encoder", "--to", "timm", "--set", "threshold=1")
    refused(2, "--regions names", store, "--to", "png", "--regions", store)
    refused(5, "pinned", f"{store}@sha256:{'0' * 16}", "--to", "coco")
    refused(2, "no such", root / "nowhere", "--to", "coco")
    refused(5, "it holds one", root, "--to", "coco")


def test_an_image_that_has_changed_is_refused(root: Path, tmp_path: Path, mwm) -> None:
    shutil.copytree(root / "images", tmp_path / "images")
    Image.fromarray(np.zeros((16, 24), np.uint8)).save(tmp_path / "images" / "a-b.png")
    code, _, err = mwm(
        "export", root / "store", "--to", "nnunet", "--images", tmp_path / "images", "--out", tmp_path / "x"
    )
    assert code == 4
    assert "when it was localized" in err
    assert not (tmp_path / "x").exists()


def test_what_reads_back_as_something_else_is_drift(
    root: Path, tmp_path: Path, mwm, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = coco_files.pack_runs
    monkeypatch.setattr(coco_files, "pack_runs", lambda runs: honest([runs[0] + 1, runs[1] - 1, *runs[2:]]))
    code, _, err = mwm("export", root / "store", "--to", "coco", "--out", tmp_path / "x")
    assert code == 3
    assert "error[drift]" in err
    save = Image.Image.save
    monkeypatch.setattr(
        Image.Image, "save", lambda self, *args, **more: save(self.point(lambda v: v ^ 1), *args, **more)
    )
    code, _, err = mwm("export", root / "store", "--to", "png", "--out", tmp_path / "x")
    assert code == 3
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_that_looks_whole_and_the_same_command_begins_anew(
    root: Path, tmp_path: Path, mwm
) -> None:
    code = (
        "import os, signal, sys\n"
        "from pipelines import exportable_store\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "exportable_store.make_durable = die\n"  # all is written
        "from pipelines.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["export", str(root / "store"), "--to", "coco", "--out", str(tmp_path / "x")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert os.listdir(tmp_path) == [".x.export"]
    shutil.copytree(tmp_path / ".x.export", tmp_path / ".y.export")
    (tmp_path / ".mine.export").mkdir()  # not made by an export
    with Lease(tmp_path / ".z.export"):  # one that is at work
        assert mwm(*arguments)[0] == 0
        assert sorted(os.listdir(tmp_path)) == [".mine.export", ".z.export", "x"]


def test_a_full_disk_exits_75(root: Path, tmp_path: Path, mwm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = mwm("export", root / "store", "--to", "png", "--out", tmp_path / "x")
    assert code == 75
    assert "error[disk-full]" in err
    assert list(tmp_path.iterdir()) == []


def test_every_exporter_has_its_place(mwm) -> None:
    assert not set(EXPORTERS) & set(STORE_EXPORTERS)
    code, out, _ = mwm("list", "store_exporters")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(STORE_EXPORTERS)
    code, out, _ = mwm("export", "--help")
    assert all(name in out for name in STORE_EXPORTERS)
    for name in STORE_EXPORTERS:
        options = STORE_EXPORTERS.load(name).Options
        assert all(field.description for field in options.model_fields.values())
        options()  # every setting has a default


def test_exporting_loads_nothing_heavy(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pipelines.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'dask', 'transformers'} & set(sys.modules)"
    )
    arguments = ["export", str(root / "store"), "--to", "coco", "--out", str(tmp_path / "x")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
