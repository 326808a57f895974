"""Level ``maps``: stores that tell the truth, and stores that lie; whether words matter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from pipelines.audit import audit
from pipelines.audit_maps import CONTROLS, ROWS, Again, draw_rows, rows_asked, upper_bound
from shared.artifact import read_card
from shared.errors import UsageError
from shared.regions import RegionStore
from stage1_localize import answer
from stage1_localize.contracts import Detections
from stage1_localize.grounders.planted import WORDS, Planted, draw
from stage1_localize.job import localize
from tests.stage1_localize.planted_corpus import planted_store, recipe, write_images


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[RegionStore, Path]:
    return planted_store(tmp_path_factory.mktemp("audited"))


@pytest.fixture
def store(made: tuple[RegionStore, Path]) -> RegionStore:
    return made[0]


@pytest.fixture
def images(made: tuple[RegionStore, Path]) -> Path:
    return made[1]


def lying(images: Path, out: Path, monkeypatch: pytest.MonkeyPatch, change) -> Path:
    """A store whose maps, digests and card agree with one another, and not with what its card says made them."""
    whole = answer._encode

    def forged(*args):
        told = whole(*args)
        change(told.maps)
        return told

    with monkeypatch.context() as patch:
        patch.setattr(answer, "_encode", forged)
        return localize(recipe(), images=images, out=out).path


def by_check(result) -> dict[str, list[tuple[str, int]]]:
    found: dict[str, list[tuple[str, int]]] = {}
    for row in result.rows:
        found.setdefault(row.check, []).append((row.verdict, row.checked))
    return found


def test_an_honest_store_is_identical_and_says_what_that_proves(store, images, tmp_path):
    result = audit(store.path, level="maps", again=Again(images, "mine", 10), out=tmp_path / "report", command="x")
    assert result.exit_code == 0
    assert by_check(result)["maps made again"] == [("identical", 10)]
    told = next(row.detail for row in result.rows if row.check == "maps made again")
    assert "10 of 21 rows drawn by nonce mine, 1 quarantined ones not" in told
    assert "at most 25.89% of all drift" in told
    assert "refused by name" in next(row.detail for row in result.rows if row.check == "unrelated prompts")
    kept = json.loads((tmp_path / "report" / "maps.json").read_text())
    (found,) = kept.values()
    assert [row["row"] for row in found["rows"]] == draw_rows(
        store.card.identity.outputs["maps_root"], "mine", [s.row for s in store.samples if s.status == "ok"], 10
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert "--nonce mine draws them again" in page
    assert "spot, published" in page
    assert read_card(tmp_path / "report").identity.spec["level"] == "maps"


def test_a_store_that_lies_drifts(images, tmp_path, monkeypatch):
    path = lying(images, tmp_path / "store", monkeypatch, lambda maps: maps.__setitem__((0, slice(0, 40)), 200))
    assert audit(path).exit_code == 0, "its bytes agree with its card"
    result = audit(path, level="maps", again=Again(images, "n", None))
    assert result.exit_code == 3
    assert by_check(result)["maps made again"] == [("drift", 21)]
    assert "IoU" in next(row.detail for row in result.rows if row.verdict == "drift")
    ((_, found),) = result.maps
    assert found.drift_max == 1.0


@pytest.mark.parametrize(("step", "verdict", "code"), [(2, "tolerant", 0), (3, "drift", 3)])
def test_the_tolerance_is_two_steps_of_254(images, tmp_path, monkeypatch, step, verdict, code):
    def noise(maps):
        maps[:] = np.where(maps == 0, step, maps)

    path = lying(images, tmp_path / "store", monkeypatch, noise)
    result = audit(path, level="maps", again=Again(images, "n", 3))
    assert by_check(result)["maps made again"] == [(verdict, 3)]
    assert result.exit_code == code


def test_few_pixels_of_a_small_region_or_another_score_are_drift(images, tmp_path, monkeypatch):
    def bite(maps):
        rows, columns = np.nonzero(maps[0])
        maps[0][rows[:60], columns[:60]] = 0  # under .1 % of all pixels, 3 % of the region

    path = lying(images, tmp_path / "bitten", monkeypatch, bite)
    result = audit(path, level="maps", again=Again(images, "n", 3))
    assert by_check(result)["maps made again"] == [("drift", 3)]
    ((_, found),) = result.maps
    assert min(row.pixels_within for row in found.rows) >= 0.999
    whole = answer.encode_scores
    with monkeypatch.context() as patch:
        patch.setattr(answer, "encode_scores", lambda scores: whole(scores) // 2)
        path = localize(recipe(), images=images, out=tmp_path / "scores").path
    result = audit(path, level="maps", again=Again(images, "n", 3))
    assert by_check(result)["maps made again"] == [("drift", 3)]
    assert "scores by 0.5" in next(row.detail for row in result.rows if row.verdict == "drift")


def test_a_neighbour_that_is_gone_may_be_why(store, images, tmp_path, monkeypatch):
    poor = shutil.copytree(images, tmp_path / "images")
    for name in ("000.png", "004.png"):
        (poor / name).unlink()
    monkeypatch.setattr(Planted, "locate", lambda self, batch, regions: [Detections.none() for _ in batch.images])
    result = audit(store.path, level="maps", again=Again(poor, "n", None))
    assert {verdict for verdict, _ in by_check(result)["maps made again"]} == {"unrecomputable", "drift"}
    ((_, found),) = result.maps
    assert any("shared its model call" in row.detail for row in found.rows)


def test_images_that_are_gone_are_counted_and_nothing_else_left_is_5(store, images, tmp_path):
    poor = shutil.copytree(images, tmp_path / "images")
    names = [sample.sample_id for sample in store.samples if sample.status == "ok"]
    for name in names[:4]:
        (poor / name).unlink()
    result = audit(store.path, level="maps", again=Again(poor, "n", None))
    assert by_check(result)["maps made again"] == [("identical", 17), ("unrecomputable", 4)]
    assert result.exit_code == 0
    ((_, found),) = result.maps
    assert found.drift_max == 4 / 21, "who forges could have made them so"
    for name in names[4:]:
        (poor / name).write_bytes(b"other")
    result = audit(store.path, level="maps", again=Again(poor, "n", None))
    assert by_check(result)["maps made again"] == [("unrecomputable", 21)]
    assert result.exit_code == 5


def test_a_row_that_lies_about_its_image_drifts(images, tmp_path, monkeypatch):
    from stage1_localize import shard

    whole = shard.Sample

    def forged(**fields):
        fields["shape"] = (1, 999, 7) if fields["shape"] else None
        return whole(**fields)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "Sample", forged)
        path = localize(recipe(), images=images, out=tmp_path / "store").path
    result = audit(path, level="maps", again=Again(images, "n", 4))
    assert by_check(result)["maps made again"] == [("drift", 4)]
    assert "(1, 999, 7)" in next(row.detail for row in result.rows if row.verdict == "drift")


def test_a_store_beside_whose_images_are_not_these_is_counted(store, images, tmp_path):
    (tmp_path / "others").mkdir()
    write_images(tmp_path / "others" / "deep", 2)
    result = audit(store.path, level="maps", again=Again(tmp_path / "others", "n", 4))
    assert by_check(result)["maps made again"] == [("unrecomputable", 0)]
    assert result.exit_code == 5


def test_a_damaged_row_is_corrupt_and_wins(store, images, tmp_path):
    bad = shutil.copytree(store.path, tmp_path / "bad")
    path = bad / "regions.zarr" / "maps" / "c.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    result = audit(bad, level="maps", again=Again(images, "n", None))
    assert ("corrupt", 1) in by_check(result)["maps made again"]
    assert result.exit_code == 4


def test_other_parts_than_made_it_cannot_be_judged(store, images, monkeypatch):
    monkeypatch.setattr(Planted, "version", 9)
    result = audit(store.path, level="maps", again=Again(images, "n", 3))
    assert by_check(result)["maps made again"] == [("unrecomputable", 0)]
    assert "grounder.version" in next(row.detail for row in result.rows if row.verdict == "unrecomputable")
    assert result.exit_code == 5


def test_a_grounder_that_reads_no_words_is_not_held_to_them(images, tmp_path):
    made = localize(
        recipe(grounder="contrast", segmenter="boxfill", regions={"spot": "tumour"}), images=images, out=tmp_path / "s"
    )
    result = audit(made.path, level="maps", again=Again(images, "n", 5))
    assert by_check(result)["maps made again"] == [("identical", 5)]
    assert by_check(result)["unrelated prompts"] == [("unrecomputable", 0)]
    assert result.exit_code == 0
    assert "reads no words" in next(row.detail for row in result.rows if row.check == "unrelated prompts")


@pytest.mark.parametrize(("share", "verdict"), [(0.2, "identical"), (0.3, "drift")])
def test_the_control_passes_up_to_a_quarter(store, images, monkeypatch, share, verdict):
    """Unrelated words find a map whose mass is a known share of the real one."""
    monkeypatch.setattr(Planted, "check", lambda self, regions: None)
    for word in CONTROLS:
        monkeypatch.setitem(WORDS, word, "")
    from stage1_localize.grounders import planted

    def faint(word, x, y, radius):
        if word not in CONTROLS:
            return draw(word, x, y, radius)
        both = (draw("disc", x, y, radius) + draw("cone", x, y, radius)) / 2  # the mean mass of spot and hill
        return (both * share).astype(np.float32)

    monkeypatch.setattr(planted, "draw", faint)
    result = audit(store.path, level="maps", again=Again(images, "n", 6))
    assert by_check(result)["unrelated prompts"] == [(verdict, 6)]
    ((_, found),) = result.maps
    assert found.control.median == pytest.approx(share, rel=0.05)


def test_level_all_says_that_it_left_maps_out(store):
    result = audit(store.path, level="all")
    assert by_check(result)["maps made again"] == [("unrecomputable", 0)]
    assert result.exit_code == 0
    with pytest.raises(UsageError, match="needs the images"):
        audit(store.path, level="maps")


def test_the_command_line_prints_the_nonce_it_made(store, images, mwm):
    code, out, _ = mwm("audit", str(store.path), "--level", "maps", "--images", str(images), "--rows", "2", "--json")
    assert code == 0
    (found,) = json.loads(out)["maps"].values()
    again, out, _ = mwm(
        "audit", str(store.path), "--level", "maps", "--images", str(images), "--rows", "2", "--nonce", found["nonce"],
        "--json",
    )  # fmt: skip
    assert again == 0
    assert json.loads(out)["maps"]["store"]["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--level", "maps"], "needs the images"),
        (["--nonce", "x"], "--nonce: for --level maps"),
        (["--level", "maps", "--images", "IMAGES", "--rows", "none"], "--rows none: expected a number"),
        (["--level", "maps", "--images", "IMAGES", "--set", "grounder.options.lvl=3"], "unknown key"),
    ],
)
def test_bad_input_is_one_line(store, images, mwm, arguments, told):
    code, _, err = mwm("audit", str(store.path), *[str(images) if a == "IMAGES" else a for a in arguments])
    assert code == 2
    assert told in err
    assert "Traceback" not in err


@given(st.integers(1, 60), st.text(max_size=8))
def test_rows_are_drawn_once_and_by_the_nonce(count, nonce):
    rows = draw_rows("ab", nonce, range(100, 150), count)
    assert rows == sorted(set(rows)) == draw_rows("ab", nonce, range(100, 150), count)
    assert len(rows) == min(count, 50)
    assert set(rows) <= set(range(100, 150))


def test_every_row_is_as_likely():
    counts = np.zeros(20)
    for nonce in range(2000):
        counts[draw_rows("ab", str(nonce), range(20), 5)] += 1
    chi = float(((counts - 500) ** 2 / (500 * 0.75)).sum())
    assert chi < 43.8  # .999 of chi-square with 19 degrees


def test_the_bound_is_where_so_few_would_be_one_in_twenty():
    for found, drawn in ((0, 299), (3, 100), (17, 40)):
        bound = upper_bound(found, drawn, 10**6)
        assert binom.cdf(found, drawn, bound) == pytest.approx(0.05)
    assert upper_bound(2, 50, 50) == 0.04
    assert upper_bound(0, 0, 50) is None
    assert rows_asked(None) == ROWS
    assert rows_asked("all") is None
