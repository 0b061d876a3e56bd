"""What an optimization reports: data, text, JSON, and one HTML page."""

from __future__ import annotations

from fxopt.report._data import BudgetLine, LayerLine, Metrics, PassLine, Report, TargetLine

__all__ = ["BudgetLine", "LayerLine", "Metrics", "PassLine", "Report", "TargetLine"]
