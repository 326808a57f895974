"""``mwm score`` as a user meets it: lines, JSON, a page that stands alone, and one line for every mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.conftest import lacking
from tests.pipelines.test_report_page import FAINT, OVERFLOW, Opened
from tests.stage1_localize.coco_files import change
from tests.stage1_localize.planted_corpus import HEIGHT, SIDE, WIDTH, corner, disc_map, recipe, write_images
from tests.stage1_localize.scored_stores import runs

COUNT = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares localized as discs and cones; a COCO file of the squares, with their corners cut off."""
    from stage1_localize.job import localize

    folder = tmp_path_factory.mktemp("scored")
    images = write_images(folder / "images", COUNT)
    localize(recipe(regions={"square": "disc", "hill": "cone"}), images=images, out=folder / "store")
    body: dict[str, list[dict[str, object]]] = {"images": [], "annotations": [], "categories": []}
    body["categories"] = [{"id": 1, "name": "Square"}, {"id": 2, "name": "ring"}]
    for number in range(COUNT):
        body["images"].append({"id": number, "file_name": f"{number:03d}.png", "width": WIDTH, "height": HEIGHT})
        if number < COUNT - 1:
            outline = {"size": [HEIGHT, WIDTH], "counts": runs(square(number))}
            body["annotations"].append({"id": number, "image_id": number, "category_id": 1, "segmentation": outline})
    (folder / "coco.json").write_text(json.dumps(body))
    return folder


def square(number: int) -> np.ndarray:
    top, left = corner(number)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + SIDE, left : left + SIDE] = True
    mask[top, left] = False  # an outline that is all of its box would be taken for a box
    mask[top + SIDE - 1, left : left + 2] = False
    return mask


def naive_dice() -> float:
    """Mean over images, by nearest pixel: the truth of a map pixel is that of the pixel under its centre."""
    values = []
    for number in range(COUNT - 1):
        rows = ((np.arange(256) + 0.5) * HEIGHT / 256).astype(int)
        columns = ((np.arange(256) + 0.5) * WIDTH / 256).astype(int)
        true, found = square(number)[np.ix_(rows, columns)], disc_map(number) >= 127
        values.append(2 * (true & found).sum() / (true.sum() + found.sum()))
    return float(np.mean(values))


def is_sound(opened: Opened) -> None:
    """Nothing overflows on a phone or a desk, nothing is faint, every picture is there."""
    for width in (400, 1280):
        opened.page.set_viewport_size({"width": width, "height": 800})
        assert opened.page.evaluate(OVERFLOW) == []
    assert opened.page.evaluate(FAINT)[1] == []
    assert opened.page.locator("img").count() == 2 * (COUNT - 1)


def test_a_store_is_scored_on_the_command_line(made: Path, mwm, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (made / "store").rglob("*") if path.is_file()}
    command = ["score", made / "store", "--labels", made / "coco.json"]
    code, out, err = mwm(*command, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["regions"]["square"]["dice"][0] == pytest.approx(naive_dice(), abs=0.02)
    assert told["regions"]["square"]["recall"][0] == 1
    assert told["regions"]["square"]["images_unknown"] == 1
    assert set(told["regions"]) == {"square"}
    assert "not scored, for no category of the labels has their name: hill" in err

    code, out, _ = mwm(*command, "--out", tmp_path / "scored", "--exhaustive", "--map", "hill=Square")
    assert code == 0
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["square", "hill", "where", "next"]
    assert "3 images with it, 1 images without it" in lines[0]
    assert "found where it is not 1.000" in lines[0]
    assert lines[0].endswith("4 groups")
    again = json.loads((tmp_path / "scored" / "scores.json").read_text())
    assert again["regions"]["square"]["dice"] == told["regions"]["square"]["dice"]
    assert again["regions"]["hill"]["dice"][0] < again["regions"]["square"]["dice"][0]
    assert before == {path: path.read_bytes() for path in (made / "store").rglob("*") if path.is_file()}


def test_one_group_is_said_to_have_no_intervals(made: Path, mwm, tmp_path: Path) -> None:
    labels = Path(shutil.copy(made / "coco.json", tmp_path))
    body = json.loads(labels.read_text())
    change(labels, images=body["images"][:1], annotations=body["annotations"][:1])
    code, out, _ = mwm("score", made / "store", "--labels", labels)
    assert code == 0
    assert "1 images with it, one group: its intervals say nothing" in out


def test_its_page_stands_alone_and_shows_the_images_of_least_agreement(made: Path, mwm, tmp_path: Path) -> None:
    found = shutil.which("chromium")
    if found is None:
        lacking("chromium not found: apt-get install chromium")
    code, _, _ = mwm(
        "score", made / "store", "--labels", made / "coco.json", "--images", made / "images",
        "--out", tmp_path / "out", "--exhaustive", "--map", "hill=Square",
    )  # fmt: skip
    assert code == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        with Opened(browser, tmp_path / "out" / "report.html", viewport={"width": 400, "height": 800}) as opened:
            is_sound(opened)
            assert opened.page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
            assert opened.complaints == []
        browser.close()


def test_every_mistake_is_one_line_and_a_hint(made: Path, mwm, tmp_path: Path) -> None:
    labels = made / "coco.json"
    (tmp_path / "empty.json").touch()
    other = tmp_path / "other.json"
    other.write_text(labels.read_text().replace(".png", ".jpg"))
    none = tmp_path / "none.json"
    none.write_text(json.dumps({**json.loads(labels.read_text()), "images": [], "annotations": []}))
    for arguments, told in (
        (["--labels", tmp_path / "absent.json"], "no such file"),
        (["--labels", tmp_path / "empty.json"], "not JSON"),
        (["--labels", other], "is a sample with maps"),
        (["--labels", none], "no image"),
        (["--labels", labels, "--map", "square"], "expected region=category"),
        (["--labels", labels, "--map", "square=Squar"], "not in the labels"),
        (["--labels", labels, "--ignore", "Rnig"], "not in the labels"),
        (["--labels", labels, "--map", "square=ring"], "no annotation of ring"),
        (["--labels", labels, "--out", made / "store"], "artifact"),
        ([], "--labels"),
    ):
        code, out, err = mwm("score", made / "store", *arguments)
        errors = [line for line in err.splitlines() if line.startswith("error[")]
        assert (code, out, len(errors)) == (2, "", 1), (arguments, err)
        assert told in errors[0]
        assert err.splitlines()[-1].startswith("hint: "), arguments
    code, _, err = mwm("score", made / "images", "--labels", labels)
    assert code != 0
    assert "hint: " in err


def test_pictures_skip_an_image_that_changed_since(made: Path, mwm, tmp_path: Path) -> None:
    shutil.copytree(made / "images", tmp_path / "images")
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint8)).save(tmp_path / "images" / "000.png")
    code, _, _ = mwm(
        "score",
        made / "store",
        "--labels",
        made / "coco.json",
        "--images",
        tmp_path / "images",
        "--out",
        tmp_path / "o",
    )
    assert code == 0
    assert (tmp_path / "o" / "report.html").read_text().count("<img") == COUNT - 2


def wordings(made: Path, *more: object) -> list[object]:
    planted = ["--set", "grounder.name=planted", "--set", "segmenter.name=none", "--set", "grid_px=64"]
    return ["wordings", "--images", made / "images", *planted, *more]


def test_wordings_are_compared_on_the_command_line(made: Path, mwm, tmp_path: Path) -> None:
    asked = ["--set", "regions.square=[disc, cone, tumour, nothing]"]
    code, out, _ = mwm(*wordings(made, *asked, "--labels", made / "coco.json", "--out", tmp_path / "words"))
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 4 + 3 + 2
    assert lines[0].startswith("square: 'disc': found in 100%, mean 0.0")
    assert "Dice 0.89" in lines[0]
    assert lines[2] == "square: 'tumour': refused; known: disc, cone, box, nothing"
    assert lines[4].startswith("square: 'disc' / 'cone': Dice 0.39")  # 0.4 but for the grid
    assert lines[5].startswith("square: 'disc' / 'nothing': Dice 0.000")
    told = json.loads((tmp_path / "words" / "wordings.json").read_text())
    assert told["images"] == COUNT - 1
    code, out, _ = mwm(*wordings(made, *asked, "--count", 2, "--seed", 3, "--json"))
    assert code == 0
    told = json.loads(out)
    assert (told["images"], told["seed"]) == (2, 3)
    assert "dice" not in told["regions"]["square"]["wordings"]["disc"]


def test_the_page_of_wordings_stands_alone(made: Path, mwm, tmp_path: Path) -> None:
    found = shutil.which("chromium")
    if found is None:
        lacking("chromium not found: apt-get install chromium")
    asked = [
        "--set",
        "regions.square=[disc, cone, tumour]",
        "--labels",
        made / "coco.json",
        "--out",
        tmp_path / "words",
    ]
    assert mwm(*wordings(made, *asked))[0] == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        with Opened(browser, tmp_path / "words" / "report.html", viewport={"width": 400, "height": 800}) as opened:
            is_sound(opened)
            assert opened.complaints == []
        browser.close()


def test_every_mistake_in_comparing_wordings_is_one_line_and_a_hint(made: Path, mwm, tmp_path: Path) -> None:
    pair = ["--set", "regions.square=[disc, cone]"]
    for arguments, told in (
        (["--set", "regions.square=disc"], "one wording"),
        (["--set", "regions.square=[lesion, tumour]"], "not in the vocabulary"),
        (["--set", "regions.square=[disc, disc]"], "given twice"),
        ([], "regions"),
        ([*pair, "--labels", tmp_path / "absent.json"], "no such file"),
        ([*pair, "--labels", made / "coco.json", "--map", "square=Squar"], "not in the labels"),
        ([*pair, "--labels", made / "coco.json", "--map", "sqare=Square"], "no such region"),
        ([*pair, "--out", made / "store"], "artifact"),
        ([*pair, "--count", "0"], "--count"),
    ):
        code, out, err = mwm(*wordings(made, *arguments))
        errors = [line for line in err.splitlines() if line.startswith("error[")]
        assert (code, out, len(errors)) == (2, "", 1), (arguments, err)
        assert told in err
    code, _, err = mwm("wordings", "--images", tmp_path / "nowhere", *pair)
    assert code == 2
    assert "nowhere" in err
