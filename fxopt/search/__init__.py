"""Searching for the policy with the best score: engines propose, a journal remembers.

An :class:`Engine` proposes policies and learns their scores; it sees decisions and features, never a
graph. :func:`run_search` runs one for a number of trials, on any executor, and makes the search
resumable. :mod:`fxopt.search.engines` holds the engines by name.

Example:
    >>> from fxopt.decisions import Decision, SearchSpace
    >>> space = SearchSpace([Decision("channels", "conv1", (8, 16, 24, 32), default=32)])
    >>> engine = engines.create("random", space, seed=0)
    >>> result = run_search(engine, lambda policy: -abs(policy["channels", "conv1"] - 16), trials=20)
    >>> result.policy["channels", "conv1"]
    16
"""

from __future__ import annotations

from fxopt.search import engines
from fxopt.search._compare import Comparison, EngineRun, compare, installed
from fxopt.search._engine import FAILED, Engine
from fxopt.search._fitting import fitting_options, options_of_search
from fxopt.search._journal import JOURNAL_SCHEMA, read_journal
from fxopt.search._run import SearchProgress, run_search
from fxopt.search._trial import SearchResult, Trial, best_so_far

__all__ = [
    "FAILED",
    "JOURNAL_SCHEMA",
    "Comparison",
    "Engine",
    "EngineRun",
    "SearchProgress",
    "SearchResult",
    "Trial",
    "best_so_far",
    "compare",
    "engines",
    "fitting_options",
    "installed",
    "options_of_search",
    "read_journal",
    "run_search",
]
