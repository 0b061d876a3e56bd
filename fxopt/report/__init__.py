"""What an optimization reports: data, text, JSON, one HTML page, and rooflines as pictures."""

from __future__ import annotations

from fxopt.report._data import (
    BudgetLine,
    CandidateLine,
    CurveLine,
    EpochLine,
    LayerLine,
    Metrics,
    OperatorLine,
    PassLine,
    Report,
    SlowLine,
    SupernetLine,
    TargetLine,
    TimeLine,
)
from fxopt.report._journals import load
from fxopt.report._roofline import Roofline, RooflinePoint, roofline, save_rooflines
from fxopt.report._speed import lagging

__all__ = [
    "BudgetLine",
    "CandidateLine",
    "CurveLine",
    "EpochLine",
    "LayerLine",
    "Metrics",
    "OperatorLine",
    "PassLine",
    "Report",
    "Roofline",
    "RooflinePoint",
    "SlowLine",
    "SupernetLine",
    "TargetLine",
    "TimeLine",
    "lagging",
    "load",
    "roofline",
    "save_rooflines",
]
