"""Rooflines: points by hand, pictures, and the drawing in the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fxopt.errors import FxoptError
from fxopt.report import Report, roofline, save_rooflines
from fxopt.report._figures import network_charts
from fxopt.report._plot import draw_roofline
from fxopt.report._roofline import MOST_PEAKS
from fxopt.report._svg import Marks, drawing
from fxopt.targets import OpKind, Workload, load, make_row
from tests.report.samples import page_of_whole, report, workload
from tests.report.samples import roofs_of as sample
from tests.targets.oracle import conv


def test_points_are_what_the_target_estimates() -> None:
    found = sample()
    assert [(point.site, point.bits, point.when) for point in found.points] == [
        ("stem<0>", "8/8", "before"),
        ("head", "8/8", "before"),
        ("stem<0>", "4/4", "after"),
        ("head", "4/4", "after"),
    ]
    costs = load("vu9p").estimate(workload()).rows
    first = found.points[0]
    assert first.macs == 16 * 32 * 14 * 14 * 9
    assert first.intensity == pytest.approx(first.macs / costs.dram_bytes[0, 0])
    assert first.macs_per_s == pytest.approx(first.macs / costs.latency_s[0, 0])
    assert [peak.label for peak in found.peaks] == ["4/4 bits", "8/8 bits"]


@pytest.mark.parametrize("name", ["vu9p", "pixel1", "stm32f746", "galaxy-s24", "v100"])
def test_every_point_is_in_the_picture_and_roofs_end_at_its_edges(name: str) -> None:
    found = sample(name)
    marks = Marks()
    with drawing() as (figure, _):
        axes = figure.add_subplot()
        draw_roofline(axes, found, found.points, marks)
    assert sum(map(len, marks.words.values())) == len(found.points) == 4
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for point in found.points:
        assert left <= point.intensity <= right
        assert low <= point.macs_per_s <= high
    for line in axes.get_lines():
        assert left <= min(line.get_xdata()) < max(line.get_xdata()) <= right
    assert len(axes.get_lines()) == len(found.shown_peaks) + (name in ("vu9p", "v100"))


def test_a_picture_has_room_for_some_peaks() -> None:
    pairs = [(w, a) for w in range(1, 9) for a in range(1, 9)]
    rows = np.concatenate([conv(16, 32, 14, weight_bits=w, activation_bits=a) for w, a in pairs])
    found = roofline(load("vu9p"), Workload(rows, [str(index) for index in range(len(rows))]))
    shown = found.shown_peaks
    assert len(found.peaks) > len(shown) == MOST_PEAKS
    assert shown[0] == found.peaks[0]
    assert shown[-1] == found.peaks[-1]


def test_nothing_is_drawn_of_nothing() -> None:
    empty = roofline(load("vu9p"), Workload(make_row(OpKind.POOL, c=3, k=3), ["pool"]))
    assert not empty.points
    assert "roofline" not in [chart.name for chart in network_charts(report(roofline=empty))]


def test_the_page_tells_of_every_layer() -> None:
    text = page_of_whole()
    picture = re.search(r'<svg[^>]*aria-labelledby="roofline-title".*?</svg>', text, re.DOTALL)
    assert picture is not None
    tree = ElementTree.fromstring(picture.group())
    titles = [node.text or "" for node in tree.iter("title")]
    assert any("stem<0> before: 8/8 bits" in title for title in titles)
    assert any("head after: 4/4 bits" in title for title in titles)
    assert "memory: 17.3 GB/s" in "".join(tree.itertext())
    styles = " ".join(node.get("style", "") for node in tree.iter())
    assert "var(--after)" in styles
    assert not re.findall("#[0-9a-f]{6}", styles)  # colours by theme


def test_reports_keep_it_and_older_ones_have_none() -> None:
    made = report(roofline=sample())
    assert Report.from_json(made.to_json()) == made
    data = json.loads(report().to_json())
    later = ("roofline", "operators", "times", "slow", "curves", "candidates", "supernet")
    older = json.dumps({key: value for key, value in data.items() if key not in later})
    assert Report.from_json(older) == report()


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    one = sample().save(tmp_path / "one.svg")
    two = save_rooflines([sample()], tmp_path / "new" / "two.svg")
    assert one.read_bytes() == two.read_bytes()
    words = "".join(ElementTree.parse(one).getroot().itertext())
    assert "vu9p (calibrated)" in words
    assert "4/4 bits" in words
    assert sample("pixel1").save(tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FxoptError, match=r"\.svg or \.png"):
        sample().save(tmp_path / "one.pdf")
    assert not list(tmp_path.iterdir())
