"""Patient data that is planted in tags, file names, folders and lists comes out nowhere: every byte is searched."""

import base64
import gzip
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.cli import main
from shared.artifact import read_card
from shared.pseudonyms import salt_path
from shared.regions import open_region_store
from tests.pipelines.conftest import Chain, write_inputs
from tests.shared.dicom_files import SAMPLES, write_dicom

NAME, MRN, WARD, BORN = "Quillfeather", "MRN4711998", "Blathersby", "19370229"
TAGS = {
    "PatientName": f"{NAME}^Zebedee",
    "PatientBirthDate": BORN,
    "InstitutionName": f"{WARD} Infirmary",
    "ReferringPhysicianName": f"{WARD}^Ann",
    "StudyDescription": f"skull of {NAME}",
    "ImageComments": f"{NAME} {MRN}",
    "AccessionNumber": MRN,
}


def needles() -> list[bytes]:
    """Planted texts as they could come out: in other encodings, and as hashes that anyone can repeat."""
    found = []
    for text in (NAME, MRN, WARD, BORN, "Zebedee"):
        raw = text.encode()
        found += [raw, text.encode("utf-16-le"), base64.b64encode(raw)[:-4], raw.hex().encode()]
    for patient in range(6):
        for name in (f"{MRN}-{patient}", f"{MRN}-{patient} "):
            found += [hashlib.new(kind, name.encode()).hexdigest()[:16].encode() for kind in ("md5", "sha1", "sha256")]
    found += [salt_path().read_bytes().strip(), bytes.fromhex(salt_path().read_text())]
    return [needle.lower() for needle in found]


def contents(data: bytes) -> Iterator[bytes]:
    """Bytes, and what is packed inside of them."""
    yield data
    for uri in re.findall(rb"base64,([A-Za-z0-9+/=]{16,})", data):
        yield from contents(base64.b64decode(uri))
    if data[:2] == b"\x1f\x8b":
        yield from contents(gzip.decompress(data))
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(archive.read(member))
    if data[:4] == b"\x89PNG":
        image = Image.open(io.BytesIO(data))
        yield image.tobytes() + repr(image.info).encode()


def search(root: Path) -> int:
    """Fail where a needle is in a name or in a byte under ``root``; how many files were searched."""
    wanted = needles()
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in [*root.rglob("*")]:
        name = str(path.relative_to(root)).lower().encode()
        assert not [needle for needle in wanted if needle in name], path
    for path in files:
        for data in contents(path.read_bytes()):
            lowered = data.lower()
            assert not [needle for needle in wanted if needle in lowered], path
    for store in root.rglob("regions.zarr"):
        for _, array in zarr.open_group(store, mode="r").arrays():
            lowered = array[:].tobytes().lower()
            assert not [needle for needle in wanted if needle in lowered], store
    return len(files)


def pixels(index: int) -> np.ndarray:
    rng = np.random.default_rng(index)
    y, x = np.mgrid[0:80, 0:96]
    disc = (y - rng.integers(30, 50)) ** 2 + (x - rng.integers(35, 60)) ** 2 < (8 if index % 2 else 20) ** 2
    return (np.where(disc, 3000, 600) + rng.integers(-200, 200, (80, 96))).astype(np.uint16)


@pytest.fixture
def corpus(tmp_path: Path) -> Chain:
    """Twelve DICOM slices of six patients, all over named after them; beside them what breaks, and other formats."""
    chain = Chain(tmp_path)
    write_inputs(tmp_path / "other")
    chain.recipe.write_text((tmp_path / "other" / "mini.yaml").read_text())
    chain.images = tmp_path / f"{WARD}"
    labels = ["image,label,patient,split"]
    for index in range(12):
        patient = index // 2
        name = f"{NAME}_{patient}/{MRN}-{index}" + (".dcm" if index % 3 else "")
        window = {"WindowCenter": 2000, "WindowWidth": 4000}
        write_dicom(chain.images / name, pixels(index), PatientID=f"{MRN}-{patient}", **TAGS, **window)
        labels.append(f"{name},{('large', 'small')[index % 2]},{MRN}-{patient},{'train' if index < 8 else 'test'}")
    chain.labels.write_text("\n".join(labels) + "\n")
    return chain


def write_broken(folder: Path) -> None:
    """Files that cannot be read, each in its own way, and each full of names."""
    home = folder / f"{NAME}_broken"
    whole = write_dicom(home / f"{NAME}-1.dcm", pixels(0), PatientID=MRN, **TAGS).read_bytes()
    (home / f"{NAME}-1.dcm").write_bytes(whole[:-500])
    (home / f"{NAME}-2.dcm").write_bytes(whole[:200] + TAGS["PatientName"].encode() * 40)
    for number, keyword in enumerate((b"MONOCHROME2", b"1.2.840.10008.1.2.1\0"), 3):
        (home / f"{NAME}-{number}.dcm").write_bytes(whole.replace(keyword, (NAME * 2).encode()[: len(keyword)]))
    write_dicom(
        home / f"{NAME}-5.dcm",
        pixels(0),
        RescaleSlope="1",
        RescaleIntercept="1",
        WindowCenter="11",
        WindowWidth="22",
        **TAGS,
    )
    raw = (home / f"{NAME}-5.dcm").read_bytes().replace(b"\x02\x0011", b"\x02\x00Qu")
    (home / f"{NAME}-5.dcm").write_bytes(raw)
    # A number that is a name: the parser's own message would show it.
    raw = write_dicom(home / f"{NAME}-8.dcm", pixels(0), NumberOfFrames="123456789012", **TAGS).read_bytes()
    (home / f"{NAME}-8.dcm").write_bytes(raw.replace(b"123456789012", NAME.encode()))
    (home / f"{NAME}-6").write_bytes((SAMPLES / "test-SR.dcm").read_bytes())
    (home / f"{MRN}.dcm").write_bytes(TAGS["PatientName"].encode() * 40)
    write_dicom(home / f"{NAME}-7.dcm", np.stack([pixels(1), pixels(2)]), PatientID=f"{MRN}-0", **TAGS)


def write_others(folder: Path) -> list[dict[str, str]]:
    """Other formats with names in their metadata and in their paths; rows of a list that names them otherwise."""
    home = folder / f"{NAME} {MRN}"
    home.mkdir()
    eight = Image.fromarray((pixels(0) // 16).astype(np.uint8))
    text = PngInfo()
    text.add_text("Patient", f"{NAME} {MRN}", zip=True)
    eight.save(home / f"{NAME}.png", pnginfo=text)
    exif = Image.Exif()
    exif[0x010E] = f"{NAME} {MRN}"
    eight.save(home / f"{NAME}.jpg", exif=exif)
    tifffile.imwrite(home / f"{NAME}.tif", pixels(1), description=f"{NAME} {MRN}")
    volume = nibabel.Nifti1Image(np.stack([pixels(2).astype(np.int16)] * 2, axis=2), np.eye(4))
    volume.header["descrip"] = f"{NAME} {MRN}".encode()
    nibabel.save(volume, home / f"{NAME}.nii.gz")
    (home / f"{MRN}.png").write_bytes(b"\x89PNG" + NAME.encode() * 9)
    found = []
    for number, path in enumerate(sorted(home.iterdir())):
        row = {"image": str(path.relative_to(folder)), "sample_id": f"s{number}", "patient": f"{MRN}-{number}"}
        found.append({**row, "name": NAME, "ward": WARD})
    return found


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a command; its exit code and all that it said, which holds no needle."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    said = "".join(capfd.readouterr())
    lowered = said.lower().encode()
    assert not [needle for needle in needles() if needle in lowered], said
    return int(stopped.value.code or 0), said


def test_the_search_finds_what_is_there(corpus: Chain, tmp_path: Path) -> None:
    for number, data in enumerate(
        [
            TAGS["PatientName"].encode(),
            gzip.compress(NAME.encode()),
            b"<img src='data:image/png;base64," + base64.b64encode(b"xx" + NAME.encode()) + b"'>",
            MRN.encode("utf-16-le"),
            hashlib.sha256(f"{MRN}-3".encode()).hexdigest().encode(),
        ]
    ):
        (tmp_path / f"out{number}").mkdir()
        (tmp_path / f"out{number}" / "f").write_bytes(data)
        with pytest.raises(AssertionError):
            search(tmp_path / f"out{number}")


def test_patient_data_of_dicom_is_in_no_output_of_the_chain(corpus: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = run(capfd, *corpus.command())
    assert code == 0, said
    store = open_region_store(corpus.out / "regions")
    assert all(sample.startswith("dicom-") for sample in store.sample_ids)
    assert len({sample.group for sample in store.samples}) == 6
    for name in ("regions", "encoder", "finetuned", "scratch", "audit"):
        read_card(corpus.out / name)
        assert run(capfd, "inspect", corpus.out / name)[0] == 0
    assert run(capfd, "audit", corpus.out, "--level", "masks", "--out", corpus.root / "audited")[0] == 0
    one = store.sample_ids[0]
    assert run(capfd, "inspect", corpus.out / "regions", "--sample", one, "--images", corpus.images,
               "--out", corpus.out / "one.png")[0] == 0  # fmt: skip
    assert run(capfd, *corpus.command())[0] == 0
    assert search(corpus.out) > 30
    assert search(corpus.root / "audited") > 1
    assert (corpus.out / "one.png").stat().st_size > 1000


def test_patient_data_of_what_breaks_is_in_no_log_nor_quarantine(
    corpus: Chain, capfd: pytest.CaptureFixture[str]
) -> None:
    write_broken(corpus.images)
    out = corpus.root / "regions"
    command = ["localize", corpus.recipe, "--images", corpus.images, "--out", out, "--set", "workers=1"]
    code, said = run(capfd, *command, "--set", "max_failures=0")
    assert code == 6, said
    code, said = run(capfd, *command, "--set", "max_failures=20", "--fresh")
    assert code == 0, said
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in lines} == {"decode_failed", "unsupported"}
    assert len(lines) == 8
    assert search(out) > 8
    assert search(corpus.root / "regions.old-1") > 3


def test_patient_data_of_lists_is_in_no_output(corpus: Chain, capfd: pytest.CaptureFixture[str]) -> None:
    rows = write_others(corpus.images)
    for number, path in enumerate(sorted(corpus.images.glob("*_0/*"))):
        relative = str(path.relative_to(corpus.images))
        rows.append({"image": relative, "sample_id": f"{NAME}-{number}", "patient": MRN, "name": NAME})
    table = corpus.images / f"{WARD}.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = corpus.root / "regions"
    command = ["localize", corpus.recipe, "--images", table, "--out", out, "--set", "max_failures=5"]
    code, said = run(capfd, *command)
    assert code == 0, said
    assert len(open_region_store(out).samples) == 8
    assert search(out) > 8
    labels = corpus.root / "labels.csv"
    cells = [f"{row['sample_id']},{'ab'[number % 2]},{row['patient']}" for number, row in enumerate(rows[-2:])]
    cells += [f"{NAME}-99,a,{MRN}"]
    labels.write_text("sample_id,label,patient\n" + "\n".join(cells) + "\n")
    model = corpus.root / "model"
    code, said = run(capfd, "finetune", corpus.recipe, "--images", table, "--labels", labels, "--out", model)
    assert code == 2
    assert "row 3" in said
    two_groups = [f"{cell},g{number}" for number, cell in enumerate(cells[:2])]
    for header, wrong in (("sample_id,label,patient,group", two_groups), ("sample_id,label,patient", cells[:1] * 2)):
        labels.write_text("\n".join([header, *wrong]) + "\n")
        code, said = run(capfd, "finetune", corpus.recipe, "--images", table, "--labels", labels, "--out", model)
        assert code == 2
        assert "lines 2" in said
