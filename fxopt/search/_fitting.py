"""Options of engines that fit the length of a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxopt.decisions import SearchSpace
from fxopt.errors import JournalError
from fxopt.search._journal import read_journal

__all__ = ["fitting_options", "options_of_search"]


def fitting_options(name: str, space: SearchSpace, trials: int) -> dict[str, Any]:
    """Options of an engine that suit a number of trials: half to learn, half to use what was learnt.

    Args:
        name: The engine's name.
        space: What can be decided.
        trials: How many policies may be tried.
    """
    if name == "exact":
        return {"probes": max(1, trials // (2 * max(len(space), 1)))}
    if name in ("ddpg", "reinforce"):
        warmup = max(2, min(20, trials // 4))
        return {"warmup": warmup, "decay": float(0.03 ** (1.0 / max(trials - warmup, 1)))}
    if name == "evolution":
        return {"population": max(4, min(16, trials // 4))}
    return {}


def options_of_search(name: str, space: SearchSpace, trials: int, journal: Path | None) -> dict[str, Any]:
    """Options that fit, or those that a search began with, so that more trials extend it.

    Args:
        name: The engine's name.
        space: What can be decided.
        trials: How many policies may be tried.
        journal: The search's journal, which need not be there yet; None for none.
    """
    fitting = fitting_options(name, space, trials)
    if journal is None or not journal.exists():
        return fitting
    try:
        header, _ = read_journal(journal)
    except JournalError:
        # Whoever opens it to go on says what is wrong with it.
        return fitting
    began = header.get("options")
    if header.get("engine") != name or not isinstance(began, dict):
        return fitting
    return {key: began[key] if type(began.get(key)) is type(value) else value for key, value in fitting.items()}
