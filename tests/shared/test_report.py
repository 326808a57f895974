import re
from html.parser import HTMLParser

import numpy as np
import pytest

from shared.charts import confusion_matrix
from shared.gallery import Case, cases
from shared.page import commands, digest
from shared.report import (
    ONE_BRAIN,
    Example,
    LeftOut,
    Made,
    Section,
    audit_report,
    finetune_report,
    gallery,
    lineage,
    localize_report,
    page,
    pretrain_report,
    table,
    tour_report,
)

VOID = {"meta", "link", "img", "br", "input"}
EVIL = '<script>alert("x")</script>&"\'><img src=x onerror=y>'
LINES = {EVIL: ([0, 1, 2], [1.0, float("nan"), 3.0]), "one": ([1], [2.0]), "none": ([], [])}
AUDIT = {"artifact": EVIL, "check": "c", "checked": 3, "verdict": "drift", "detail": EVIL}


class Balanced(HTMLParser):
    """Fails on a tag that is closed wrongly; keeps what was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def check(html: str) -> None:
    """Well-formed, asks for nothing, runs no script but its own, says what it is not for."""
    parser = Balanced()
    parser.feed(html)
    assert parser.stack == []
    assert [attrs for tag, attrs in parser.seen if tag == "script"] == [{}]
    for tag, attrs in parser.seen:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "data-map"):
            if name in attrs:
                assert re.match(r"data:|#s\d+$", attrs[name] or ""), (tag, name, attrs[name])
    assert not re.search(r"url\(|https?:|@import", html)
    assert html.count("Not for diagnosis") >= 2
    assert "default-src 'none'" in html
    ids = [attrs["id"] for _, attrs in parser.seen if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"] for tag, attrs in parser.seen if tag == "a"} <= {f"#{name}" for name in ids}


@pytest.fixture
def example() -> Example:
    y, x = np.mgrid[0:64, 0:80] / 80
    return Example(
        EVIL,
        (x * y)[None],
        {EVIL: x, "b": y},
        np.eye(5, dtype=bool),
        (y * y)[None],
        why={EVIL: EVIL, "other": ""},
        scores={EVIL: 0.5},
    )


def tour(examples: list[Example]) -> str:
    return tour_report(
        prompts={EVIL: [EVIL, "other"], "b": ["b"]},
        examples=examples,
        curves=LINES,
        hidden=LINES,
        arms={"encoder": [(EVIL, 0.5, 0.25, 0.75)], EVIL: [("only here", float("nan"), 0.1, 0.9)]},
        audit=[AUDIT],
        made=[Made(EVIL, "encoder", "a" * 64, ("b" * 64, EVIL), 3.0)],
        again=["mwm run tour", EVIL],
        facts={EVIL: EVIL},
        coverage={EVIL: [0.0, 0.5]},
        learning=LINES,
        chance={EVIL: 0.25},
        quarantined={EVIL: 1},
        warnings=[EVIL],
        note=ONE_BRAIN,
    )


def test_every_report_is_whole_escaped_and_asks_for_nothing(example: Example) -> None:
    pages = [
        localize_report(
            prompts={EVIL: [EVIL], "b": ["b"]},
            examples=[example],
            coverage={EVIL: [0.0, 0.5], "b": []},
            quarantined={EVIL: 2},
            facts={EVIL: EVIL},
            warnings=[EVIL],
            scores={EVIL: [0.25, 0.75], "b": []},
            measured=7,
            left_out=[LeftOut(EVIL, EVIL, EVIL), LeftOut("a", "b", "c")],
        ),
        pretrain_report(curves=LINES, hidden=LINES, examples=[example], facts={"a": 1}, settings={EVIL: EVIL}),
        finetune_report(
            scores=[(EVIL, 0.5, 0.25, 0.75)],
            more=[
                Section(EVIL, confusion_matrix([EVIL, "b"], [[3, 1], [0, 4]]), EVIL),
                Section("Worst", cases([Case(EVIL, example.image, EVIL, EVIL, 0.9)])),
            ],
            curves={**LINES, "val loss": ([1], [2])},
            facts={},
            note=EVIL,
        ),
        audit_report([AUDIT]),
        tour([example]),
    ]
    for html in pages:
        check(html)
        assert "&lt;script&gt;alert(&quot;x&quot;)" in html


def test_reports_without_content_are_still_pages() -> None:
    empty = {"curves": {}, "facts": {}}
    check(localize_report(prompts={}, examples=[], coverage={}, quarantined={}, facts={}))
    check(pretrain_report(hidden={}, examples=[], **empty))
    check(finetune_report(scores=[], more=[], note="", **empty))
    check(audit_report([]))
    html = tour_report(prompts={}, examples=[], hidden={}, arms={}, audit=[], made=[], again=[], **empty)
    check(html)
    assert html.count("<section") == 1  # what was left out is always said


def test_the_same_inputs_give_the_same_bytes(example: Example) -> None:
    assert tour([example]) == tour([example])


def test_a_tour_of_many_real_sized_images_stays_small() -> None:
    rng = np.random.default_rng(0)
    grid = np.add.outer(np.arange(256), np.arange(256)) / 512
    examples = [
        Example(
            f"axial/{i}",
            (0.6 * grid + 0.05 * rng.random((256, 256)))[None],
            {"grey matter": np.sin(9 * grid + i) ** 2, "white matter": np.cos(9 * grid) ** 2},
            rng.random((14, 14)) < 0.6,
            grid[None],
        )
        for i in range(8)
    ]
    assert 100_000 < len(tour(examples).encode()) < 2_500_000


def test_the_one_brain_is_said_where_it_is_asked_for(example: Example) -> None:
    assert ONE_BRAIN == "One template brain shows that the pipeline runs, not that pretraining helps."
    assert f'<p class="note loud">{ONE_BRAIN}</p>' in tour([example])


def test_a_gallery_says_how_much_of_the_region_is_hidden() -> None:
    region = np.zeros((8, 8))
    region[:4] = 1
    hidden = np.zeros((4, 4), bool)
    hidden[0] = hidden[3, :1] = True
    html = gallery([Example("a", np.zeros((1, 8, 8)), {"r": region}, hidden)])
    assert "31% hidden, 50% of the region" in html
    assert '<span class="share">50.0%</span>' in html
    none = gallery([Example("a", np.zeros((1, 8, 8)), {"r": 0 * region}, hidden)])
    assert "31% hidden, no region" in none


def test_a_gallery_carries_maps_only_for_its_slider(example: Example) -> None:
    assert gallery([example]).count("data-map=") == 2
    assert "data-map" not in gallery([example], controls=False)
    assert 'class="controls" hidden' in gallery([example])  # shown by the script alone


def test_a_gallery_says_why_an_image_is_shown_and_how_sure_its_boxes_are(example: Example) -> None:
    html = gallery([example])
    assert 'data-why="other"><b>other</b></span>' in html
    assert '<option value="other">' in html
    assert ">score 0.50<" in html
    assert ">no box<" in html
    bare = gallery([Example("a", example.image, {"r": example.maps["b"]})])
    for absent in ("score", "data-why", "<select", "shown"):
        assert absent not in bare


def test_a_scale_is_not_broken_over_two_lines(example: Example) -> None:
    assert re.search(
        r'<span class="unbroken">0 <span class="ramp"[^>]*></span> 1 probability</span>', gallery([example])
    )


def test_an_audit_says_first_what_did_not_pass() -> None:
    def said(*verdicts: str) -> str:
        html = audit_report([{**AUDIT, "verdict": verdict} for verdict in verdicts])
        found = re.search(r'<p class="sub">([^<]*)</p>', html)
        assert found
        return found[1]

    assert said("identical", "tolerant") == "Every check passed."
    assert said("identical", "drift", "missing") == "2 of 3 checks did not pass."
    assert said("identical", "unrecomputable") == "1 of 2 checks passed. 1 could not be recomputed here."
    assert said("corrupt", "unrecomputable").startswith("1 of 2 checks did not pass. 1 could")


def test_lineage_names_inputs_it_knows_and_shows_whole_digests() -> None:
    html = lineage(
        [Made("regions", "region-store", "a" * 64), Made("encoder", "encoder", "b" * 64, ("a" * 64, "c" * 64))]
    )
    assert "<td>regions, cccccccccccc</td>" in html
    assert f"<b>{'b' * 12}</b>{'b' * 52}" in html
    assert digest("0" * 64).count("0") == 64
    beside = lineage(
        [Made("a", "model", "a" * 64), Made("b", "model", "b" * 64, ("a" * 64,)), Made("c", "model", "c" * 64)]
    )
    assert re.findall(r">([→+])<", beside) == ["→", "+"]


def test_a_table_sets_numbers_right() -> None:
    html = table(("name", "count", "share"), [("a", 12345, "1.5%"), ("b", np.int64(2), "20%")])
    assert html.count('<td class="n">') == 4
    assert "<td>a</td>" in html
    assert "12\u202f345" in html
    assert '<td class="n">0.123</td>' in table(("a",), [(0.12345,)])


def test_links_stand_at_the_top_of_long_pages_and_empty_cards_are_left_out() -> None:
    sections = [Section(f"h{place}", "<p>x</p>") for place in range(5)]
    assert page("t", "s", sections).count('<a href="#s') == 5
    assert "<nav>" not in page("t", "s", [*sections[:4], Section("empty", "")])
    assert "empty" not in re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page("t", "s", [Section("empty", "")]))


def test_commands_keep_their_lines() -> None:
    assert commands(["a <b>", "c"]) == "<pre><code>a &lt;b&gt;\nc</code></pre>"
