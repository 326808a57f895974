"""`mwm predict`: what the model said when it was made, in the frame of each image; nothing half-written."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

import pipelines.predict as predicting
from pipelines.answers import USUAL, WRITERS
from pipelines.answers.contract import Asked, Place
from pipelines.answers.nifti_files import NiftiFiles
from shared.artifact import read_card
from shared.images import find_sources
from shared.orientation import Grid, to_canonical
from shared.run_lengths import runs_of
from stage3_finetune.export import Preprocessing
from stage3_finetune.segmentation.predictions import SegmentPredictions
from tests.pipelines.conftest import Chain
from tests.pipelines.test_cli import forge

SETTINGS = {
    "task": "segment", "options": {"values": {"disc": 255}, "width": 8}, "backbone": "resnet18",
    "backbone_options": {"output_stride": 16, "layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, "size_px": 32,
    "epochs": 8, "batch_size": 4, "lr": 0.01, "warmup_epochs": 0, "threads": 1, "resamples": 100,
}  # fmt: skip


def disc(number: int, height: int = 40, width: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """A picture and where its disc is; others for each number."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width]
    inside = (y - rng.integers(12, height - 12)) ** 2 + (x - rng.integers(12, width - 12)) ** 2 < 90
    return np.clip(rng.normal(60, 15, inside.shape) + 130 * inside, 0, 255).astype(np.uint8), inside


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a model that finds their discs."""
    from pipelines.cli import main

    folder = tmp_path_factory.mktemp("predict")
    (folder / "images").mkdir()
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "target", "group", "split"])
        for number in range(12):
            pixels, inside = disc(number)
            Image.fromarray(pixels).save(folder / f"images/{number:02d}.png")
            Image.fromarray(inside.astype(np.uint8) * 255).save(folder / f"{number:02d}.png")
            writer.writerow([f"{number:02d}.png", f"{number:02d}.png", f"g{number}", "test" if number > 8 else "train"])
    (folder / "r.yaml").write_text(yaml.safe_dump({"finetune": SETTINGS}))
    given = ["--images", folder / "images", "--labels", folder / "labels.csv", "--out", folder / "model"]
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", *map(str, [folder / "r.yaml", *given])])
    assert not stopped.value.code
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_writer_takes_some_kind_and_each_kind_has_a_usual_one() -> None:
    taken = {kind for name in WRITERS for kind in WRITERS.load(name).kinds}
    assert taken == set(USUAL)
    assert all(kind in WRITERS.load(name).kinds for kind, name in USUAL.items())


def test_label_maps_are_what_the_model_said_of_its_test_part(root: Path, tmp_path: Path, mwm) -> None:
    code, out, err = mwm("predict", root / "model", "--images", root / "images", "--out", tmp_path / "p")
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["made", "where", "digest", "skipped", "next"]
    found = SegmentPredictions.load(root / "model/predictions.jsonl.gz")
    said = dict(zip((row.sample_id for row in found.examples), found.rows, strict=True))
    manifest = {row["sample_id"]: row for row in rows(tmp_path / "p/manifest.csv")}
    assert len(manifest) == 12
    for name, row in said.items():
        label = np.asarray(Image.open(tmp_path / "p" / manifest[name]["file"]))
        assert label.shape == (40, 56)
        assert (label != row.answer.label(("disc",))).mean() < 1e-3  # batches of other sizes may round otherwise
        assert int(manifest[name]["px disc"]) == int((label == 1).sum()) > 30
    note = (tmp_path / "p/README.md").read_text()
    assert "Not for diagnosis" in note
    assert "0 background, 1 disc" in note
    assert "Left out: nothing." in note
    told = json.loads((tmp_path / "p/predict.json").read_text())
    assert told["model"]["artifact_id"] == read_card(root / "model").artifact_id
    assert told["preprocessing"]["size_px"] == 32
    assert told["images"] == {"found": 12, "predicted": 12}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_coco_holds_the_same_masks(root: Path, tmp_path: Path, mwm) -> None:
    for to in ("png", "coco"):
        command = ("predict", root / "model", "--images", root / "images", "--out", tmp_path / to, "--to", to, "-q")
        assert mwm(*command)[0] == 0
    coco = COCO(tmp_path / "coco/annotations.json")
    for row in rows(tmp_path / "png/manifest.csv"):
        (image,) = (item for item in coco.imgs.values() if item["file_name"] == row["sample_id"])
        annotations = coco.imgToAnns[image["id"]]
        mask = sum(coco.annToMask(item) for item in annotations)
        np.testing.assert_array_equal(mask, np.asarray(Image.open(tmp_path / "png" / row["file"])))
        x, y, width, height = annotations[0]["bbox"]
        assert mask[y : y + height, x : x + width].sum() == mask.sum() == annotations[0]["area"]


def test_volumes_come_back_on_their_own_affine(root: Path, tmp_path: Path, mwm) -> None:
    """Slices of a volume stored askew: each voxel is what the same slice, as a flat picture, was given."""
    volume = np.stack([disc(number, 40, 44)[0][::-1].T for number in range(3)], axis=2)  # x, y, z in RAS+
    affine = np.diag([-0.8, 1.5, 3.0, 1.0])
    affine[:3, 3] = 5, -7, 11
    stored = volume[::-1]  # the first axis runs to the left
    (tmp_path / "images/sub").mkdir(parents=True)
    image = nibabel.Nifti1Image(stored, affine)
    image.header["descrip"] = b"Jane Roe"
    nibabel.save(image, tmp_path / "images/sub/v.nii.gz")
    Image.fromarray(disc(0)[0]).save(tmp_path / "images/flat.png")
    command = ("predict", root / "model", "--images", tmp_path / "images", "--out", tmp_path / "p", "--to", "nifti")
    code, out, err = mwm(*command)
    assert code == 0, err
    assert "1 of 4 images left out: not a slice of a NIfTI volume" in err
    assert "0 inputs quarantined, 1 left out" in out
    (row,) = rows(tmp_path / "p/volumes.csv")
    assert (row["volume"], row["slices"], row["missing_slices"]) == ("sub/v.nii.gz", "3", "")
    found = nibabel.load(tmp_path / "p" / row["file"])
    assert found.shape == stored.shape
    np.testing.assert_array_equal(found.affine, nibabel.load(tmp_path / "images/sub/v.nii.gz").affine)
    assert b"Jane" not in found.header.binaryblock
    assert mwm("predict", root / "model", "--images", tmp_path / "images", "--out", tmp_path / "flat", "-q")[0] == 0
    canonical = to_canonical(np.asanyarray(found.dataobj), Grid.of(stored.shape, image.affine))
    drawn = [row for row in rows(tmp_path / "flat/manifest.csv") if "#" in row["sample_id"]]
    assert len(drawn) == 3
    for number, item in enumerate(drawn):
        label = np.asarray(Image.open(tmp_path / "flat" / item["file"]))
        assert label.any()
        assert (label != canonical[:, ::-1, number].T).mean() < 1e-2


def test_a_volume_of_which_the_last_slice_cannot_be_read_is_written_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 2), np.uint8), np.eye(4)), tmp_path / "v.nii")
    sources = find_sources(tmp_path)
    writer = NiftiFiles(Asked(tmp_path / "out", ("disc",), "labels", False, "0" * 64, sources))
    writer.put(Place(0, sources[0], (5, 4)), SimpleNamespace(label=np.ones((5, 4), np.uint8)))
    writer.skip(sources[1])
    writer.close()
    (row,) = rows(tmp_path / "out/volumes.csv")
    assert (row["slices"], row["missing_slices"]) == ("1", "1")
    found = np.asanyarray(nibabel.load(tmp_path / "out" / row["file"]).dataobj)
    assert found[:, :, 0].all()
    assert not found[:, :, 1].any()


def test_probabilities_are_those_of_the_model(finished: Chain, tmp_path: Path, mwm) -> None:
    model = finished.out / "scratch"
    code, out, err = mwm("predict", model, "--images", finished.images, "--out", tmp_path / "p", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["to"] == "csv"
    found = {row["sample_id"]: row for row in rows(tmp_path / "p/predictions.csv")}
    assert len(found) == 12
    for row in rows(model / "predictions.csv"):
        again = found[row["sample_id"]]
        assert again["predicted"] == row["predicted"]
        for name in ("p large", "p small"):
            assert float(again[name]) == pytest.approx(float(row[name]), abs=1e-5)


@dataclass
class Found:
    """An answer of a detector, as the contract has it."""

    box_xyxy_px: np.ndarray
    score: np.ndarray
    label: np.ndarray
    runs: list[list[int]] | None = None


@pytest.mark.parametrize("masks", [False, True])
def test_things_found_are_boxes_with_scores(
    root: Path, tmp_path: Path, mwm, monkeypatch: pytest.MonkeyPatch, masks: bool
) -> None:
    inside = np.zeros((40, 56), bool)
    inside[3:9, 5:20] = True
    answer = Found(
        np.array([[4.5, 3, 20.25, 9]]), np.array([0.875]), np.array([1]), [runs_of(inside)] if masks else None
    )
    nothing = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
    task = SimpleNamespace(
        kind="instances", classes=("a", "b"), preprocessing=Preprocessing(32, 1, (0.5,), (0.5,)), options=None,
        predict=lambda batch: [answer if name == "00.png" else nothing for name in batch.sample_ids],
    )  # fmt: skip
    card = read_card(root / "model")
    monkeypatch.setattr(predicting, "open_model", lambda *_: (task, card))
    command = ("predict", root / "model", "--images", root / "images", "--out", tmp_path / "p")
    assert mwm(*command, "--to", "png")[0] == 2
    assert mwm(*command)[0] == 0
    coco = COCO(tmp_path / "p/annotations.json")
    assert len(coco.imgs) == 12
    (item,) = coco.anns.values()
    assert (item["category_id"], item["score"], item["bbox"]) == (2, 0.875, [4.5, 3.0, 15.75, 6.0])
    assert coco.imgs[item["image_id"]]["file_name"] == "00.png"
    if masks:
        np.testing.assert_array_equal(coco.annToMask(item), inside)
        assert item["area"] == 90
    else:
        assert "segmentation" not in item


def test_what_cannot_be_read_is_quarantined_and_counted(root: Path, tmp_path: Path, mwm) -> None:
    shutil.copytree(root / "images", tmp_path / "images")
    (tmp_path / "images/00.png").write_bytes(b"no image")
    command = ["predict", root / "model", "--images", tmp_path / "images", "--out", tmp_path / "p"]
    code, out, err = mwm(*command)
    assert code == 0
    assert "warning: 1 of 12 images quarantined: decode_failed" in err
    assert "skipped: 1 inputs quarantined" in out
    (line,) = (tmp_path / "p/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["sample_id"] == "00.png"
    assert len(rows(tmp_path / "p/manifest.csv")) == 11
    assert "00.png" not in {row["sample_id"] for row in rows(tmp_path / "p/manifest.csv")}
    assert "for 11 of 12 images" in (tmp_path / "p/README.md").read_text()
    shutil.rmtree(tmp_path / "p")
    code, out, err = mwm(*command, "--set", "max_failures=0")
    assert (code, out) == (6, "")
    assert "error[too-many-quarantined]: 1 of 12 images cannot be read (1 decode_failed)" in err
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no image")
    assert mwm(*command, "--set", "max_failures=12")[0] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_bad_input_is_one_line_and_nothing_appears(root: Path, finished: Chain, tmp_path: Path, mwm) -> None:
    model, images, out = root / "model", root / "images", tmp_path / "p"
    given = ("--images", images, "--out", out)
    for code, told, command in (
        (2, "unknown writer 'pngs'", (model, *given, "--to", "pngs")),
        (2, "--to csv: not for the task 'segment'\nhint: --to coco, nifti, png", (model, *given, "--to", "csv")),
        (2, "the images hold no NIfTI volume", (model, *given, "--to", "nifti")),
        (2, "batch_size", (model, *given, "--set", "batch_size=0")),
        (2, "unknown key. Did you mean 'threads'?", (model, *given, "--set", "thread=2")),
        (2, "device: cuda", (model, *given, "--set", "device=cuda")),
        (2, "no such folder", (model, "--images", tmp_path / "none", "--out", out)),
        (2, "not empty", (model, "--images", images, "--out", images)),
        (2, "expected the folder of an artifact", (model / "artifact.json", *given)),
        (2, "no such artifact folder", (tmp_path / "none", *given)),
        (5, "expected kind 'model'", (finished.out / "encoder", *given)),
        (5, "not an artifact", (root, *given)),
        (5, "pinned sha256", (f"{model}@sha256:{'0' * 16}", *given)),
    ):
        found, out_text, err = mwm("predict", *command)
        assert (found, out_text) == (code, ""), (command, err)
        assert told in err, (told, err)
        assert len([line for line in err.splitlines() if line.startswith("error[")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_what_was_published_is_refused(root: Path, tmp_path: Path, mwm) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(root / "model", tmp_path / "model")
    path = tmp_path / "model/model/model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    tensors["decoder.answer.bias"] += 1
    save_file(tensors, path)
    command = ("predict", tmp_path / "model", "--images", root / "images", "--out", tmp_path / "p")
    code, _, err = mwm(*command)
    assert (code, "model/model.safetensors: changed since it was published" in err) == (4, True)
    forge(tmp_path / "model", "model/model.safetensors")
    code, _, err = mwm(*command)
    assert (code, "other weights than the artifact's id" in err) == (4, True)
    (tmp_path / "model/artifact.json").unlink()
    assert mwm(*command)[0] == 5
    assert not (tmp_path / "p").exists()


def test_a_fault_half_way_leaves_nothing(root: Path, tmp_path: Path, mwm, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.answers.png_files import PngFiles

    def broken(self: PngFiles) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PngFiles, "close", broken)
    code, _, err = mwm("predict", root / "model", "--images", root / "images", "--out", tmp_path / "p")
    assert code == 75
    assert "error[disk-full]" in err
    assert list(tmp_path.iterdir()) == []


def test_audit_scores_a_segmentation_again(root: Path, mwm) -> None:
    code, out, _ = mwm("audit", root / "model")
    assert code == 0, out
    assert "corrupt" not in out
