"""What an optimization reports: data, text, JSON, one HTML page, and rooflines as pictures."""

from __future__ import annotations

from fxopt.report._data import BudgetLine, LayerLine, Metrics, PassLine, Report, TargetLine
from fxopt.report._plot import save_rooflines
from fxopt.report._roofline import Roofline, RooflinePoint, roofline
from fxopt.report._speed import lagging

__all__ = [
    "BudgetLine",
    "LayerLine",
    "Metrics",
    "PassLine",
    "Report",
    "Roofline",
    "RooflinePoint",
    "TargetLine",
    "lagging",
    "roofline",
    "save_rooflines",
]
