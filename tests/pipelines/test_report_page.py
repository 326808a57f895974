"""Report pages in a real browser: nothing leaves or breaks, controls work, phones and dark pages can be read."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

from shared.report import Example, LeftOut, localize_report
from tests.conftest import lacking
from tests.pipelines.conftest import Chain

KINDS = {
    "region-store": "wide",
    "encoder": "out/encoder",
    "model": "out/finetuned",
    "audit": "out/audit",
    "chain": "out",
}
OVERFLOW = """() => [...document.querySelectorAll('body *')].filter(
    (item) => !item.closest('.scroll, pre, .says') && item.getBoundingClientRect().right > innerWidth + 0.5
).map((item) => item.className || item.tagName)"""
# Texts with less than WCAG's 4.5 to 1 against what is painted under them; colours are resolved by a canvas.
FAINT = """() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  const painted = (colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
      .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  let seen = 0;
  while (walker.nextNode()) {
    const owner = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !owner.checkVisibility() || owner.closest('script, title')) continue;
    seen += 1;
    const under = [];
    for (let item = owner; item; item = item.parentElement) under.unshift(getComputedStyle(item).backgroundColor);
    const style = getComputedStyle(owner);
    const back = painted(under);
    const front = painted([...under, owner.closest('svg') ? style.fill : style.color]);
    const contrast = (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    if (contrast < 4.5) found.push([walker.currentNode.data.trim(), contrast.toFixed(2)]);
  }
  return [seen, found];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    if found is None:
        lacking("chromium not found: apt-get install chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        opened = playwright.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


class Opened:
    """A page that was opened from its file, and everything it asked for or complained about."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.complaints: list[str] = []
        own = path.resolve().as_uri()

        def answer(route: Route) -> None:
            url = route.request.url
            if url != own and not url.startswith("data:"):
                self.complaints.append(f"request: {url}")
                return route.abort()
            return route.continue_()

        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.page.route("**/*", answer)
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.goto(own)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def pages(finished: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each kind from real runs; the region store's has two regions."""
    from pipelines.cli import main

    out = tmp_path_factory.mktemp("pages") / "wide"
    command = ["localize", str(finished.recipe), "--images", str(finished.images), "--out", str(out)]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--set", "regions.core=cone"])
    assert not stopped.value.code
    return {kind: (out if at == "wide" else finished.root / at) / "report.html" for kind, at in KINDS.items()}


def pixels(page: Page) -> list[str]:
    """What every canvas that is shown holds."""
    return page.evaluate(
        "[...document.querySelectorAll('canvas')].filter((c) => c.checkVisibility()).map((c) => c.toDataURL())"
    )


def wait(done: Callable[[], bool]) -> None:
    """Ask again until it is so; Playwright's own waiting needs an eval that the page forbids."""
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def shown(page: Page, region: str) -> int:
    return page.locator(f'figure[data-region="{region}"]:visible').count()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_stands_alone_and_is_fit_to_read_on_desk_and_phone(
    browser: Browser, pages: dict[str, Path], kind: str, scheme: Any
) -> None:
    with Opened(browser, pages[kind], color_scheme=scheme, viewport={"width": 400, "height": 800}) as opened:
        page = opened.page
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(back.strip("rgb()").split(",")[0]) < 60) == (scheme == "dark")
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(OVERFLOW) == []
        seen, faint = page.evaluate(FAINT)
        assert seen > 10
        assert faint == []
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
        assert opened.complaints == []


def test_slider_and_checkboxes_change_what_is_shown_by_keyboard_alone(browser: Browser, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["region-store"]) as opened:
        page = opened.page
        still = shown(page, "core")
        assert still == shown(page, "bright") > 0
        assert pixels(page) == []
        share = page.locator('figure[data-region="core"] .share').last

        def percent() -> float:
            return float((share.text_content() or "").rstrip("%"))

        half = percent()

        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.type") == "range"
        page.keyboard.press("ArrowRight")
        page.locator("output", has_text="probability of 0.05 or more").wait_for()
        wait(lambda: len(pixels(page)) == 2 * still)
        low = pixels(page)
        assert len(low) == 2 * still
        low_share = percent()

        page.keyboard.press("End")
        page.locator("output", has_text="probability of 0.95 or more").wait_for()
        wait(lambda: percent() < low_share)
        high = pixels(page)
        assert [a == b for a, b in zip(low[1::2], high[1::2], strict=True)] == [False] * still  # a cone shrinks

        page.keyboard.press("Home")
        wait(lambda: pixels(page) == [])
        assert percent() == half

        for _ in range(2):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.value") == "core"
        page.keyboard.press("Space")
        assert (shown(page, "core"), shown(page, "bright")) == (0, still)
        page.keyboard.press("Space")
        assert (shown(page, "core"), shown(page, "bright")) == (still, still)
        assert opened.complaints == []


EVIL = "<script>absent()</script><img src=x>"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A region store's page of four images, told apart by scores and reasons, and of five that were left out."""
    y, x = np.mgrid[0:32, 0:32] / 32
    whys = [{"evenly spread": ""}, {"low score": "core 0.20"}, {"low score": "", EVIL: ""}, {"nothing found": ""}]
    scores = [{"core": 0.9, "rim": 0.4}, {"core": 0.2, "rim": 0.7}, {"rim": 0.5}, {}]
    examples = [
        Example(f"case-{place}", (x * y)[None], {"core": x, "rim": y}, why=why, scores=found)
        for place, (why, found) in enumerate(zip(whys, scores, strict=True))
    ]
    left_out = [LeftOut(f"{EVIL}{place}", ("decode_failed", "too_large")[place % 2], EVIL) for place in range(5)]
    path = tmp_path_factory.mktemp("planted") / "report.html"
    path.write_text(
        localize_report(
            prompts={"core": ["core"], "rim": ["rim"]},
            examples=examples,
            coverage={"core": [0.5] * 4, "rim": [0.5] * 4},
            scores={"core": [0.9, 0.2], "rim": [0.4, 0.7, 0.5]},
            quarantined={"decode_failed": 30, "too_large": 2},
            left_out=left_out,
            measured=4,
            facts={},
        )
    )
    return path


def cards(page: Page) -> list[str]:
    return [name[-1] for name in page.locator(".case:visible h3").all_text_contents()]


def test_images_are_filtered_by_score_reason_and_region(browser: Browser, planted: Path) -> None:
    with Opened(browser, planted) as opened:
        page = opened.page
        count, why, least = page.locator(".gallery .count"), page.locator(".gallery select"), page.locator(".least")
        assert cards(page) == ["0", "1", "2", "3"]
        assert count.text_content() == "4 of 4 shown"

        why.select_option("low score")
        assert cards(page) == ["1", "2"]
        assert count.text_content() == "2 of 4 shown"
        why.select_option(EVIL)
        assert cards(page) == ["2"]
        why.select_option("")

        least.fill("60")
        assert cards(page) == ["0", "1"]
        assert page.locator(".least-told").text_content() == "best of 0.60 or more"
        page.locator('.gallery input[value="rim"]').click()  # then only the other region's scores count
        assert cards(page) == ["0"]
        assert count.text_content() == "1 of 4 shown"
        why.select_option("low score")
        assert cards(page) == []
        least.fill("0")
        assert cards(page) == ["1", "2"]
        why.select_option("")
        page.locator('.gallery input[value="rim"]').click()
        assert cards(page) == ["0", "1", "2", "3"]
        assert opened.complaints == []


def test_what_was_left_out_is_filtered_by_reason_and_its_ids_run_nothing(browser: Browser, planted: Path) -> None:
    with Opened(browser, planted) as opened:
        page = opened.page
        rows = page.locator(".listing tbody tr:visible")
        assert rows.count() == 5
        assert rows.first.locator("td").all_text_contents() == [f"{EVIL}0", "decode_failed", EVIL]
        page.locator(".listing select").select_option("too_large")
        assert rows.count() == 2
        assert page.locator(".listing .count").text_content() == "2 of 5 shown"
        page.locator(".listing select").select_option("")
        assert rows.count() == 5
        assert page.get_by_text("5 of 32 images left out").is_visible()
        assert page.locator("img[src=x]").count() == 0
        assert opened.complaints == []


def test_a_scale_stays_on_one_line_on_a_phone(browser: Browser, planted: Path) -> None:
    with Opened(browser, planted, viewport={"width": 340, "height": 800}) as opened:
        scale = opened.page.locator(".key-bar .unbroken").bounding_box()
        assert scale is not None
        assert scale["height"] < 30
        assert opened.page.evaluate(OVERFLOW) == []


def test_without_its_script_every_image_and_row_is_shown(browser: Browser, planted: Path) -> None:
    with Opened(browser, planted, java_script_enabled=False) as opened:
        assert cards(opened.page) == ["0", "1", "2", "3"]
        assert opened.page.locator(".listing tbody tr:visible").count() == 5
        assert opened.page.locator(".controls:visible").count() == 0


def test_without_its_script_a_page_a_page_shows_the_same_pictures(browser: Browser, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["region-store"], java_script_enabled=False) as opened:
        assert shown(opened.page, "core") > 0
        assert not opened.page.locator(".controls").is_visible()


def test_on_paper_controls_are_gone(browser: Browser, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["chain"]) as opened:
        assert opened.page.locator("nav").is_visible()
        opened.page.emulate_media(media="print")
        assert not opened.page.locator("nav").is_visible()
        assert not opened.page.locator(".controls").is_visible()


def test_the_record_of_complaints_would_show_each_kind(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://192.0.2.1/a.png"><script>console.warn("w"); absent()</script>')
    with Opened(browser, bad) as opened:
        opened.page.wait_for_load_state("networkidle")
        told = " ".join(opened.complaints)
    for part in ("request: http://192.0.2.1/a.png", "warning: w", "error: absent is not defined"):
        assert part in told
