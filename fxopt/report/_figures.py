"""Charts of the network: what its layers cost, kept and became."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from matplotlib.ticker import MaxNLocator

from fxopt.decisions import FLOAT_BITS, format_quantity
from fxopt.report._data import LayerLine, OperatorLine, Report, SupernetLine, TimeLine
from fxopt.report._plot import draw_roofline
from fxopt.report._roofline import Roofline
from fxopt.report._svg import Chart, Marks, chart, shortened
from fxopt.report._theme import LIGHT, PARTS, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["network_charts"]

_MOST_BARS = 24
_MOST_LAYERS = 200
_MOST_POINTS = 400
_NAMED = 40
_ROW = 0.2
"""Inches of a bar in a list."""
_LETTER = 0.06
"""Inches that a letter of a name takes where names stand on end."""


def network_charts(report: Report) -> Iterator[Chart]:
    """The charts that there is something to draw in, in the order of the page."""
    made = (
        _roofline(report.roofline) if report.roofline is not None else None,
        _channels(report.layers),
        _bits(report.layers),
        _operators(report.operators),
        _supernet(report.supernet),
        _times(report.times, report.target.told),
        _latencies(report.layers, report.target.told),
    )
    yield from (one for one in made if one is not None)


def _roofline(roofline: Roofline) -> Chart | None:
    points = sorted(roofline.points, key=lambda point: -point.latency_s)[:_MOST_POINTS]
    if not points:
        return None

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        draw_roofline(axes, roofline, points, marks)
        axes.set_xlabel("MACs for each byte moved")

    left_out = len(roofline.points) - len(points)
    return chart(
        "roofline",
        f"Roofline of {roofline.target}",
        f"MACs in a second over MACs for each byte moved, a point for each of {len(points)} layers before and after; "
        f"both axes are logarithmic. {roofline.note}",
        draw,
        height=4.6,
        caption=f"Circles are layers before, diamonds after; higher is faster. {roofline.note}"
        + (f" {left_out} points with less latency are left out." if left_out else ""),
    )


def _channels(layers: Sequence[LayerLine]) -> Chart | None:
    layers = [layer for layer in layers if not layer.gone]
    shown = layers[:_MOST_LAYERS]
    if not any(layer.channels_before != layer.channels_after for layer in shown):
        return None
    words = [f"{one.site}: {one.channels_after} of {one.channels_before} channels kept" for one in shown]
    before, after = [one.channels_before for one in shown], [one.channels_after for one in shown]
    return chart(
        "channels",
        "Channels kept, along the network",
        f"Output channels of {len(shown)} layers before and after, in the order of the graph; the table of layers has "
        "the figures",
        lambda figure, marks: _pairs(figure.add_subplot(), shown, (before, after), words, marks, "output channels"),
        height=2.0 + _beneath(shown),
        caption=_cut_off(layers, "Grey is the original, blue what is left of it."),
    )


def _bits(layers: Sequence[LayerLine]) -> Chart | None:
    layers = [layer for layer in layers if not layer.gone]
    shown = layers[:_MOST_LAYERS]
    if all(layer.weight_bits == layer.activation_bits == FLOAT_BITS for layer in shown):
        return None
    weights, activations = [one.weight_bits for one in shown], [one.activation_bits for one in shown]
    words = [f"{one.site}: weights {_width(one.weight_bits)}, inputs {_width(one.activation_bits)}" for one in shown]

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        _pairs(axes, shown, (activations, weights), words, marks, "bits", beside=True)
        axes.set_yscale("log", base=2)
        ticks = sorted({*weights, *activations})
        axes.set_yticks(ticks, [_width(one) for one in ticks])
        axes.set_ylim(0.8, max(ticks) * 1.2)
        axes.minorticks_off()

    return chart(
        "bits",
        "Bits of each layer, along the network",
        f"Bits of the weights and the inputs of {len(shown)} layers, in the order of the graph; the table of layers "
        "has the figures",
        draw,
        height=2.0 + _beneath(shown),
        caption=_cut_off(layers, "Blue is for weights, grey for the values that a layer reads."),
    )


def _beneath(lines: Sequence[LayerLine] | Sequence[OperatorLine]) -> float:
    """Inches that names take beneath a chart."""
    if len(lines) > _NAMED:
        return 0.4
    return 0.1 + _LETTER * max(len(shortened(line.site)) for line in lines)


def _width(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else str(bits)


def _cut_off(layers: Sequence[LayerLine], words: str) -> str:
    if len(layers) <= _MOST_LAYERS:
        return words
    return f"{words} The first {_MOST_LAYERS} of {len(layers)} layers."


def _pairs(
    axes: Axes,
    layers: Sequence[LayerLine],
    heights: tuple[Sequence[int], Sequence[int]],
    words: Sequence[str],
    marks: Marks,
    label: str,
    *,
    beside: bool = False,
) -> None:
    """Two bars for each layer: one before the other, or beside each other."""
    places = range(len(layers))
    width, shift = (0.4, 0.2) if beside else (0.8, 0.0)
    for bars, colour, move in zip(heights, ("before", "after"), (shift, -shift), strict=True):
        drawn = axes.bar([place + move for place in places], bars, width, color=LIGHT[colour], linewidth=0)
        for bar, text in zip(drawn, words, strict=True):
            marks.add(bar, [text])
    axes.grid(visible=False, axis="x")
    axes.set_xlim(-0.8, len(layers) - 0.2)
    axes.set_ylabel(label)
    _name_places(axes, layers)


def _name_places(axes: Axes, lines: Sequence[LayerLine] | Sequence[OperatorLine]) -> None:
    if len(lines) <= _NAMED:
        names = [shortened(one.site) for one in lines]
        axes.set_xticks(range(len(lines)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    else:
        axes.set_xlabel("from input to output")


def _operators(lines: Sequence[OperatorLine]) -> Chart | None:
    shown = lines[:_MOST_LAYERS]
    if not shown:
        return None
    names = list(dict.fromkeys(name for line in shown for name in (*line.choices, line.before, line.after)))
    rows = {name: len(names) - 1 - index for index, name in enumerate(names)}
    offered = [(place, rows[name], line, name) for place, line in enumerate(shown) for name in line.choices]

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        scattered = axes.scatter([x for x, *_ in offered], [y for _, y, *_ in offered], s=14, c=LIGHT["line"])
        marks.add(scattered, [f"{line.site}: {name} was on offer" for *_, line, name in offered])
        for place, line in enumerate(shown):
            was = axes.scatter([place], [rows[line.before]], s=90, facecolors="none", edgecolors=LIGHT["before"])
            marks.add(was, [f"{line.site}: {line.before} in the original"])
            now = axes.scatter([place], [rows[line.after]], s=40, c=LIGHT["after"])
            marks.add(now, [f"{line.site}: {line.after} chosen, {line.before} in the original"])
        axes.set_yticks([rows[name] for name in names], [shortened(name) for name in names])
        _name_places(axes, shown)
        axes.margins(0.03, 0.1)

    return chart(
        "operators",
        "Operators chosen",
        "; ".join(f"{line.site}: {line.after}, {line.before} before" for line in shown),
        draw,
        height=0.6 + _ROW * len(names) + _beneath(shown),
        caption="A filled point is the operator chosen, a ring that of the original, a small point what was on offer.",
    )


def _supernet(found: SupernetLine | None) -> Chart | None:
    if found is None or len(found.epochs) < 2:
        return None
    at = range(1, len(found.epochs) + 1)
    lines = [("entropy", [100.0 * one.entropy for one in found.epochs], LIGHT["after"])]
    for (metric, limit), colour in zip(found.limits.items(), (*SERIES, LIGHT["text"]), strict=False):
        lines.append((f"expected {metric}", [100.0 * one.costs[metric] / limit for one in found.epochs], colour))

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        for name, values, colour in lines:
            axes.plot(at, values, color=colour, linewidth=1.4, label=name)
            points = axes.scatter(at, values, s=20, c=colour, zorder=3)
            marks.add(points, [f"epoch {epoch}: {name} {value:.1f}%" for epoch, value in zip(at, values, strict=True)])
        if found.limits:
            axes.axhline(100.0, color=LIGHT["before"], linestyle="--", label="limit")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("%")
        axes.set_ylim(bottom=0.0)
        figure.legend(loc="outside upper left", ncols=6)

    told = ", ".join(f"{name} from {values[0]:.1f}% to {values[-1]:.1f}%" for name, values, _ in lines)
    return chart(
        "supernet",
        "The search for operators",
        f"In {len(at)} epochs {told}; the table of epochs has the figures",
        draw,
        height=2.4,
        caption="Entropy is 100% while every operator is as probable as another, and 0% when all is decided."
        + (" Expected costs are in percent of what the search was to keep to." if found.limits else ""),
    )


def _times(times: Sequence[TimeLine], target: str) -> Chart | None:
    if not any(line.before_s + line.after_s > 0.0 for line in times):
        return None
    whole = [sum(line.before_s for line in times), sum(line.after_s for line in times)]

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        starts = [0.0, 0.0]
        for line in times:
            parts = [line.before_s * 1e3, line.after_s * 1e3]
            bars = axes.barh([1, 0], parts, 0.6, left=starts, color=PARTS[line.part], label=line.part)
            for bar, seconds, total in zip(bars, (line.before_s, line.after_s), whole, strict=True):
                share = seconds / total if total else 0.0
                marks.add(bar, [f"{line.part}: {format_quantity('latency', seconds)}, {share:.0%}"])
            starts = [start + part for start, part in zip(starts, parts, strict=True)]
        axes.set_yticks([1, 0], ["before", "after"])
        axes.set_xlabel("ms")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside upper left", ncols=len(times), fontsize=8)

    told = ", ".join(
        f"{line.part} {format_quantity('latency', line.before_s)} then {format_quantity('latency', line.after_s)}"
        for line in times
    )
    caption = (
        "By what each operator waits for: arithmetic (compute), values to arrive (memory), being started at all "
        "(launch), or values being moved about (layout). “Every run” is what a run costs whatever its operators."
    )
    return chart("times", f"Where the time goes on {target}", told, draw, height=1.7, caption=caption)


def _latencies(layers: Sequence[LayerLine], target: str) -> Chart | None:
    ranked = sorted(layers, key=lambda layer: -max(layer.latency_before_s, layer.latency_after_s))[:_MOST_BARS]
    longest = max((max(one.latency_before_s, one.latency_after_s) for one in ranked), default=0.0)
    if not (math.isfinite(longest) and longest > 0.0):
        return None
    chosen = {id(one) for one in ranked}
    shown = [one for one in layers if id(one) in chosen]

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        for place, layer in enumerate(shown):
            was, now = (
                format_quantity("latency", seconds) for seconds in (layer.latency_before_s, layer.latency_after_s)
            )
            pairs = ((layer.latency_before_s, "before", -0.2), (layer.latency_after_s, "after", 0.2))
            for seconds, colour, move in pairs:
                (bar,) = axes.barh([place + move], [seconds * 1e3], 0.4, color=LIGHT[colour], linewidth=0)
                marks.add(bar, [f"{layer.site}: {was}, then {now}"])
        axes.set_yticks(range(len(shown)), [shortened(one.site) for one in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("ms")
        axes.grid(visible=False, axis="y")

    left_out = len(layers) - len(shown)
    return chart(
        "latencies",
        f"Latency by layer, predicted for {target}",
        f"Predicted latency of {len(shown)} layers before and after; the table of layers has the figures",
        draw,
        height=0.7 + _ROW * len(shown),
        caption="Grey is the original, blue the result."
        + (f" {left_out} layers with less latency are in the table only." if left_out else ""),
    )
