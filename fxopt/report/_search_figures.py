"""Charts of the search, and of what each step bought."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fxopt.decisions import format_quantity
from fxopt.report._data import CandidateLine, Report
from fxopt.report._summary import budget_of, score_words, story
from fxopt.report._svg import Chart, Marks, chart, shortened
from fxopt.report._theme import LIGHT, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COSTS", "front", "pareto_metric", "search_charts", "step_chart"]

COSTS: Mapping[str, str] = {"latency": "latency_s", "energy": "energy_j", "size": "size_bytes", "macs": "macs"}
"""What the cost of a candidate is called, by metric."""

_SCALES = {"latency": (1e3, "ms"), "energy": (1e3, "mJ"), "size": (1e-3, "KB"), "macs": (1e-6, "M MACs")}
_MOST_CANDIDATES = 400
_MOST_MARKS = 60
"""Marks of a curve."""
_WORST = 0.05
"""Part of the scores at the lower end that curves need not show."""


def step_chart(report: Report) -> Chart | None:
    """Score and costs after each step."""
    steps = story(report)
    if len(steps) < 2:
        return None
    names = [shortened(step.name) for step in steps]

    def draw(figure: Figure, marks: Marks) -> None:
        top, below = figure.subplots(2, 1, sharex=True)
        known = [(place, one.accuracy) for place, one in enumerate(steps) if one.accuracy is not None]
        at, scores = [place for place, _ in known], [value for _, value in known]
        top.plot(at, scores, color=LIGHT["after"], linewidth=1.4)
        points = top.scatter(at, scores, s=30, c=LIGHT["after"])
        marks.add(points, [f"{steps[place].name}: {score_words(report, value)}" for place, value in known])
        top.set_ylabel(report.score_name if len(report.score_name) < 12 else "score")
        for metric, colour in zip(COSTS, (LIGHT["after"], *SERIES), strict=False):
            values = [(place, one.shares[metric]) for place, one in enumerate(steps) if metric in one.shares]
            if not values:
                continue
            places, shares = [place for place, _ in values], [100.0 * share for _, share in values]
            below.plot(places, shares, color=colour, linewidth=1.4, label="MACs" if metric == "macs" else metric)
            points = below.scatter(places, shares, s=30, c=colour)
            marks.add(
                points, [f"{steps[at].name}: {metric} {share:.1f}%" for at, share in zip(places, shares, strict=True)]
            )
        below.set_ylabel("% of the original")
        below.set_ylim(bottom=0.0)
        below.set_xticks(range(len(names)), names)
        figure.legend(loc="outside upper left", ncols=4)

    told = "; ".join(f"{one.name}: {', '.join(one.words)}" for one in steps)
    return chart("steps", "Step by step", told, draw, height=3.6, caption="Costs are predicted for the target.")


def search_charts(report: Report) -> Iterator[Chart]:
    """Progress of the engines, and the front of the candidates."""
    made = (_progress(report), _front_chart(report))
    yield from (one for one in made if one is not None)


def front(candidates: Sequence[CandidateLine], metric: str) -> list[CandidateLine]:
    """The candidates that no other one is both better and cheaper than, the cheapest first."""
    name = COSTS[metric]
    priced = [one for one in candidates if getattr(one, name) is not None and math.isfinite(one.score)]
    best, found = -math.inf, []
    for one in sorted(priced, key=lambda one: (getattr(one, name), -one.score)):
        if one.score > best:
            best = one.score
            found.append(one)
    return found


def pareto_metric(report: Report) -> str:
    """What candidates are compared by: the first budget that they have figures of, or latency."""
    able = [budget.metric for budget in report.budgets if budget.metric in COSTS]
    return able[0] if able else "latency"


def _progress(report: Report) -> Chart | None:
    own = (f"{report.engine} (this search)", report.curve, LIGHT["after"])
    several = {one.engine for one in report.curves if sum(other.engine == one.engine for other in report.curves) > 1}
    lines = [own] + [
        (f"{one.engine}, seed {one.seed}" if one.engine in several else one.engine, one.curve, colour)
        for one, colour in zip(report.curves, _colours(len(report.curves)), strict=True)
    ]
    known = [value for _, curve, _ in lines for value in curve if value is not None and math.isfinite(value)]
    if len(report.curve) < 2 or not known:
        return None

    low, high = _span(known)

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        for name, curve, colour in reversed(lines):
            points = [(trial, value) for trial, value in enumerate(curve, 1) if value is not None]
            if not points:
                continue
            x, y = [trial for trial, _ in points], [value for _, value in points]
            axes.step(x, y, where="post", color=colour, label=name, linewidth=2.2 if colour == own[2] else 1.2)
            rises = [at for at in range(len(x)) if y[at] >= low and (at in (0, len(x) - 1) or y[at] != y[at - 1])]
            rises = rises[:: -(-len(rises) // _MOST_MARKS) or 1]
            drawn = axes.scatter([x[at] for at in rises], [y[at] for at in rises], s=14, c=colour, zorder=3)
            marks.add(drawn, [f"{name}: {score_words(report, y[at])} after {x[at]} trials" for at in rises])
        axes.set_xlabel("trials")
        axes.set_ylabel("best score so far")
        axes.set_ylim(low, high)
        figure.legend(loc="outside upper left", reverse=True, ncols=5)

    told = "Best score after each trial; at the end " + ", ".join(
        f"{name} has {_last(curve)}" for name, curve, _ in lines
    )
    caption = f"Score: {report.score_name}, before fine-tuning and less a small preference for cheap policies."
    missing = {"uniform", "random"} - {report.engine, *(one.engine for one in report.curves)}
    if missing:
        caption += (
            f" {' and '.join(sorted(missing)).capitalize()} were not run: `fxopt compare-engines` with the same "
            "options and folder adds them here."
        )
    return chart("search", f"Search: {report.engine}, {report.trials} trials", told, draw, caption=caption)


def _last(curve: Sequence[float | None]) -> str:
    return f"{curve[-1]:.4g}" if curve and curve[-1] is not None else "none"


def _colours(count: int) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(count)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits that leave out the first bad scores, which would press everything else together."""
    ranked = sorted(values)
    low, high = ranked[int(_WORST * (len(ranked) - 1))], ranked[-1]
    margin = max(0.06 * (high - low), 0.005 * abs(high), 1e-6)
    return low - margin, high + margin


def _front_chart(report: Report) -> Chart | None:
    metric = pareto_metric(report)
    name, (scale, unit) = COSTS[metric], _SCALES[metric]
    best = front(report.candidates, metric)
    if len(report.candidates) < 2 or not best:
        return None
    low, high = _span([one.score for one in report.candidates if math.isfinite(one.score)])
    shown = [one for one in report.candidates if getattr(one, name) is not None and one.score >= low]
    shown, best = shown[-_MOST_CANDIDATES:], [one for one in best if one.score >= low]
    chosen = [one for one in shown if one.chosen]
    hidden = len(report.candidates) - len(shown)

    def words(one: CandidateLine) -> str:
        return f"trial {one.trial + 1}: {score_words(report, one.score)}, {format_quantity(metric, getattr(one, name))}"

    def points(axes: Axes, marks: Marks, which: Sequence[CandidateLine], label: str, **style: Any) -> None:
        if which:
            places = [getattr(one, name) * scale for one in which], [one.score for one in which]
            marks.add(axes.scatter(*places, label=label, **style), [words(one) for one in which])

    def draw(figure: Figure, marks: Marks) -> None:
        axes = figure.add_subplot()
        points(axes, marks, shown, "tried", s=16, c=LIGHT["before"], alpha=0.7, linewidths=0)
        places = [getattr(one, name) * scale for one in best], [one.score for one in best]
        axes.step(*places, where="post", color=LIGHT["after"], linewidth=1.2)
        points(axes, marks, best, "front", s=24, c=LIGHT["after"], zorder=3)
        points(axes, marks, chosen, "chosen", s=130, facecolors="none", edgecolors=LIGHT["bad"], linewidths=2, zorder=4)
        budget = budget_of(report, metric)
        if budget is not None and math.isfinite(budget.limit):
            axes.axvline(budget.limit * scale, color=LIGHT["second"], linestyle="--", label="budget")
        axes.set_ylim(low, high)
        axes.set_xlabel(f"{metric}, {unit}" if metric != "macs" else unit)
        axes.set_ylabel("score")
        figure.legend(loc="outside upper left", ncols=4)

    told = f"{len(best)} of {len(report.candidates)} policies are on the front: " + "; ".join(map(words, best[:12]))
    if chosen:
        told += f". Chosen: {words(chosen[0])}"
    return chart(
        "front",
        "Score against " + ("MACs" if metric == "macs" else metric),
        told,
        draw,
        height=3.6,
        caption="A point for each policy that was tried, by the score before fine-tuning; the line joins those that "
        "none is both better and cheaper than." + (f" The worst, {hidden} of them, are left out." if hidden else ""),
    )
