"""The page: what a browser makes of it, without a browser."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.report import CandidateLine, EpochLine, OperatorLine, PassLine, Report, SlowLine, SupernetLine
from fxopt.report._figures import network_charts
from fxopt.report._search_figures import front, search_charts, step_chart
from fxopt.report._theme import DARK, LIGHT
from tests.report.reading import Page
from tests.report.samples import layer, page_of_whole, report, whole

NASTY = '<script>alert("x")</script>&\'[bold]$a_1$\x00'


def charts(made: Report) -> dict[str, Any]:
    step = step_chart(made)
    return {one.name: one for one in (*network_charts(made), *search_charts(made), *([step] if step else []))}


@functools.cache
def charts_of_whole() -> dict[str, Any]:
    return charts(whole())


def words(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("title")]


def test_the_page_is_balanced_small_and_fetches_nothing() -> None:
    text = page_of_whole()
    page = Page(text)
    assert page.open == []
    assert page.count("link") == page.count("img") == page.count("iframe") == 0
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in page.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert page.count("svg") == 10
    assert len(text.encode()) < 300_000


def test_the_first_screen_has_what_was_asked_and_achieved() -> None:
    made = whole()
    first = Page(page_of_whole().partition("<h2")[0])
    told = [made.verdict, "97.50%", "before: 98.00%", "12.3 KB", "calibrated", "Mean error 2.1%", "measured"]
    told += ["latency &lt;= 0.6 of the original".replace("&lt;", "<"), "2.4 ms allowed", "met", "ONNX file"]
    told += ["fine-tune", "+6.00 points", "-16.7%"]
    for wanted in told:
        assert first.seen(wanted), wanted


def test_the_page_is_accessible() -> None:
    page = Page(page_of_whole())
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")
    assert page.count("caption") == page.count("table") > 5
    assert all(attrs.get("role") == "img" and "aria-labelledby" in attrs for tag, attrs in page.tags if tag == "svg")
    identifiers = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    named = {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs}
    linked = {(attrs.get("href") or "")[1:] for _, attrs in page.tags if "href" in attrs}
    assert named | linked <= set(identifiers)
    assert page.count("main") == page.count("header") == page.count("nav") == page.count("h1") == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if attrs.get("role") == "region")


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out_in_both_themes(theme: dict[str, str]) -> None:
    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(theme[one]), luminance(theme[other])))
        return (high + 0.05) / (low + 0.05)

    assert theme.keys() == LIGHT.keys()
    assert len(set(theme.values())) == len(theme)
    for name in ("text", "faint", "good", "bad"):
        assert min(contrast(name, "page"), contrast(name, "panel")) >= 4.5, name
    assert contrast("text", "note") >= 4.5
    for name in ("after", "second", "third", "fourth", "fifth"):
        assert contrast(name, "panel") >= 3.0, name


def test_every_text_of_the_user_is_escaped() -> None:
    target = dataclasses.replace(report().target, title=NASTY, error=NASTY, caveats=(NASTY,))
    made = report(
        title=NASTY,
        engine=NASTY,
        passes=(PassLine(NASTY, NASTY, 0.5, None),),
        operators=(OperatorLine(NASTY, NASTY, NASTY, (NASTY,)),),
        slow=(SlowLine(NASTY, NASTY, 1.0, 1.0, "compute", NASTY, NASTY, NASTY),),
        target=target,
        layers=(layer(NASTY, frozen_by=NASTY),),
        frozen=((NASTY, NASTY),),
        barriers=(NASTY,),
        notes=(NASTY,),
        export={NASTY: NASTY},
        versions={NASTY: NASTY},
    )
    page = Page(made.to_html())
    assert page.open == []
    assert page.count("script") == 1
    assert page.seen(NASTY[:20])


def test_a_large_model_still_gives_a_small_page() -> None:
    site = "encoder.layers.{}.attention.self.query.projection.with.a.long.name"
    count = 1500
    made = report(
        layers=tuple(layer(site.format(index), weight_bits=4) for index in range(count)),
        frozen=tuple((site.format(index), "reaches an operator that is not known") for index in range(count)),
        barriers=tuple(map(site.format, range(count))),
        curve=tuple(index / 2000 for index in range(2000)),
        candidates=tuple(CandidateLine(one, one / count, one * 1e-6 + 1e-3, 1e4, 1e6, None) for one in range(count)),
    )
    text = made.to_html()
    assert len(text.encode()) < 1_200_000
    assert "1000 more layers are in the JSON report" in text


@pytest.mark.parametrize("curve", [(), (None,), (0.5,), (None, None)])
def test_nothing_to_draw_draws_nothing(curve: tuple[float | None, ...]) -> None:
    idle = layer(channels_after=16, weight_bits=32, activation_bits=32, latency_before_s=0.0, latency_after_s=0.0)
    assert charts(report(curve=curve, layers=(idle,), passes=())) == {}


def test_marks_say_what_they_are() -> None:
    drawn = charts_of_whole()
    assert "blocks.5.conv: 11 of 16 channels kept" in words(drawn["channels"].svg)
    assert "blocks.1.conv: weights 4, inputs 8" in words(drawn["bits"].svg)
    assert "blocks.0: mb3-k5 chosen, mb6-k3 in the original" in words(drawn["operators"].svg)
    assert "memory: 800 us, 40%" in words(drawn["times"].svg)
    assert "blocks.0.conv: 1 ms, then 500 us" in words(drawn["latencies"].svg)
    assert "quantize: 97.50%" in words(drawn["steps"].svg)
    assert "trial 10: 86.00%, 100 us" in words(drawn["front"].svg)
    assert any(text.startswith("random, seed 1: 61.00% after 1") for text in words(drawn["search"].svg))
    assert any(text.startswith("uniform: 70.00%") for text in words(drawn["search"].svg))


def test_the_search_for_operators_is_drawn_and_listed() -> None:
    made = whole()
    drawn = charts_of_whole()["supernet"]
    assert "epoch 3: entropy 30.0%" in words(drawn.svg)
    assert "epoch 1: expected latency 150.0%" in words(drawn.svg)
    told = "In 3 epochs entropy from 100.0% to 30.0%, expected latency from 150.0% to 90.0%"
    assert any(text.startswith(told) for text in words(drawn.svg))
    listed = Page(made.to_html())
    assert listed.column("Epochs of the supernet", 2) == ["n/a", "1.4", "1.1"]
    assert listed.column("Epochs of the supernet", 4) == ["4.5 ms, 150%", "3.6 ms, 120%", "2.7 ms, 90%"]
    assert Report.from_json(made.to_json()) == made


def test_a_search_for_operators_without_a_limit_shows_entropy_alone() -> None:
    epochs = (EpochLine(2.0, None, 1.0, {}), EpochLine(1.0, 1.0, 0.5, {}))
    made = report(supernet=SupernetLine({}, epochs))
    shown = words(charts(made)["supernet"].svg)
    assert [text for text in shown if text.startswith("epoch")] == ["epoch 1: entropy 100.0%", "epoch 2: entropy 50.0%"]
    assert [cell for cell, _ in Page(made.to_html()).tables["Epochs of the supernet"][0]][-1] == "Entropy"


def test_other_engines_that_were_not_run_are_named() -> None:
    assert "compare-engines" not in charts_of_whole()["search"].caption
    alone, *_ = search_charts(dataclasses.replace(whole(), curves=(), candidates=()))
    assert "Random and uniform were not run: `fxopt compare-engines`" in alone.caption


def test_a_layer_that_is_gone_is_listed_and_not_drawn() -> None:
    made = report(layers=(layer("gone.one", channels_after=0), layer("kept")), passes=(), curve=())
    drawn = charts(made)
    assert not [text for name in ("channels", "bits") for text in words(drawn[name].svg) if "gone.one" in text]
    assert "<td>gone</td>" in made.to_html()


def extents(svg: str, axis: int) -> dict[str, list[float]]:
    """How far each marked path reaches along an axis, by its words."""
    found: dict[str, list[float]] = {}
    for node in ElementTree.fromstring(svg).iter("path"):
        if node.get("class") == "mark":
            places = [float(pair.split()[axis]) for pair in re.findall(r"[ML] ([\d.]+ [\d.]+)", node.get("d") or "")]
            found.setdefault(node.findtext("title") or "", []).append(max(places) - min(places))
    return found


def test_bars_are_as_long_as_what_they_show() -> None:
    slow, fast = layer("slow", latency_before_s=4e-3, latency_after_s=1e-3), layer("fast", latency_before_s=2e-3)
    drawn = charts(report(layers=(slow, fast), passes=(), curve=()))
    before, after = extents(drawn["latencies"].svg, 0)["slow: 4 ms, then 1 ms"]
    assert before == pytest.approx(4 * after, rel=1e-4)
    assert before == pytest.approx(2 * extents(drawn["latencies"].svg, 0)["fast: 2 ms, then 400 us"][0], rel=1e-4)
    was, now = extents(drawn["channels"].svg, 1)["slow: 8 of 16 channels kept"]
    assert was == pytest.approx(2 * now, rel=1e-4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1e-6, 1)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(pairs: list[tuple[float, float]]) -> None:
    tried = [CandidateLine(index, score, cost, 1.0, 1.0, None) for index, (score, cost) in enumerate(pairs)]
    best = front(tried, "latency")
    for one in tried:
        beaten = any(
            other.score >= one.score
            and other.latency_s <= one.latency_s
            and (other.score > one.score or other.latency_s < one.latency_s)
            for other in tried
        )
        assert any((one.score, one.latency_s) == (kept.score, kept.latency_s) for kept in best) is not beaten
    assert front(tried, "energy") == []
