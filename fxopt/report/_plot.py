"""Rooflines as pictures, drawn by matplotlib."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fxopt._files import write_bytes
from fxopt.errors import FxoptError
from fxopt.report._roofline import Roofline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["save_rooflines"]

_SUFFIXES = (".png", ".svg")
_NOTE_WIDTH = 90
_LOOKS = {"before": ("#8a94a3", "o"), "after": ("#0b6bcb", "D")}


def save_rooflines(rooflines: Sequence[Roofline], path: str | os.PathLike[str]) -> Path:
    """Draw rooflines beside each other, whole or not at all.

    Args:
        rooflines: One or more.
        path: A file ending in ``.svg`` or ``.png``.

    Returns:
        The path.

    Raises:
        FxoptError: If matplotlib is missing, the suffix is another one, or the file cannot be written.
    """
    place = Path(path)
    if place.suffix not in _SUFFIXES:
        raise FxoptError(f"A roofline is drawn as .svg or .png, not as {place.name!r}; change the suffix.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise FxoptError("Pictures need matplotlib; install it with: pip install 'fxopt[plot]'.") from missing
    figure = Figure(figsize=(7.0 * len(rooflines), 5.0), layout="constrained")
    for column, one in enumerate(rooflines, start=1):
        _draw(figure.add_subplot(1, len(rooflines), column), one)
    drawn = io.BytesIO()
    # Text stays text, and the same data give the same file.
    metadata = {"Date": None, "Title": "Roofline of " + ", ".join(one.target for one in rooflines)}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fxopt"}):
        if place.suffix == ".svg":
            figure.savefig(drawn, format="svg", metadata=metadata)
        else:
            figure.savefig(drawn, format="png", dpi=150)
    write_bytes(place, drawn.getvalue())
    return place


def _draw(axes: Axes, roofline: Roofline) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MACs for each byte moved\n" + textwrap.fill(roofline.note, _NOTE_WIDTH), fontsize=9)
    axes.set_ylabel("MACs in a second")
    axes.set_title(f"{roofline.target} ({roofline.status})")
    axes.grid(visible=True, which="major", alpha=0.3)
    for when, (color, marker) in _LOOKS.items():
        points = [point for point in roofline.points if point.when == when]
        if not points:
            continue
        axes.scatter(
            [point.intensity for point in points],
            [point.macs_per_s for point in points],
            s=22,
            c=color,
            marker=marker,
            label=when,
            zorder=3,
            linewidths=0,
            alpha=0.8,
        )
    low, high = axes.get_xlim()
    if roofline.bandwidth_bytes_per_s:
        corners = [peak.macs_per_s / roofline.bandwidth_bytes_per_s for peak in roofline.shown_peaks]
        high = max([high, *(2.0 * corner for corner in corners)])
    for peak in roofline.shown_peaks:
        start = low
        if roofline.bandwidth_bytes_per_s:
            start = min(max(low, peak.macs_per_s / roofline.bandwidth_bytes_per_s), high)
        axes.plot([start, high], [peak.macs_per_s] * 2, color="#444c56", linewidth=1.0)
        axes.annotate(peak.label, (high, peak.macs_per_s), ha="right", va="bottom", fontsize=8)
    if roofline.bandwidth_bytes_per_s:
        top = max((peak.macs_per_s for peak in roofline.peaks), default=high * roofline.bandwidth_bytes_per_s)
        end = min(high, top / roofline.bandwidth_bytes_per_s)
        axes.plot(
            [low, end],
            [low * roofline.bandwidth_bytes_per_s, end * roofline.bandwidth_bytes_per_s],
            color="#444c56",
            linewidth=1.0,
            linestyle="--",
            label=f"{roofline.bandwidth_bytes_per_s / 1e9:.3g} GB/s",
        )
    axes.set_xlim(low, high)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize=8)
