"""Reports as one HTML page."""

from __future__ import annotations

import math
from functools import cache
from importlib import resources

import jinja2

from fxopt.decisions import format_quantity
from fxopt.report._data import BOUNDS, Report, SupernetLine
from fxopt.report._figures import network_charts
from fxopt.report._search_figures import search_charts, step_chart
from fxopt.report._summary import (
    EXPORT_COLUMNS,
    MISSING,
    STEP_COSTS,
    asked,
    budget_words,
    change_words,
    export_kernels,
    export_layers,
    export_words,
    parted,
    percent,
    score_words,
    story,
    summary,
    tiles,
    trust,
)
from fxopt.report._theme import DARK, LIGHT

__all__ = ["MOST_LAYERS", "MOST_LINES", "to_html"]

MOST_LAYERS = 500
"""Layers in the page's table; the JSON report has all."""

MOST_LINES = 200
"""Lines in each of the page's lists; the JSON report has all."""


def to_html(report: Report) -> str:
    """The report as one HTML page: styles, script and drawings are in it, nothing is fetched."""
    steps, stages = step_chart(report), story(report)
    told = [index for index in range(len(STEP_COSTS)) if any(stage.costs[index][0] != MISSING for stage in stages)]
    return _template().render(
        report=report,
        light=LIGHT,
        dark=DARK,
        style=_file("page.css"),
        script=_file("page.js"),
        asked=asked(report),
        trust=trust(report),
        error=parted(report.target.error),
        tiles=tiles(report),
        summary=[(row.label, row.source, row.before, row.after, row.change) for row in summary(report)],
        budgets=[(budget, budget_words(budget)) for budget in report.budgets],
        missed=any(not budget.met for budget in report.budgets),
        stages=[(stage, [stage.costs[index] for index in told]) for stage in stages],
        step_columns=[STEP_COSTS[index] for index in told],
        step_charts=() if steps is None else (steps,),
        slow=report.slow,
        network_charts=tuple(network_charts(report)),
        epochs=_epochs(report.supernet),
        search_charts=tuple(search_charts(report)),
        engines=_engines(report),
        bounds=[bound for bound in BOUNDS if any(layer.bound == bound for layer in report.layers)],
        export=export_words(report.export),
        export_columns=EXPORT_COLUMNS,
        export_layers=export_layers(report.export)[:MOST_LAYERS],
        export_kernels=export_kernels(report.export)[:MOST_LAYERS],
        layers=report.layers[:MOST_LAYERS],
        layers_left_out=max(len(report.layers) - MOST_LAYERS, 0),
        most=MOST_LINES,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(quantity=_quantity, score=_score, key=_key)
    environment.globals["change"] = change_words
    return environment.from_string(_file("page.html"))


@cache
def _file(name: str) -> str:
    return (resources.files("fxopt.report") / name).read_text("utf-8")


def _engines(report: Report) -> list[tuple[str, str, str, str]]:
    """The engine that searched, and others by their journals: engine, seed, trials, best score."""
    runs = [(report.engine, report.seed, report.curve), *((one.engine, one.seed, one.curve) for one in report.curves)]
    return [
        (engine, str(seed), str(len(curve)), score_words(report, curve[-1] if curve else None))
        for engine, seed, curve in runs
    ]


def _epochs(found: SupernetLine | None) -> list[tuple[str, ...]]:
    """The epochs of the supernet beneath their headings: number, losses, entropy, expected costs."""
    if found is None:
        return []
    heading = (
        "Epoch",
        "Loss",
        "Loss of the architecture",
        "Entropy",
        *(f"Expected {metric}" for metric in found.limits),
    )
    rows = [
        (
            str(number),
            f"{one.loss:.4g}",
            MISSING if one.architecture_loss is None else f"{one.architecture_loss:.4g}",
            f"{one.entropy:.1%}",
            *(
                f"{format_quantity(metric, one.costs[metric])}, {percent(one.costs[metric], limit)}"
                for metric, limit in found.limits.items()
            ),
        )
        for number, one in enumerate(found.epochs, 1)
    ]
    return [heading, *rows]


def _quantity(value: float, metric: str) -> str:
    """``format_quantity`` as a filter."""
    return format_quantity(metric, value)


def _score(value: float | None, report: Report) -> str:
    return "" if value is None else score_words(report, value)


def _key(value: float) -> str:
    """What a cell sorts by; figures that are not finite come first."""
    return f"{value:.6g}" if math.isfinite(value) else "-1"
