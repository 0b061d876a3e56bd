"""Geometry of the page's roofline; the template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.decisions import format_quantity
from fxopt.report._roofline import Roofline, RooflinePoint

__all__ = ["Line", "Mark", "RooflineChart", "roofline_chart"]

_MOST_MARKS = 400
_BEYOND = 1.5  # how far a peak goes on beyond the slope
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720.0, 420.0, 76.0, 44.0, 16.0, 12.0


@dataclass(frozen=True)
class Mark:
    """An operator under the roofs.

    Attributes:
        x: Where it is.
        y: Where it is.
        when: "before" or "after", also its class.
        words: What it is, in words.
    """

    x: float
    y: float
    when: str
    words: str


@dataclass(frozen=True)
class Line:
    """A roof, from (x1, y1) to (x2, y2).

    Attributes:
        x1: Left end.
        y1: Left end.
        x2: Right end.
        y2: Right end.
        words: What it is.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    words: str


@dataclass(frozen=True)
class RooflineChart:
    """Operators under the roofs of a target, both axes logarithmic.

    Attributes:
        marks: The operators.
        left_out: How many are not shown, those with the least latency.
        peaks: Roofs of arithmetic.
        slope: The roof of memory, or None.
        x_ticks: Vertical lines: (x, MACs for each byte).
        y_ticks: Horizontal lines: (y, MACs in a second).
        left: Left end of the plot.
        right: Right end.
        top: Upper end.
        bottom: Lower end.
        width: Width of the drawing.
        height: Height of the drawing.
    """

    marks: tuple[Mark, ...]
    left_out: int
    peaks: tuple[Line, ...]
    slope: Line | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    left: float
    right: float
    top: float
    bottom: float
    width: float
    height: float


@dataclass(frozen=True)
class _Axis:
    """A logarithmic axis over whole powers of ten."""

    low: int
    high: int
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return cls(low, max(high, low + 1), start, end)

    def at(self, value: float) -> float:
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + (self.end - self.start) * part, 2)

    @property
    def ends(self) -> tuple[float, float]:
        return 10.0**self.low, 10.0**self.high

    def ticks(self) -> tuple[tuple[float, str], ...]:
        return tuple((self.at(10.0**power), _power(power)) for power in range(self.low, self.high + 1))


def roofline_chart(roofline: Roofline) -> RooflineChart | None:
    """The roofs and the operators with the most latency; None if there are no operators."""
    ranked = sorted(roofline.points, key=lambda point: -point.latency_s)[:_MOST_MARKS]
    if not ranked:
        return None
    peaks, bandwidth = roofline.shown_peaks, roofline.bandwidth_bytes_per_s
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    speeds = [point.macs_per_s for point in ranked] + [peak.macs_per_s for peak in peaks]
    corners = [_BEYOND * peak.macs_per_s / bandwidth for peak in peaks] if bandwidth else []
    x = _Axis.over([point.intensity for point in ranked] + corners, _LEFT, right)
    y = _Axis.over(speeds, bottom, _TOP)
    low, high = x.ends
    lines = []
    for peak in peaks:
        corner = peak.macs_per_s / bandwidth if bandwidth else low
        start, level = min(max(corner, low), high), y.at(peak.macs_per_s)
        lines.append(Line(x.at(start), level, right, level, f"{peak.label}: {_rate(peak.macs_per_s)}"))
    slope = None
    if bandwidth:
        begin = max(low, y.ends[0] / bandwidth)
        end = min(high, max((peak.macs_per_s for peak in peaks), default=y.ends[1]) / bandwidth)
        if begin < end:
            words = f"memory: {bandwidth / 1e9:.3g} GB/s"
            slope = Line(x.at(begin), y.at(begin * bandwidth), x.at(end), y.at(end * bandwidth), words)
    return RooflineChart(
        marks=tuple(_mark(point, x, y) for point in ranked),
        left_out=len(roofline.points) - len(ranked),
        peaks=tuple(lines),
        slope=slope,
        x_ticks=x.ticks(),
        y_ticks=y.ticks(),
        left=_LEFT,
        right=right,
        top=_TOP,
        bottom=bottom,
        width=_WIDTH,
        height=_HEIGHT,
    )


def _mark(point: RooflinePoint, x: _Axis, y: _Axis) -> Mark:
    words = (
        f"{point.site} {point.when}: {point.bits} bits, {point.intensity:.3g} MACs for each byte, "
        f"{_rate(point.macs_per_s)}, {format_quantity('latency', point.latency_s)}"
    )
    return Mark(x.at(point.intensity), y.at(point.macs_per_s), point.when, words)


def _rate(macs_per_s: float) -> str:
    return f"{macs_per_s / 1e12:.3g} TMAC/s" if macs_per_s >= 1e12 else f"{macs_per_s / 1e9:.3g} GMAC/s"


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power}"
