"""Geometry of the page's charts; the template draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.decisions import format_quantity
from fxopt.report._data import LayerLine

__all__ = ["Bar", "BarChart", "Curve", "bar_chart", "curve"]

_MOST_BARS = 24
_ROW_HEIGHT = 30.0
_LABEL_WIDTH = 220.0
_BAR_WIDTH = 400.0
_VALUE_WIDTH = 100.0
_LABEL_CHARACTERS = 30
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720.0, 240.0, 76.0, 36.0, 12.0, 12.0


@dataclass(frozen=True)
class Bar:
    """A layer's two bars.

    Attributes:
        label: The layer, shortened from the left if it is long.
        site: The layer in full.
        y: Top of the pair.
        before_width: Length of the bar of the original.
        after_width: Length of the bar of the result.
        before: The original's latency in words.
        after: That of the result.
    """

    label: str
    site: str
    y: float
    before_width: float
    after_width: float
    before: str
    after: str


@dataclass(frozen=True)
class BarChart:
    """Latency of layers before and after.

    Attributes:
        bars: The layers shown, in graph order.
        left_out: How many layers are not shown, those with the least latency.
        left: Where bars begin.
        width: Width of the drawing.
        height: Height of the drawing.
    """

    bars: tuple[Bar, ...]
    left_out: int
    left: float
    width: float
    height: float


@dataclass(frozen=True)
class Curve:
    """Best score after each trial, as steps.

    Attributes:
        points: The line, as the attribute of an SVG polyline.
        ticks: Horizontal lines: (y, score in words).
        trials: How many trials there were.
        first: The first best score, in words.
        last: The last.
        left: Left end of the plot.
        right: Right end.
        bottom: Lower end.
        width: Width of the drawing.
        height: Height of the drawing.
    """

    points: str
    ticks: tuple[tuple[float, str], ...]
    trials: int
    first: str
    last: str
    left: float
    right: float
    bottom: float
    width: float
    height: float


def bar_chart(layers: Sequence[LayerLine]) -> BarChart | None:
    """Bars for the layers with the most latency; None if there is nothing to show."""
    longest = max((max(layer.latency_before_s, layer.latency_after_s) for layer in layers), default=0.0)
    if not (math.isfinite(longest) and longest > 0.0):
        return None
    ranked = sorted(range(len(layers)), key=lambda index: -layers[index].latency_before_s)
    shown = [layers[index] for index in sorted(ranked[:_MOST_BARS])]
    scale = _BAR_WIDTH / longest
    bars = tuple(
        Bar(
            label=_shortened(layer.site),
            site=layer.site,
            y=index * _ROW_HEIGHT,
            before_width=round(layer.latency_before_s * scale, 2),
            after_width=round(layer.latency_after_s * scale, 2),
            before=format_quantity("latency", layer.latency_before_s),
            after=format_quantity("latency", layer.latency_after_s),
        )
        for index, layer in enumerate(shown)
    )
    width = _LABEL_WIDTH + _BAR_WIDTH + _VALUE_WIDTH
    return BarChart(bars, len(layers) - len(shown), _LABEL_WIDTH, width, len(bars) * _ROW_HEIGHT)


def curve(scores: Sequence[float | None]) -> Curve | None:
    """The curve of best scores; None if there are fewer than two trials or no score."""
    known = [score for score in scores if score is not None and math.isfinite(score)]
    if len(scores) < 2 or not known:
        return None
    low, high = min(known), max(known)
    span = (high - low) or max(abs(high), 1.0) * 0.1
    low, high = high - span, high
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    points: list[tuple[float, float]] = []
    for index, score in enumerate(scores):
        if score is None or not math.isfinite(score):
            continue
        x = _LEFT + plot_width * index / (len(scores) - 1)
        y = _TOP + plot_height * (high - score) / span
        if points and points[-1][1] != y:
            points.append((x, points[-1][1]))
        points.append((x, y))
    ticks = tuple((_TOP + plot_height * part / 4, f"{high - span * part / 4:.4g}") for part in range(5))
    return Curve(
        points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        ticks=ticks,
        trials=len(scores),
        first=f"{known[0]:.4g}",
        last=f"{known[-1]:.4g}",
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        bottom=_HEIGHT - _BOTTOM,
        width=_WIDTH,
        height=_HEIGHT,
    )


def _shortened(site: str) -> str:
    return site if len(site) <= _LABEL_CHARACTERS else "…" + site[-_LABEL_CHARACTERS + 1 :]
