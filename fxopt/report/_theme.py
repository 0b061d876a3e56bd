"""The colours of a report, known to page and charts alike."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DARK", "LIGHT", "PARTS", "SERIES"]

LIGHT: Mapping[str, str] = {
    "page": "#ffffff",
    "text": "#1d2127",
    "faint": "#59616c",
    "line": "#d8dce2",
    "panel": "#f5f6f8",
    "before": "#8a94a3",
    "after": "#0b6bcb",
    "good": "#18703a",
    "bad": "#b3261e",
    "note": "#fff4d6",
    "second": "#b35c00",
    "third": "#7a3fb0",
    "fourth": "#18803c",
    "fifth": "#b02a6b",
}
"""Colours on a light page; no two are the same, for charts are told apart by them."""

DARK: Mapping[str, str] = {
    "page": "#14171b",
    "text": "#e6e9ed",
    "faint": "#a0a8b3",
    "line": "#343a43",
    "panel": "#1d2127",
    "before": "#7d8795",
    "after": "#58a6ff",
    "good": "#56c77c",
    "bad": "#ff7b72",
    "note": "#3a3016",
    "second": "#f0a04b",
    "third": "#c297f0",
    "fourth": "#5fd088",
    "fifth": "#f07bb2",
}
"""The same on a dark one."""

PARTS: Mapping[str, str] = {
    "compute": LIGHT["after"],
    "memory": LIGHT["second"],
    "launch": LIGHT["third"],
    "layout": LIGHT["fifth"],
    "every run": LIGHT["before"],
}
"""What time goes to."""

SERIES: tuple[str, ...] = tuple(LIGHT[name] for name in ("second", "third", "fourth", "fifth"))
"""Lines besides the one that a chart is about."""
