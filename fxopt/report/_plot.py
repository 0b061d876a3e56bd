"""Rooflines as pictures, drawn by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.ticker import EngFormatter

from fxopt._files import write_bytes
from fxopt.decisions import format_quantity
from fxopt.errors import FxoptError
from fxopt.report._roofline import Roofline, RooflinePoint
from fxopt.report._svg import Marks, drawing
from fxopt.report._theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_roofline", "save"]

_SUFFIXES = (".png", ".svg")
_NOTE_WIDTH = 90
_MARKERS = {"before": "o", "after": "D"}


def save(rooflines: Sequence[Roofline], place: Path) -> Path:
    """Draw rooflines beside each other into a file; see :func:`fxopt.report.save_rooflines`."""
    if place.suffix not in _SUFFIXES:
        raise FxoptError(f"A roofline is drawn as .svg or .png, not as {place.name!r}; change the suffix.")
    with drawing() as (figure, out):
        figure.set_size_inches(7.0 * len(rooflines), 5.0)
        for column, one in enumerate(rooflines, start=1):
            axes = figure.add_subplot(1, len(rooflines), column)
            draw_roofline(axes, one, one.points, Marks())
            axes.set_xlabel("MACs for each byte moved\n" + textwrap.fill(one.note, _NOTE_WIDTH))
            axes.set_title(f"{one.target} ({one.status})")
        if place.suffix == ".svg":
            # The same data give the same file.
            metadata = {"Date": None, "Title": "Roofline of " + ", ".join(one.target for one in rooflines)}
            figure.savefig(out, format="svg", metadata=metadata)
        else:
            figure.savefig(out, format="png", dpi=150)
    write_bytes(place, out.getvalue())
    return place


def draw_roofline(axes: Axes, roofline: Roofline, points: Sequence[RooflinePoint], marks: Marks) -> None:
    """Draw points under the roofs of a target, both axes logarithmic; ``marks`` is told what the points are."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_ylabel("MACs in a second")
    for when, marker in _MARKERS.items():
        chosen = [point for point in points if point.when == when]
        if not chosen:
            continue
        places = [point.intensity for point in chosen], [point.macs_per_s for point in chosen]
        drawn = axes.scatter(*places, s=26, c=LIGHT[when], marker=marker, linewidths=0, alpha=0.8, label=when, zorder=3)
        marks.add(drawn, [_words(point) for point in chosen])
    _draw_roofs(axes, roofline)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")


def _draw_roofs(axes: Axes, roofline: Roofline) -> None:
    low, high = axes.get_xlim()
    bandwidth = roofline.bandwidth_bytes_per_s
    if bandwidth:
        high = max([high, *(2.0 * peak.macs_per_s / bandwidth for peak in roofline.shown_peaks)])
    for peak in roofline.shown_peaks:
        start = min(max(low, peak.macs_per_s / bandwidth), high) if bandwidth else low
        axes.plot([start, high], [peak.macs_per_s] * 2, color=LIGHT["faint"], linewidth=1.0)
        label = f"{peak.label}: {_rate(peak.macs_per_s)}"
        axes.annotate(label, (high, peak.macs_per_s), ha="right", va="bottom")
    if bandwidth:
        top = max((peak.macs_per_s for peak in roofline.peaks), default=high * bandwidth)
        end = min(high, top / bandwidth)
        slope = [low, end], [low * bandwidth, end * bandwidth]
        label = f"memory: {bandwidth / 1e9:.3g} GB/s"
        axes.plot(*slope, color=LIGHT["faint"], linewidth=1.0, linestyle="--", label=label)
    axes.set_xlim(low, high)


def _words(point: RooflinePoint) -> str:
    return (
        f"{point.site} {point.when}: {point.bits} bits, {point.intensity:.3g} MACs for each byte, "
        f"{_rate(point.macs_per_s)}, {format_quantity('latency', point.latency_s)}"
    )


def _rate(macs_per_s: float) -> str:
    return f"{macs_per_s / 1e12:.3g} TMAC/s" if macs_per_s >= 1e12 else f"{macs_per_s / 1e9:.3g} GMAC/s"
