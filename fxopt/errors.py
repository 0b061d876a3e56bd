"""Every error that fxopt raises on purpose.

One root, :class:`FxoptError`, so that a caller can catch them all; each message says what went wrong,
where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BudgetError",
    "DataError",
    "ExportError",
    "FxoptError",
    "InfeasibleError",
    "JournalError",
    "ParityError",
    "PassError",
    "PolicyError",
    "SearchError",
    "TargetError",
    "TraceError",
    "UnknownNameError",
    "UnsupportedError",
    "VerifyError",
]


class FxoptError(Exception):
    """Root of all errors that fxopt raises on purpose; they can be pickled, as pools of processes need it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[FxoptError], args: tuple[Any, ...], state: dict[str, Any]) -> FxoptError:
    """An error as it was, whatever its constructor takes."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class TraceError(FxoptError):
    """A model could not be traced to the canonical graph."""


class VerifyError(FxoptError):
    """A graph is not canonical.

    Attributes:
        node: Name of the node that breaks a rule; empty if it is the graph as a whole.
    """

    def __init__(self, message: str, *, node: str = "") -> None:
        super().__init__(message)
        self.node = node


class PassError(FxoptError):
    """A pass was given options or a graph that it cannot work on."""


class PolicyError(FxoptError):
    """A policy does not fit the search space, the model or the schema version."""


class BudgetError(FxoptError):
    """A budget is malformed."""


class InfeasibleError(FxoptError):
    """Even the cheapest policy is over the budget.

    Attributes:
        metric: The budget's metric.
        limit: The limit asked for, in the metric's SI unit.
        least: The least cost that any policy reaches, in the same unit.
    """

    def __init__(self, message: str, *, metric: str = "", limit: float = 0.0, least: float = 0.0) -> None:
        super().__init__(message)
        self.metric = metric
        self.limit = limit
        self.least = least


class SearchError(FxoptError):
    """A search was configured wrongly or a trial failed."""


class JournalError(SearchError):
    """A search journal cannot be read or belongs to another search."""


class TargetError(FxoptError):
    """A target preset is invalid or a workload cannot be costed on it."""


class UnsupportedError(TargetError):
    """A target has no model for what was asked; the message gives the reason."""


class ExportError(FxoptError):
    """A model could not be exported or the file could not be written."""


class ParityError(ExportError):
    """An exported file computes something else than the graph it was made from."""


class DataError(FxoptError):
    """A loader or an input array is empty, malformed or not finite."""


class UnknownNameError(FxoptError):
    """A name is not known; the message suggests the nearest one.

    Attributes:
        name: The name asked for.
        suggestion: The nearest known name, or None.
    """

    def __init__(self, what: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        names = sorted(known)
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
        self.name = name
        self.suggestion = nearest[0] if nearest else None
        hint = f" Did you mean {self.suggestion!r}?" if self.suggestion else ""
        more = f" {remedy}" if remedy else ""
        super().__init__(f"Unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}.{more}")
