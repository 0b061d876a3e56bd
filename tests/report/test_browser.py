"""The page in a real browser: headless Chromium, driven by playwright, without a network.

With ``FXOPT_SCREENSHOTS=docs/images`` the pictures in the documentation are made anew.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fxopt.report import Report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STORY = Path(__file__).with_name("story.json")
"""The report of an optimization of operators, channels and bits: scikit-learn's digits on bitfusion."""
ENGINES = Path(__file__).with_name("engines.json")
"""The report of ``examples/digits.toml``, behind ``fxopt compare-engines`` in the same folder."""
LARGEST = 150_000
"""Bytes of a picture."""
TALLEST = 900
"""Pixels of a picture."""
COLOURS = 48
SCHEMES = ("light", "dark")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER)
        yield started
        started.close()


def page(data: Path, folder: Path) -> Path:
    return Report.from_json(data.read_text(encoding="utf-8")).save(folder / "report.html")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page(STORY, tmp_path_factory.mktemp("pages"))


class Visit:
    """A page opened without a network; what it complains of and asks for is kept."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light", width: int = 1100) -> None:
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def column(self, number: int) -> list[str]:
        """The cells of a column of the table of layers, rows that are filtered away left out."""
        cells = self.page.locator(f"#layers tbody tr:visible > :nth-child({number})")
        return [str(text) for text in cells.all_inner_texts()]


@pytest.fixture
def visit(browser: Any, file: Path) -> Iterator[Visit]:
    """A visit that has to end without a complaint or a request."""
    made = Visit(browser, file)
    yield made
    made.context.close()
    assert made.complaints == []
    assert made.requests == [file.as_uri()]


def test_layers_are_sorted_by_mouse_and_by_keyboard(visit: Visit) -> None:
    before = visit.column(1)
    head = visit.page.get_by_role("columnheader", name="Latency after")
    assert head.get_attribute("aria-sort") == "none"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    values = visit.page.locator("#layers tbody td:nth-child(11)")
    seconds = [float(cell.get_attribute("data-value")) for cell in values.all()]
    assert seconds == sorted(seconds)
    assert sorted(visit.column(1)) == sorted(before)
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    seconds = [float(cell.get_attribute("data-value")) for cell in values.all()]
    assert seconds == sorted(seconds, reverse=True)
    name = visit.page.get_by_role("columnheader", name="Layer", exact=True)
    name.get_by_role("button").click()
    assert visit.page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1


def test_layers_are_filtered_by_name_and_by_what_bounds_them(visit: Visit) -> None:
    everything = visit.column(1)
    field = visit.page.get_by_role("searchbox", name="Filter")
    field.fill("BLOCKS.1")
    shown = visit.column(1)
    assert 0 < len(shown) < len(everything)
    assert all("blocks.1" in name for name in shown)
    assert visit.page.locator("form.filters output").inner_text() == f"{len(shown)} of {len(everything)} layers"
    field.fill("")
    choice = visit.page.get_by_role("combobox", name="Bound by")
    bound = visit.column(3)[0]
    choice.select_option(bound)
    assert set(visit.column(3)) == {bound}
    field.fill("no such layer")
    assert visit.column(1) == []


def test_marks_tell_what_they_are(visit: Visit) -> None:
    picture = visit.page.get_by_role("img", name=re.compile("^MACs in a second"))
    mark, tip = picture.locator(".mark").first, visit.page.locator("#tip")
    assert tip.inner_text() == ""
    mark.hover(force=True)
    assert re.search(r" (before|after): \d+/\d+ bits, .* MACs for each byte", tip.inner_text())
    visit.page.mouse.move(1, 1)
    assert tip.inner_text() == ""
    picture.focus()
    visit.page.keyboard.press("ArrowRight")
    first = tip.inner_text()
    visit.page.keyboard.press("ArrowRight")
    second = tip.inner_text()
    visit.page.keyboard.press("ArrowLeft")
    assert tip.inner_text() == first != second
    visit.page.keyboard.press("Escape")
    assert tip.inner_text() == ""


def test_the_keyboard_reaches_everything_and_is_seen(visit: Visit) -> None:
    visit.page.keyboard.press("Tab")
    skip = visit.page.get_by_role("link", name="To the report")
    assert skip.evaluate("one => one === document.activeElement && one.getBoundingClientRect().left >= 0")
    visit.page.keyboard.press("Enter")
    assert visit.page.evaluate("document.activeElement.id") == "main"
    reached = set()
    for _ in range(60):
        visit.page.keyboard.press("Tab")
        tag, outlined = visit.page.evaluate(
            "(() => { const one = document.activeElement; "
            "return [one.tagName.toLowerCase(), getComputedStyle(one).outlineStyle !== 'none']; })()"
        )
        assert outlined or tag == "body", tag
        reached.add(tag)
    assert {"svg", "button", "input", "select", "summary"} <= reached


def test_a_screen_reader_hears_landmarks_headings_and_pictures(visit: Visit) -> None:
    heard = visit.page.locator("body").aria_snapshot()
    for wanted in ("banner:", "main:", "navigation", "heading", "[level=1]", "[level=2]", "[level=3]", "table "):
        assert wanted in heard, wanted
    pictures = re.findall(r'img "([^"]+)"', heard)
    assert len(pictures) == visit.page.locator("figure svg").count()
    assert [name for name in pictures if len(name) < 20] == []


def test_narrow_screens_and_paper_are_wide_enough(browser: Any, file: Path) -> None:
    visit = Visit(browser, file, width=360)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    visit.page.emulate_media(media="print")
    assert visit.page.get_by_role("navigation").is_hidden()
    printed = visit.page.pdf(format="A4", print_background=False)
    assert printed.startswith(b"%PDF")
    assert len(printed) < 2_000_000
    visit.context.close()


def keep(visit: Visit, selector: str, path: Path) -> None:
    """A picture of the upper part of something, in few colours."""
    shot = Image.open(io.BytesIO(visit.page.locator(selector).screenshot()))
    shot.crop((0, 0, shot.width, min(shot.height, TALLEST))).quantize(COLOURS).save(path, optimize=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pictures_for_the_documentation(scheme: str, browser: Any, file: Path, tmp_path: Path) -> None:
    folder = Path(os.environ.get("FXOPT_SCREENSHOTS", tmp_path))
    visit = Visit(browser, file, scheme)
    dark = visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark is (scheme == "dark")
    parts = {"first-screen": "body", "slow": "section:has(#h-slow)"}
    for name, selector in parts.items():
        keep(visit, selector, folder / f"report-{name}-{scheme}.png")
    roofline = "figure[aria-labelledby=c-roofline]"
    visit.page.locator(roofline).scroll_into_view_if_needed()
    visit.page.locator(f"{roofline} .mark").last.hover(force=True)
    keep(visit, roofline, folder / f"report-roofline-{scheme}.png")
    searched = Visit(browser, page(ENGINES, tmp_path), scheme)
    keep(searched, "section:has(#h-search)", folder / f"report-search-{scheme}.png")
    searched.context.close()
    made = sorted(folder.glob(f"report-*-{scheme}.png"))
    assert len(made) == 4
    assert all(5_000 < path.stat().st_size < LARGEST for path in made), [path.stat().st_size for path in made]
    visit.context.close()
