import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.figures import histogram, interval_chart, line_chart, overlay, png, strip
from shared.report import (
    Example,
    Section,
    audit_report,
    finetune_report,
    gallery,
    localize_report,
    page,
    pretrain_report,
    table,
)

VOID = {"meta", "link", "img", "br"}
EVIL = '<script>alert("x")</script>&"\''


class Balanced(HTMLParser):
    """Fails on a tag that is closed wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def check(html: str) -> None:
    parser = Balanced()
    parser.feed(html)
    assert parser.stack == []
    assert "script" not in parser.seen
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|https?://""", html)
    assert html.count("Not for diagnosis") >= 2


@pytest.fixture
def example() -> Example:
    y, x = np.mgrid[0:64, 0:80] / 80
    return Example(EVIL, (x * y)[None], {EVIL: x, "b": y}, np.eye(5, dtype=bool), (y * y)[None])


def test_every_report_is_whole_escaped_and_asks_for_nothing(example: Example) -> None:
    line = {EVIL: ([0, 1, 2], [1.0, float("nan"), 3.0]), "one": ([1], [2.0]), "none": ([], [])}
    pages = [
        localize_report(
            prompts={EVIL: [EVIL], "b": ["b"]},
            examples=[example],
            coverage={EVIL: [0.0, 0.5], "b": []},
            quarantined={EVIL: 2},
            facts={EVIL: EVIL},
            warnings=[EVIL],
        ),
        pretrain_report(curves=line, hidden=line, examples=[example], facts={"a": 1}),
        finetune_report(
            scores=[(EVIL, 0.5, 0.25, 0.75)],
            classes=[EVIL, "b"],
            confusion=[[3, 1], [0, 4]],
            curves=line,
            facts={},
            note=EVIL,
        ),
        audit_report([{"artifact": EVIL, "check": "c", "checked": 3, "verdict": "drift", "detail": EVIL}]),
    ]
    for html in pages:
        check(html)
        assert "alert(&quot;x&quot;)" in html or "alert(&#34;x" in html


def test_the_same_inputs_give_the_same_bytes(example: Example) -> None:
    one, two = (page("t", "s", [Section("h", gallery([example]))]) for _ in range(2))
    assert one == two


def test_an_overlay_shows_where_it_is_probable_and_hides_what_is_hidden() -> None:
    image = np.full((1, 8, 8), 0.5)
    region = np.zeros((8, 8))
    region[:4] = 1
    tinted = overlay(image, region, colour=(255, 0, 0), side_px=64)
    assert tinted.shape == (64, 64, 3)
    assert (tinted[8, :, 0] > 170).all()
    assert (tinted[60] == 127).all()
    hidden = np.zeros((2, 2), bool)
    hidden[0, 1] = True
    masked = overlay(image, hidden=hidden, side_px=64)
    assert masked[10, 50].max() < 60
    assert masked[10, 10].min() > 120
    assert overlay(image[:, :4], side_px=64).shape == (32, 64, 3)


@given(
    st.lists(
        st.tuples(st.floats(-1e6, 1e6), st.one_of(st.floats(-1e9, 1e9), st.just(float("nan")), st.just(float("inf")))),
        max_size=12,
    )
)
def test_a_chart_draws_every_finite_point_inside_its_frame(points: list[tuple[float, float]]) -> None:
    svg = line_chart({"a": ([x for x, _ in points], [y for _, y in points])}, x_label="x", y_label="y")
    finite = [point for point in points if np.isfinite(point).all()]
    found = re.search(r'polyline points="([^"]*)"', svg)
    assert bool(found) == bool(finite)
    if found:
        drawn = [tuple(map(float, pair.split(","))) for pair in found[1].split()]
        assert len(drawn) == len(finite)
        assert all(57 <= x <= 509 and 11 <= y <= 209 for x, y in drawn)


def test_histogram_and_intervals() -> None:
    assert histogram([0.0, 0.0, 1.0], x_label="x").count("<rect") == 20
    assert "Nothing" in histogram([float("nan")], x_label="x")
    assert interval_chart([("a", 0.5, 0.4, 0.6)]).count("<circle") == 1


def test_table_shows_numbers_to_three_digits() -> None:
    assert '<td class="n">0.123</td>' in table(("a",), [(0.12345,)])


def test_a_strip_is_a_png_of_all_panels() -> None:
    panel = np.zeros((50, 40, 3), np.uint8)
    raw = strip([("a", panel), ("b", panel)], title="t", gap_px=10)
    assert raw.startswith(b"\x89PNG")
    assert int.from_bytes(raw[16:20], "big") == 10 + 2 * 50
    assert png(panel).startswith(b"\x89PNG")
