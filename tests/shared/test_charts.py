import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.charts import (
    NOTHING,
    arms_chart,
    confusion_matrix,
    duration_bars,
    forest_chart,
    histogram,
    interval_chart,
    line_chart,
)

NUMBERS = st.one_of(st.floats(-1e9, 1e9), st.sampled_from([float("nan"), float("inf"), 5e-324, 1e300, -1e300]))


def drawn(svg: str, kind: str = r"s\d") -> list[list[tuple[float, ...]]]:
    lines = re.findall(rf'<polyline class="{kind}" points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), NUMBERS), max_size=12))
def test_a_chart_draws_every_finite_point_inside_its_frame(points: list[tuple[float, float]]) -> None:
    svg = line_chart({"a": ([x for x, _ in points], [y for _, y in points])}, x_label="x", y_label="y")
    finite = [point for point in points if np.isfinite(point).all()]
    assert (svg == NOTHING) == (not finite)
    if finite:
        (line,) = drawn(svg)
        assert len(line) == len(finite)
        assert all(53 <= x <= 479 and 9 <= y <= 225 for x, y in line)


def test_larger_is_higher_and_ticks_are_round() -> None:
    svg = line_chart({"a": ([0, 1, 2], [0.3, 1.06, 0.3])}, x_label="x", y_label="y")
    ((_, low), (_, high), _) = drawn(svg)[0]
    assert high < low
    assert re.findall(r'text-anchor="end">([^<]*)<', svg) == ["0.2", "0.4", "0.6", "0.8", "1", "1.2"]
    zero = line_chart({"a": ([0, 1], [5, 9])}, x_label="x", y_label="y", zero=True)
    assert 'text-anchor="end">0<' in zero


def test_between_whole_numbers_of_epochs_there_is_no_tick() -> None:
    def places(*x: float) -> list[str]:
        svg = line_chart({"a": (x, [0.0] * len(x))}, x_label="epoch", y_label="y")
        return re.findall(r'text-anchor="middle">([\d.]+)<', svg)

    assert places(1, 2) == ["1", "2"]
    assert places(1, 3.5) == ["1", "1.5", "2", "2.5", "3", "3.5"]


def test_a_long_line_is_drawn_faint_with_its_mean_and_stays_small() -> None:
    steps = np.arange(30_000)
    svg = line_chart({"loss": (steps, np.where(steps % 2, 1.0, 0.0))}, x_label="step", y_label="loss")
    (mean,) = drawn(svg)
    assert len({y for _, y in mean[20:-20]}) <= 2
    assert len(drawn(svg, r"faint s1")[0]) <= 600
    assert len(svg) < 40_000
    assert "mean over 1000 points" in svg


def test_names_at_line_ends_do_not_touch() -> None:
    svg = line_chart({str(i): ([0, 1], [0, 1 + i / 1000]) for i in range(5)}, x_label="x", y_label="y")
    places = [float(y) for y in re.findall(r'class="end s\d" x="[^"]*" y="([^"]*)"', svg)]
    assert np.diff(sorted(places)).min() >= 14.9
    bottom = line_chart({str(i): ([0, 1], [1, i / 1000]) for i in range(5)}, x_label="x", y_label="y")
    places = [float(y) for y in re.findall(r'class="end s\d" x="[^"]*" y="([^"]*)"', bottom)]
    assert max(places) <= 270 - 46 + 4.1


def test_histogram_counts() -> None:
    assert histogram([0.0, 0.0, 1.0], x_label="x").count("<rect") == 20
    assert "0% to 5%: 2<" in histogram([0.0, 0.0, 1.0], x_label="x")
    assert "95% to 100%: 1<" in histogram([0.0, 0.0, 7.0, float("nan")], x_label="x")
    assert histogram([float("nan")], x_label="x") == NOTHING


def test_intervals_stand_where_they_are() -> None:
    html = interval_chart([("a<b", 0.5, 0.4, 0.6)], chance={"a<b": 0.25})
    assert 'style="left:40.00%;right:40.00%"' in html
    assert 'class="dot s2 round" style="left:50.00%"' in html
    assert 'class="chance" style="left:25.00%"' in html
    assert "a&lt;b" in html
    assert "<b>0.500</b> 0.40 to 0.60" in html
    assert interval_chart([]) == NOTHING


def test_arms_stand_together_and_differ_in_shape() -> None:
    html = arms_chart({"one": [("a", 0.5, 0.4, 0.6), ("b", float("nan"), 0, 1)], "two": [("a", 0.7, 0.6, 0.8)]})
    assert html.count('class="name"') == 2
    assert html.count('class="dot s1 round"') == 1
    assert html.count('class="dot s2 square"') == 1
    assert html.count("undefined") == 1


def test_a_confusion_matrix_is_shaded_by_row() -> None:
    html = confusion_matrix(["a", "<"], [[3, 1], [0, 0]])
    assert '<td class="n same" style="--share:0.750">3</td>' in html
    assert '<td class="n" style="--share:0.250">1</td>' in html
    assert "&lt;" in html
    with pytest.raises(ValueError, match="shorter"):
        confusion_matrix(["a", "b"], [[1, 2]])


def test_durations_follow_one_another() -> None:
    html = duration_bars([("a", 30.0), ("b", 10.0)])
    assert "left:0.00%;right:25.00%" in html
    assert "left:75.00%;right:0.00%" in html
    assert duration_bars([("a", 0.0)]) == NOTHING


def test_a_histogram_of_scores_has_no_percentages() -> None:
    drawn = histogram([0.1, 0.12], x_label="best score", percent=False)
    assert "<title>0.1 to 0.15: 2</title>" in drawn
    assert "%" not in drawn
    assert "<title>10% to 15%: 2</title>" in histogram([0.1, 0.12], x_label="share")


def test_differences_stand_at_their_places_around_none() -> None:
    body = forest_chart([("a", 0.02, -0.04, 0.08), ("b", float("nan"), 0.0, 0.0)])
    widest = float(re.findall(r'<span style="left:100%">\+([\d.]+)</span>', body)[0])
    assert widest >= 8
    assert re.findall(r'<span style="left:(\d+)%">([^<]*)</span>', body) == [
        ("0", f"-{widest:g}"), ("50", "0"), ("100", f"+{widest:g}"),
    ]  # fmt: skip
    dots = re.findall(r'class="dot s2 round" style="left:([\d.]+)%', body)
    assert [float(dot) for dot in dots] == pytest.approx([50 + 50 * 2 / widest], abs=0.1)
    assert "undefined" in body
    assert forest_chart([]) == NOTHING
