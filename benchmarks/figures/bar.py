"""A figure that a benchmark gives, and what is wanted of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "REPORTED",
    "Bar",
    "Document",
    "Found",
    "Wanted",
    "at_least",
    "at_most",
    "between",
    "has_to",
    "listed",
    "some",
]

Document = Mapping[str, Any]
"""What a benchmark prints: its name, the environment, its options and ``results``."""


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a value.

    Attributes:
        text: In words.
        holds: Whether a value meets it; None where a figure is told and nothing is asked of it.
    """

    text: str
    holds: Callable[[float], bool] | None = None


REPORTED = Wanted("")


@dataclass(frozen=True)
class Found:
    """What a benchmark gave.

    Attributes:
        value: What is compared with the bar: of several, the one that is furthest from meeting it.
        text: All of it, with the spread.
    """

    value: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One row of the table.

    Attributes:
        benchmark: The script, and behind a hyphen the name of its options where it is run with several.
        what: What is measured.
        wanted: What is wanted of it.
        of: The figure, from the document that the script printed. It raises LookupError if the document lacks it, as
            one does that was made with a part of the networks.
    """

    benchmark: str
    what: str
    wanted: Wanted
    of: Callable[[Document], Found]

    @property
    def script(self) -> str:
        """The script's name, without ending."""
        return self.benchmark.partition("-")[0]

    def met(self, found: Found) -> bool | None:
        """Whether what was found is what is wanted; None if nothing is. NaN meets nothing."""
        return None if self.wanted.holds is None else bool(self.wanted.holds(found.value))


def at_most(limit: float, unit: str = "", of: str = "") -> Wanted:
    """No more than a limit; ``of`` is told behind it."""
    return Wanted(f"at most {limit:g}{unit}{of}", lambda value: value <= limit)


def at_least(limit: float, unit: str = "", of: str = "") -> Wanted:
    """No less than a limit; ``of`` is told behind it."""
    return Wanted(f"at least {limit:g}{unit}{of}", lambda value: value >= limit)


def has_to(text: str) -> Wanted:
    """Something that holds or not: the value is 1 or 0."""
    return Wanted(text, lambda value: value == 1.0)


def some(values: Iterable[Any], what: str) -> list[Any]:
    """The values, of which there has to be one.

    Raises:
        LookupError: If there is none.
    """
    found = list(values)
    if not found:
        raise LookupError(what)
    return found


def between(values: Sequence[float], digits: int = 2) -> str:
    """The least and the largest of some values, or the one that all are."""
    low, high = (f"{one:.{digits}f}" for one in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def listed(values: Mapping[str, float], digits: int = 2, unit: str = "") -> str:
    """Names with their values."""
    return ", ".join(f"{name} {value:.{digits}f}{unit}" for name, value in values.items())


def spread(values: Sequence[float], digits: int = 2, factor: float = 1.0) -> str:
    """Mean and standard deviation of some values."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{factor * mean:.{digits}f}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{factor * mean:.{digits}f} ± {factor * deviation:.{digits}f}"


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"one {what}" if count == 1 else f"{count} {what}s"
