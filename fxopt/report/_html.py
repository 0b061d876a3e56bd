"""Reports as one HTML page."""

from __future__ import annotations

import math
from functools import cache
from importlib import resources

import jinja2

from fxopt.decisions import format_quantity
from fxopt.report._charts import bar_chart, curve
from fxopt.report._data import Report
from fxopt.report._roofline_chart import roofline_chart
from fxopt.report._summary import (
    EXPORT_COLUMNS,
    STEP_COSTS,
    budget_words,
    change_words,
    export_kernels,
    export_layers,
    export_words,
    score_words,
    step_costs,
    summary,
    tiles,
)

__all__ = ["MOST_LAYERS", "MOST_LINES", "to_html"]

MOST_LAYERS = 500
"""Layers in the page's table; the JSON report has all."""

MOST_LINES = 200
"""Lines in each of the page's lists; the JSON report has all."""


def to_html(report: Report) -> str:
    """The report as one HTML page: styles, script and drawings are in it, nothing is fetched."""
    return _template().render(
        report=report,
        tiles=tiles(report),
        summary=summary(report),
        budgets=[(budget, budget_words(budget)) for budget in report.budgets],
        missed=any(not budget.met for budget in report.budgets),
        steps=[(step, step_costs(step)) for step in report.passes],
        step_columns=STEP_COSTS,
        export=export_words(report.export),
        export_columns=EXPORT_COLUMNS,
        export_layers=export_layers(report.export)[:MOST_LAYERS],
        export_kernels=export_kernels(report.export)[:MOST_LAYERS],
        layers=report.layers[:MOST_LAYERS],
        layers_left_out=max(len(report.layers) - MOST_LAYERS, 0),
        bars=bar_chart(report.layers),
        roofline=roofline_chart(report.roofline) if report.roofline is not None else None,
        curve=curve(report.curve),
        most=MOST_LINES,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(quantity=_quantity, score=_score, key=_key)
    environment.globals["change"] = change_words
    return environment.from_string((resources.files("fxopt.report") / "template.html").read_text("utf-8"))


def _quantity(value: float, metric: str) -> str:
    """``format_quantity`` as a filter."""
    return format_quantity(metric, value)


def _score(value: float | None, report: Report) -> str:
    return "" if value is None else score_words(report, value)


def _key(value: float) -> str:
    """What a cell sorts by; figures that are not finite come first."""
    return f"{value:.6g}" if math.isfinite(value) else "-1"
