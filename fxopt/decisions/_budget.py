"""What the result may cost."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fxopt.errors import BudgetError

__all__ = ["METRICS", "Budget", "format_quantity", "format_score", "within"]

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}
_JOULES = {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "µJ": 1e-6, "μJ": 1e-6, "nJ": 1e-9, "pJ": 1e-12}
_BYTES = {
    **{"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    **{"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}
_COUNTS = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

METRICS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "latency": MappingProxyType(_SECONDS),
        "energy": MappingProxyType(_JOULES),
        "size": MappingProxyType(_BYTES),
        "macs": MappingProxyType({**_COUNTS, **{f"{unit}MACs": scale for unit, scale in _COUNTS.items()}}),
        "memory": MappingProxyType(_BYTES),
    }
)
"""The metrics that can be bounded, and for each the units it is written in and their size in SI units."""

_EXAMPLES = {"latency": "5ms", "energy": "3mJ", "size": "2MB", "macs": "300M", "memory": "512KB"}
_SHOWN_UNITS = {
    "latency": ("s", "ms", "us", "ns"),
    "energy": ("J", "mJ", "uJ", "nJ", "pJ"),
    "size": ("GB", "MB", "KB", "B"),
    "macs": ("T", "G", "M", "k"),
    "memory": ("GB", "MB", "KB", "B"),
}
_ROUNDING = 1e-9
_QUANTITY = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\s\d]*)\s*")


def format_quantity(metric: str, value: float) -> str:
    """``value`` of ``metric`` (SI units) in the unit that reads best, such as ``"3.2 ms"``."""
    units = _SHOWN_UNITS.get(metric, ())
    for unit in units:
        if abs(value) >= METRICS[metric][unit]:
            return f"{value / METRICS[metric][unit]:.4g} {unit}"
    if not units or metric == "macs":
        return f"{value:.4g}"
    return f"{value / METRICS[metric][units[-1]]:.4g} {units[-1]}"


def format_score(score_name: str, score: float) -> str:
    """A score as a reader expects it: a percentage where it is an accuracy."""
    return f"{score:.2%}" if score_name == "accuracy" else f"{score + 0.0:.4g}"


def within(cost: float, limit: float) -> bool:
    """Whether a cost keeps a limit, both in SI units, but for what sums in another order differ by."""
    return bool(cost <= limit * (1.0 + _ROUNDING))


@dataclass(frozen=True)
class Budget:
    """An upper bound on one metric of the result.

    Latency, energy, memory and multiply-accumulates are those of one run on the target, of as many samples as it takes
    at a time (``capabilities.batch``: 1 on phones, 8 on ``v100``, 64 on ``gtx1080ti``).

    Attributes:
        metric: ``"latency"``, ``"energy"``, ``"size"``, ``"macs"`` or ``"memory"``.
        limit: The bound: seconds, joules, bytes or a count; or a fraction of the original if ``relative``.
        relative: Whether ``limit`` is a fraction, in (0, 1].

    Raises:
        BudgetError: If the metric is unknown or the limit is out of range.
    """

    metric: str
    limit: float
    relative: bool

    def __post_init__(self) -> None:
        """Refuse what bounds nothing."""
        _check_metric(self.metric)
        if not (math.isfinite(self.limit) and self.limit > 0.0):
            raise _bad(self.metric, self.limit, "a budget is above zero and finite")
        if self.relative and self.limit > 1.0:
            raise _bad(self.metric, self.limit, "a fraction of the original is at most 1")

    def __str__(self) -> str:
        """The bound in words."""
        if self.relative:
            return f"{self.metric} <= {self.limit:.4g} of the original"
        return f"{self.metric} <= {format_quantity(self.metric, self.limit)}"

    @classmethod
    def parse(cls, metric: str, value: object) -> Budget:
        """Read a budget as people write it.

        Args:
            metric: The metric to bound.
            value: A fraction of the original in (0, 1], a percentage such as ``"60%"``, or a quantity with
                a unit of the metric such as ``"5ms"``, ``"2MB"``, ``"300M"`` or ``"3mJ"``.

        Raises:
            BudgetError: Saying what is accepted.

        Example:
            >>> Budget.parse("latency", "5ms").limit
            0.005
            >>> Budget.parse("size", 0.6).relative
            True
        """
        _check_metric(metric)
        if isinstance(value, Budget):
            return value if value.metric == metric else _raise_other_metric(metric, value)
        if isinstance(value, numbers.Real) and type(value).__name__ not in ("bool", "bool_"):
            return cls._fraction(metric, value, float(value))
        if isinstance(value, str):
            return cls._parse_text(metric, value)
        raise _bad(metric, value, f"it is a {type(value).__name__}")

    @classmethod
    def parse_all(cls, budgets: Mapping[str, object]) -> tuple[Budget, ...]:
        """Read one budget per metric, such as ``{"latency": 0.6, "size": "2MB"}``, in the order given.

        Raises:
            BudgetError: If one of them is malformed.
        """
        if not isinstance(budgets, Mapping):
            raise BudgetError(
                f'Budgets are given by metric, such as {{"latency": 0.6, "size": "2MB"}}; got {budgets!r}.'
            )
        return tuple(cls.parse(metric, value) for metric, value in budgets.items())

    def absolute(self, reference: float) -> float:
        """The bound in SI units, given what the original costs (SI units).

        Raises:
            BudgetError: If the bound is relative and the original's cost is not above zero and finite.
        """
        if not self.relative:
            return self.limit
        if not (math.isfinite(reference) and reference > 0.0):
            raise BudgetError(
                f"The {self.metric} budget is a fraction of the original, but the original's {self.metric} is "
                f"{reference!r}. Give an absolute budget, such as {_EXAMPLES[self.metric]!r}."
            )
        return self.limit * float(reference)

    @classmethod
    def _fraction(cls, metric: str, value: object, fraction: float) -> Budget:
        if not 0.0 < fraction <= 1.0:
            raise _bad(metric, value, "a number without a unit is a fraction of the original")
        return cls(metric, fraction, relative=True)

    @classmethod
    def _parse_text(cls, metric: str, text: str) -> Budget:
        match = _QUANTITY.fullmatch(text)
        if match is None:
            raise _bad(metric, text, "it is not a number with a unit")
        number, unit = float(match[1]), match[2]
        if not unit:
            return cls._fraction(metric, text, number)
        if unit == "%":
            return cls._fraction(metric, text, number / 100.0)
        if unit not in METRICS[metric]:
            raise _bad(metric, text, _why_bad_unit(metric, unit))
        limit = number * METRICS[metric][unit]
        if not (math.isfinite(limit) and limit > 0.0):
            raise _bad(metric, text, "a budget is above zero and finite")
        return cls(metric, limit, relative=False)


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        nearest = difflib.get_close_matches(str(metric), METRICS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise BudgetError(f"There is no metric {metric!r} to budget.{hint} Known: {', '.join(METRICS)}.")


def _why_bad_unit(metric: str, unit: str) -> str:
    owners = [other for other in METRICS if unit in METRICS[other]]
    if owners:
        return f"{unit!r} is a unit of {' and '.join(owners)}, not of {metric}"
    return f"{unit!r} is no unit of {metric}"


def _bad(metric: str, value: object, reason: str) -> BudgetError:
    units = ", ".join(METRICS[metric])
    return BudgetError(
        f"Budget {metric}={value!r} cannot be used: {reason}. Accepted: a fraction of the original in (0, 1], "
        f"a percentage such as '60%', or a quantity such as {_EXAMPLES[metric]!r} in {units}."
    )


def _raise_other_metric(metric: str, budget: Budget) -> Budget:
    raise BudgetError(f"The budget given for {metric} is one of {budget.metric}; file it under its own metric.")
