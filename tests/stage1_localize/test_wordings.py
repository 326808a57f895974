"""Planted wordings, whose maps, overlaps and correlation are known without the grounder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import PromptError, QuarantineError, UsageError
from shared.images import Source, find_sources
from stage1_localize.grounders.planted import Planted
from stage1_localize.wordings import choose, compare_wordings
from stage1_localize.wordings_report import write_wordings
from tests.stage1_localize.planted_corpus import HEIGHT, SIDE, WIDTH, corner, disc_map, recipe, write_images
from tests.stage1_localize.scored_stores import runs

COUNT = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("worded") / "images", COUNT)


def cone_map(number: int) -> np.ndarray:
    """The stored map of the word 'cone', from where the square was put."""
    top, left = corner(number)
    radius = np.sqrt(SIDE * SIDE / (HEIGHT * WIDTH) / np.pi)
    centres = (np.arange(256) + 0.5) / 256
    away = np.hypot(centres[None] - (left + SIDE / 2) / WIDTH, centres[:, None] - (top + SIDE / 2) / HEIGHT)
    return np.floor(254 * np.clip(1 - away / radius, 0, 1).astype(np.float32) + 0.5).astype(np.uint8)


def compare(images: Path, *texts: str, **options: Any) -> dict[str, Any]:
    told, _ = compare_wordings(recipe(regions={"spot": list(texts)}), find_sources(images), **options)
    return told["regions"]["spot"]


def test_agreement_is_that_of_the_maps_asked_alone(images: Path) -> None:
    told = compare(images, "disc", "cone", "nothing")
    discs, cones = (np.array([of(n) for n in range(COUNT)]) for of in (disc_map, cone_map))
    assert told["wordings"]["disc"]["found_share"][0] == told["wordings"]["cone"]["found_share"][0] == 1
    assert told["wordings"]["disc"]["mass"][0] == pytest.approx(discs.mean() / 254, abs=1e-4)
    assert told["wordings"]["cone"]["mass"][0] == pytest.approx(cones.mean() / 254, abs=1e-4)
    assert told["wordings"]["nothing"] == {"found_share": [0, 0, 0], "mass": [0, 0, 0]}
    first, second, third = told["pairs"]
    assert first["wordings"] == ["disc", "cone"]
    # A cone's half height is a disc of half the radius, inside the other: 2 / 4 over 1 + 1 / 4.
    assert first["dice"][0] == pytest.approx(0.4, abs=0.01)
    overlap = [
        2 * ((d > 126) & (c > 126)).sum() / ((d > 126).sum() + (c > 126).sum())
        for d, c in zip(discs, cones, strict=True)
    ]
    assert first["dice"][0] == pytest.approx(np.mean(overlap), abs=1e-4)
    assert first["correlation"] == pytest.approx(np.corrcoef(discs.ravel(), cones.ravel())[0, 1], abs=1e-4)
    assert (second["wordings"], second["dice"], second["images"]) == (["disc", "nothing"], [0, 0, 0], COUNT)
    assert second["correlation"] is None
    assert third["wordings"] == ["cone", "nothing"]


def test_images_where_neither_finds_anything_are_no_agreement(images: Path, tmp_path: Path) -> None:
    from PIL import Image

    write_images(tmp_path / "few", 1)
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, np.uint8)).save(tmp_path / "few" / "flat.png")
    told = compare(tmp_path / "few", "disc", "cone")
    assert told["wordings"]["disc"]["found_share"][0] == 0.5
    assert told["pairs"][0]["images"] == 1
    assert told["pairs"][0]["dice"][0] == pytest.approx(0.4, abs=0.02)


def test_a_refused_wording_is_told_and_the_others_are_asked(images: Path, tmp_path: Path) -> None:
    config = recipe(regions={"spot": ["disc", "tumour", "cone"], "hill": ["lesion", "mass"]})
    told, pictured = compare_wordings(config, find_sources(images))
    spot, hill = told["regions"]["spot"], told["regions"]["hill"]
    assert list(spot["wordings"]) == ["disc", "tumour", "cone"]
    assert "'tumour' is not in the vocabulary" in spot["wordings"]["tumour"]["refused"]
    assert spot["wordings"]["tumour"]["hint"] == "known: disc, cone, box, nothing"
    assert [pair["wordings"] for pair in spot["pairs"]] == [["disc", "cone"]]
    assert spot["pairs"] == compare(images, "disc", "cone")["pairs"]
    assert hill["pairs"] == []
    write_wordings(tmp_path / "out", told, pictured)
    assert json.loads((tmp_path / "out" / "wordings.json").read_text()) == told
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img") == 2 * COUNT
    assert "hill: refused" in page
    with pytest.raises(PromptError, match="'tumour' is not in the vocabulary"):
        compare(images, "tumour", "lesion")


def test_labels_give_each_wording_its_dice(images: Path, tmp_path: Path) -> None:
    body: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "lump"}]}
    rows, columns = np.indices((HEIGHT, WIDTH))
    for number in range(COUNT):
        body["images"].append({"id": number, "file_name": f"{number:03d}.png", "width": WIDTH, "height": HEIGHT})
        top, left = corner(number)
        mask = (abs(rows - top - 5.5) < 6) & (abs(columns - left - 5.5) < 6) & (rows + columns > top + left)
        if number > 2:
            outline = {"size": [HEIGHT, WIDTH], "counts": runs(mask)}
            body["annotations"].append({"id": number, "image_id": number, "category_id": 0, "segmentation": outline})
    labels = tmp_path / "coco.json"
    labels.write_text(json.dumps(body))
    config = recipe(regions={"spot": ["disc", "cone", "nothing"]})
    whole, pictured = compare_wordings(config, find_sources(images), labels=labels, mapping=["spot=lump"])
    told = whole["regions"]["spot"]["wordings"]
    assert whole["images"] == told["disc"]["images_labelled"] == 3  # those annotated alone are asked
    assert [item.sample_id for item in pictured] == ["003.png", "004.png", "005.png"]
    # A disc of the square's area has 1 - x of it, x small; the cone's half a quarter: 2 / 4 over 1 + 1 / 4.
    assert 0.85 < told["disc"]["dice"][0] < 0.95
    assert told["cone"]["dice"][0] == pytest.approx(0.4, abs=0.02)
    assert told["nothing"]["dice"] == [0, 0, 0]
    with pytest.raises(UsageError, match=r"no region \(spot\) is a category"):
        compare_wordings(config, find_sources(images), labels=labels)
    for row in body["annotations"]:
        del row["segmentation"]
        row["bbox"] = [1, 1, 9, 9]
    labels.write_text(json.dumps(body))
    with pytest.raises(UsageError, match="no outlines of spot"):
        compare_wordings(config, find_sources(images), labels=labels, mapping=["spot=lump"])
    labels.write_text(json.dumps({**body, "annotations": []}))
    with pytest.raises(UsageError):
        compare_wordings(config, find_sources(images), labels=labels, mapping=["spot=lump"])


def test_all_wordings_of_a_batch_are_one_call(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = Planted.locate
    monkeypatch.setattr(
        Planted, "locate", lambda self, batch, regions: calls.append(regions) or real(self, batch, regions)
    )
    compare(images, "disc", "cone", "nothing")
    assert [[region.texts for region in regions] for regions in calls] == [[("disc",), ("cone",), ("nothing",)]] * 2


def test_images_are_spread_over_the_corpus_and_follow_the_seed() -> None:
    sources = [Source(f"{n:03d}", Path(f"{n}.png")) for n in range(100)]
    few = [int(source.sample_id) for source in choose(sources, 10, 0)]
    assert [place // 10 for place in few] == list(range(10))
    assert few == [int(source.sample_id) for source in choose(sources, 10, 0)]
    assert few != [int(source.sample_id) for source in choose(sources, 10, 1)]
    assert choose(sources[:3], 10, 0) == sources[:3]


def test_what_cannot_be_compared_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="region 'spot': one wording, expected several") as caught:
        compare(images, "disc")
    assert "--set 'regions.spot=[disc, another wording]'" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="17 wordings: at most 16"):
        compare(images, *(f"word {n}" for n in range(17)))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    with pytest.raises(QuarantineError, match="none of the 1 images tried can be used"):
        compare(tmp_path / "bad", "disc", "cone")
    write_images(tmp_path / "bad", 1)
    told, _ = compare_wordings(recipe(regions={"spot": ["disc", "cone"]}), find_sources(tmp_path / "bad"))
    assert told["images"] == 1
    assert "1 of 2 images were left out" in told["warnings"][0]
