"""Which images a report shows: those planted as the worst, by each rule, and no more than said."""

import math
from pathlib import Path

import numpy as np
import pytest

from shared.errors import CorruptError
from stage1_localize.examples import (
    EXAMPLES_MAX,
    FRAGMENTED,
    LOW,
    NOTHING,
    SPREAD,
    SPREAD_MAX,
    UNUSUAL,
    Detected,
    Measured,
    choose,
    measure,
    spread,
)
from tests.shared.region_stores import Content, make_content, write

NAN = math.nan
REGIONS = ("core", "rim")


def plain(row: int) -> Measured:
    return Measured(row, (0.2, 0.4), (1, 1), (0.9, 0.8))


def rows_of(chosen: dict[int, dict[str, str]], why: str) -> dict[int, str]:
    return {row: reasons[why] for row, reasons in chosen.items() if why in reasons}


def test_the_worst_by_each_rule_are_those_that_were_planted() -> None:
    rows = [plain(row) for row in range(300)]
    rows[33] = Measured(33, (0.2, 0.4), (1, 1), (0.9, 0.07))
    rows[55] = Measured(55, (0.2, 0.4), (1, 1), (0.11, NAN))
    rows[66] = Measured(66, (0.2, 0.4), (9, 1), (0.9, 0.8))
    rows[77] = Measured(77, (0.2, 0.4), (3, 17), (0.9, 0.8))
    rows[88] = Measured(88, (0.2, 0.41), (2, 1), (0.9, 0.8))
    rows[99] = Measured(99, (0.95, 0.4), (1, 1), (0.9, 0.8))
    rows[111] = Measured(111, (0.0, 0.0), (0, 0), (NAN, NAN))
    rows[122] = Measured(122, (0.0, 0.0), (0, 0), (0.9, NAN))  # a box, though too unlikely to reach one half
    chosen = choose(rows, REGIONS)
    assert rows_of(chosen, LOW) == {33: "rim 0.07 at best", 55: "core 0.11 at best"}
    assert rows_of(chosen, FRAGMENTED) == {77: "rim in 17 parts", 66: "core in 9 parts"}
    assert rows_of(chosen, UNUSUAL) == {99: "core 95.0%, median 20.0%", 111: "rim 0.0%, median 40.0%"}
    assert rows_of(chosen, NOTHING) == {111: ""}
    assert chosen[111].keys() == {UNUSUAL, NOTHING}
    evenly = list(rows_of(chosen, SPREAD))
    assert evenly == list(chosen)[:SPREAD_MAX]
    assert (evenly[0], evenly[-1]) == (0, 299)
    assert max(np.diff(evenly)) - min(np.diff(evenly)) <= 1


def test_a_rule_that_tells_no_image_from_another_chooses_none() -> None:
    chosen = choose([plain(row) for row in range(50)], REGIONS)
    assert {why for reasons in chosen.values() for why in reasons} == {SPREAD}
    assert choose([], REGIONS) == {}
    assert list(choose([plain(4)], REGIONS)) == [4]


def test_however_many_images_there_are_few_are_chosen() -> None:
    rng = np.random.default_rng(0)
    rows = [
        Measured(row, tuple(rng.random(2)), tuple(rng.integers(1, 50, 2).tolist()), tuple(rng.random(2)))
        for row in range(1000)
    ] + [Measured(1000 + row, (0.0, 0.0), (0, 0), (NAN, NAN)) for row in range(100)]
    assert SPREAD_MAX < len(choose(rows, REGIONS)) <= EXAMPLES_MAX


def test_rows_are_measured_as_the_store_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.region_arrays._FLAT_CHUNK", 4)  # so that rows lie across pieces
    content = make_content(40)
    content.maps[7, 0] = 0
    content.maps[7, 0, 2, [1, 2, 5]] = 200, 127, 254  # two parts: 127 is one half, 126 is not
    content.maps[7, 0, 5, 8] = 126
    content.boxes[9] = (
        np.zeros((9, 4), np.int32),
        np.array([655, 6553, 0, 9, 8, 7, 6, 5, 4], np.uint16),
        np.array([1] * 9, np.uint16),
    )
    write(tmp_path / "store", content)
    arrays = tmp_path / "store" / "regions.zarr"
    rows = [row for row in range(40) if row != 3]
    measured = measure(arrays, rows, 2)
    assert [item.row for item in measured] == rows
    by_row = {item.row: item for item in measured}
    assert by_row[7].parts[0] == 2
    assert by_row[7].shares[0] == 3 / content.maps[7, 0].size
    for row in rows:
        assert by_row[row].scores == pytest.approx(best(content, row), nan_ok=True)
    assert by_row[9].scores[1] == pytest.approx(6553 / 65535)
    assert spread(rows, 3) == [0, 20, 39]
    backwards = Detected(arrays)
    for row in (39, 9, 0):
        assert backwards.best_scores(row, 2) == pytest.approx(best(content, row), nan_ok=True)


def best(content: Content, row: int) -> tuple[float, ...]:
    _, scores, regions = content.boxes[row]
    return tuple(
        max((score / 65535 for score in scores[regions == region].tolist()), default=NAN) for region in range(2)
    )


def test_a_store_without_any_box_is_measured_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    content = make_content(8)
    content.boxes = [(np.zeros((0, 4), np.int32), np.zeros(0, np.uint16), np.zeros(0, np.uint16))] * 8
    write(tmp_path / "store", content)
    arrays = tmp_path / "store" / "regions.zarr"
    assert all(math.isnan(score) for item in measure(arrays, [0, 7], 2) for score in item.scores)
    damaged = next(path for path in (arrays / "box_offsets").iterdir() if path.name != "zarr.json")
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(CorruptError, match="box_offsets"):
        measure(arrays, [0], 2)
