"""Rooflines: points by hand, pictures, and the drawing in the page."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from fxopt.errors import FxoptError
from fxopt.report import Report, Roofline, roofline, save_rooflines
from fxopt.report._roofline import MOST_PEAKS
from fxopt.report._roofline_chart import roofline_chart
from fxopt.targets import OpKind, Target, Workload, load, make_row
from tests.report.samples import report
from tests.targets.oracle import conv


def workload(bits: int = 8) -> Workload:
    widths = {"weight_bits": bits, "activation_bits": bits, "output_bits": bits}
    rows = [conv(16, 32, 14, 3, **widths), make_row(OpKind.POOL, c=32, k=32, in_h=14, out_h=1, kernel_h=14)]
    rows.append(make_row(OpKind.LINEAR, c=32, k=10, **widths))
    return Workload(np.concatenate(rows), ["stem<0>", "pool", "head"])


def sample(target: str | Target = "vu9p") -> Roofline:
    return roofline(load(target), workload(), workload(4))


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
    chart = roofline_chart(sample(name))
    assert chart is not None
    assert len(chart.marks) == 4
    for mark in chart.marks:
        assert chart.left <= mark.x <= chart.right
        assert chart.top <= mark.y <= chart.bottom
    for line in (*chart.peaks, *((chart.slope,) if chart.slope else ())):
        assert chart.left <= line.x1 <= line.x2 <= chart.right
        assert chart.top <= line.y2 <= line.y1 <= chart.bottom
        assert line.x2 - line.x1 > 1.0
    assert (chart.slope is not None) == (name in ("vu9p", "v100"))


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
    assert roofline_chart(empty) is None
    assert "h-roofline" not in report(roofline=empty).to_html()


def test_the_page_tells_of_every_layer() -> None:
    text = report(roofline=sample()).to_html()
    drawing = re.search(r'<svg[^>]*aria-labelledby="t-roofline".*?</svg>', text, re.DOTALL)
    assert drawing is not None
    tree = ElementTree.fromstring(drawing.group())
    titles = [node.text or "" for node in tree.iter("title")]
    assert any("stem<0> before: 8/8 bits" in title for title in titles)
    assert any("head after: 4/4 bits" in title for title in titles)
    assert "memory: 17.3 GB/s" in titles
    assert tree.find("desc") is not None
    assert not [node for node in tree.iter() if "fill" in node.attrib or "stroke" in node.attrib]  # colours by theme


def test_reports_keep_it_and_older_ones_have_none() -> None:
    made = report(roofline=sample())
    assert Report.from_json(made.to_json()) == made
    older = report().to_json().replace(',\n "roofline": null', "")
    assert "roofline" not in older
    assert Report.from_json(older) == report()


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    one = sample().save(tmp_path / "one.svg")
    two = save_rooflines([sample()], tmp_path / "new" / "two.svg")
    assert one.read_bytes() == two.read_bytes()
    words = "".join(ElementTree.parse(one).getroot().itertext())
    assert "vu9p (calibrated)" in words
    assert "4/4 bits" in words
    assert sample("pixel1").save(tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FxoptError, match=r"\.svg or \.png"):
        sample().save(tmp_path / "one.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FxoptError, match=r"fxopt\[plot\]"):
        sample().save(tmp_path / "one.svg")
    assert not list(tmp_path.iterdir())
