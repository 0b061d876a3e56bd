"""Markup, style and script of the page fit each other, and nothing that it is made of can become markup."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fxopt.decisions import METRICS
from fxopt.report import Report, _html
from fxopt.report._theme import DARK, LIGHT, PARTS, SERIES
from tests.report.reading import Page
from tests.report.samples import page_of_whole, report, whole

FOLDER = Path(_html.__file__).parent
STYLE, SCRIPT = ((FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
STORY = Path(__file__).with_name("story.json")
LARGEST = 2_000_000
"""Bytes of a page."""

HOSTILE = (
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\"><a href='javascript:alert(1)'>",
    "' onmouseover='alert(1)' x='",
    "]]><svg onload=alert(1)>",
    "<!-- <![CDATA[ --!>",
    "{{ 7 * 7 }} {% raw %} {# x #}",
    "&lt;b&gt; &amp;#60; &quot",
    "über/\u202eكلم/層\U0001f600\u0000\u001b[31m",
    "$\\frac{1}{0}$ _x #1 %s",
)
CHOSEN = ("metric", "part", "when")
"""Fields with one of a few words."""
DRAWN = {"svg", "title", "g", "path", "use", "defs", "text", "tspan", "clippath", "rect"}
"""Elements of a drawing."""


@functools.cache
def story() -> tuple[Report, str, Page]:
    """The report of a real optimization, its page, and what that holds."""
    made = Report.from_json(STORY.read_text("utf-8"))
    text = made.to_html()
    return made, text, Page(text)


def with_every_text(value: Any, change: Callable[[], str], kind: Any = None) -> Any:
    """The same value with each text in it changed that may be any text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        names = [name for name in hints if name not in CHOSEN]
        made = {name: with_every_text(getattr(value, name), change, hints[name]) for name in names}
        return dataclasses.replace(value, **made)
    if isinstance(value, dict):
        return {key: with_every_text(one, change) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(with_every_text(one, change) for one in value)
    return change() if isinstance(value, str) and value and typing.get_origin(kind) is not typing.Literal else value


def outside_of_drawings(page: Page) -> list[tuple[str, tuple[str, ...]]]:
    """The elements that are no drawing, with the names of their attributes."""
    return [(tag, tuple(attrs)) for tag, attrs in page.tags if tag not in DRAWN]


def test_no_text_of_a_report_becomes_markup() -> None:
    texts = itertools.cycle(HOSTILE)
    hostile = Page(with_every_text(whole(), lambda: next(texts)).to_html())
    harmless = Page(page_of_whole())
    assert hostile.open == []
    assert outside_of_drawings(hostile) == outside_of_drawings(harmless)
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in harmless.tags}
    names = {name for _, attrs in hostile.tags for name in attrs}
    assert names == {name for _, attrs in harmless.tags for name in attrs}
    assert [name for name in names if name.startswith("on")] == []
    for text in HOSTILE:
        assert hostile.seen(text), text


def test_the_page_of_a_real_result_is_small_and_needs_nothing_else() -> None:
    _, text, page = story()
    assert len(text.encode()) < LARGEST
    assert not re.search(r"https?:|//\w|@import|@font-face|url\((?!#)", text.partition("<script>")[0])
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object", "embed", "video", "base"})
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.split("; ")[0] == "default-src 'none'"
    assert not re.search(
        r"fetch|XMLHttpRequest|import\b|eval|innerHTML|insertAdjacent|document\.write|localStorage", SCRIPT
    )


def amount(words: str, metric: str) -> float:
    """A quantity in words as a number in SI units."""
    figure, _, unit = words.partition(" ")
    return float(figure) * (METRICS[metric][unit] if unit else 1.0)


def test_the_figures_of_the_page_are_those_of_the_result() -> None:
    made, text, page = story()
    picks = {
        "MACs": ("macs", made.before.macs, made.after.macs),
        "Parameters": ("macs", made.before.parameters, made.after.parameters),
        "Size of weights": ("size", made.before.size_bytes, made.after.size_bytes),
        "Latency": ("latency", made.before.latency_s, made.after.latency_s),
        "Energy": ("energy", made.before.energy_j, made.after.energy_j),
        "Peak activations": ("memory", made.before.memory_bytes, made.after.memory_bytes),
    }
    rows = {row[0][0]: [cell for cell, _ in row[1:]] for row in page.tables["Metrics"][1:]}
    assert picks.keys() <= rows.keys()
    for label, (metric, was, now) in picks.items():
        assert was is not None
        assert now is not None
        _, before, after, change = rows[label]
        assert (amount(before, metric), amount(after, metric)) == pytest.approx((was, now), rel=1e-3)
        assert float(change.rstrip("%")) == pytest.approx(100 * (now / was - 1), abs=0.06)
    score = [made.before.accuracy, made.after.accuracy]
    assert [float(cell.rstrip("%")) / 100 for cell in rows["Accuracy"][1:3]] == pytest.approx(score, abs=6e-5)
    (budget,) = made.budgets
    told = re.search(r"latency: <strong[^>]*>([^<]*)</strong> of ([^,]*) allowed, ([^;]*) before", text)
    assert told is not None
    figures = [amount(words, "latency") for words in told.groups()]
    assert figures == pytest.approx([budget.achieved, budget.limit, budget.before], rel=1e-3)


def test_the_table_of_layers_has_the_figures_of_every_layer() -> None:
    made, _, page = story()
    rows = page.tables["Layers"][1:]
    assert len(rows) == len(made.layers) > 10
    for line, row in zip(made.layers, rows, strict=True):
        assert row[0][0].split()[0] == line.site
        assert [int(row[column][0]) for column in (3, 4)] == [line.channels_before, line.channels_after]
        if not line.gone:
            assert [int(row[column][0]) for column in (5, 6)] == [line.weight_bits, line.activation_bits]
        figures = (line.macs_before, line.macs_after, line.latency_before_s, line.latency_after_s)
        for (words, attrs), metric, figure in zip(row[7:11], ("macs",) * 2 + ("latency",) * 2, figures, strict=True):
            assert amount(words, metric) == pytest.approx(figure, rel=1e-3)
            assert float(attrs["data-value"] or "") == pytest.approx(figure, rel=1e-5)


def test_every_column_and_row_has_a_head_and_rows_are_even() -> None:
    _, _, page = story()
    for name, (head, *rows) in page.tables.items():
        assert all(attrs.get("scope") == "col" for _, attrs in head), name
        assert all(words for words, _ in head), name
        assert rows, name
        assert {len(row) for row in rows} == {len(head)}, name
        assert all(row[0][1].get("scope") == "row" for row in rows), name


def test_every_drawing_is_told_in_words() -> None:
    for text in (story()[1], page_of_whole()):
        drawings = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
        assert len(drawings) > 5
        for drawing in drawings:
            title = drawing[0]
            assert title.tag == "title"
            assert title.get("id") == drawing.get("aria-labelledby")
            assert len(title.text or "") > 20
            marks = [one for one in drawing.iter() if one.get("class") == "mark"]
            assert marks
            assert all(one.findtext("title") for one in marks)
        figures = re.findall(r'<h3 id="(c-[\w-]+)">[^<]{5,}</h3>\s*<figure aria-labelledby="([\w-]+)"', text)
        assert [heading for heading, _ in figures] == [label for _, label in figures]
        assert len(figures) == len(drawings)


def rules(block: str = STYLE) -> list[str]:
    """The selectors of a style sheet."""
    flat = re.sub(r"@media[^{]*\{((?:[^{}]*\{[^{}]*\})*)\s*\}", r"\1", block)
    return [one.strip() for found in re.findall(r"([^{}]+)\{", flat) for one in found.split(",")]


@functools.cache
def everything() -> Page:
    """A page with all that there can be on one: that of a report that met its budget and that of one that did not."""
    missed = report(budgets=(dataclasses.replace(report().budgets[0], achieved=1.0),))
    return Page(page_of_whole() + missed.to_html())


def values(*names: str) -> set[str]:
    """What the page has in attributes, word by word."""
    return {word for _, attrs in everything().tags for name in names for word in (attrs.get(name) or "").split()}


def test_style_and_script_speak_of_every_class_of_the_page_and_no_other() -> None:
    styled = {name for rule in rules() for name in re.findall(r"\.([a-z][\w-]*)", rule)}
    assert len(styled) > 10
    assert styled - values("class") == set(re.findall(r'classList\.add\("([\w-]+)"\)', SCRIPT)) == {"at"}
    assert values("class") - styled <= set(re.findall(r'querySelectorAll\("\w+\.([\w-]+)"\)', SCRIPT))


def test_style_and_script_speak_of_ids_and_elements_that_are_there() -> None:
    wanted = {name for rule in rules() for name in re.findall(r"#([a-z][\w-]*)", rule)}
    wanted |= set(re.findall(r'(?:getElementById\(|"aria-describedby", )"([\w-]+)"', SCRIPT))
    assert wanted <= values("id")
    references = {re.sub(r"^url\(|\)$|#", "", word) for word in values("href", "clip-path")}
    assert values("id") - wanted == (references | values("aria-labelledby", "data-table")) - wanted
    bare = [re.sub(r"\[.*?\]|[.#:][\w:-]+|\*", "", rule) for rule in rules()]
    elements = {name for rule in bare for name in re.findall(r"\w+", rule)}
    made = set(re.findall(r'createElement\("(\w+)"\)', SCRIPT))
    assert elements <= {tag for tag, _ in everything().tags} | made


def test_the_script_reads_the_fields_and_data_that_are_there() -> None:
    fields = {attrs["name"] for tag, attrs in everything().tags if tag in ("input", "select")}
    assert set(re.findall(r"form\.elements\.(\w+)", SCRIPT)) == fields
    data = {name for _, attrs in everything().tags for name in attrs if name.startswith("data-")}
    own = set(re.findall(r"dataset\.(\w+) = ", SCRIPT))
    assert {f"data-{name}" for name in set(re.findall(r"dataset\.(\w+)", SCRIPT)) - own} == data


def test_both_schemes_and_paper_are_provided_for() -> None:
    text = page_of_whole()
    dark = re.search(r"@media screen and \(prefers-color-scheme: dark\) \{\s*:root \{([^}]*)\}", text)
    light = re.search(r"<style>\s*:root \{([^}]*)\}", text)
    assert dark is not None
    assert light is not None
    for found, theme in ((light, LIGHT), (dark, DARK)):
        assert dict(re.findall(r"--(\w+): (#\w{6});", found.group(1))) == theme
    used = set(re.findall(r"var\(--(\w+)\)", text))
    assert used <= LIGHT.keys()
    assert {LIGHT[name] for name in LIGHT.keys() - used} <= {*PARTS.values(), *SERIES}
    assert re.findall(r"#[0-9a-f]{6}\b", text.partition("</style>")[2]) == []
    assert 'name="color-scheme" content="light dark"' in text
    paper = STYLE.partition("@media print {")[2]
    hidden = next(found for found in re.findall(r"([^{}]+)\{ display: none; \}", paper))
    assert {one.strip() for one in hidden.split(",")} == {"nav", ".skip", ".filters", "#tip"}
    assert "break-inside: avoid" in paper
    assert 'addEventListener("beforeprint"' in SCRIPT


def test_sorting_is_told_to_screen_readers() -> None:
    told = set(re.findall(r'aria-sort", (?:descending \? )?"(\w+)"(?: : "(\w+)")?', SCRIPT))
    words = {value for pair in told for value in pair if value}
    assert words == {"none", "ascending", "descending"}
    shown = {found for rule in rules() for found in re.findall(r"\[aria-sort=(\w+)\]", rule)}
    assert shown == words - {"none"}
