"""What a family of models takes from a preset: names, dimensions and ranges of its figures, and their units."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxopt.errors import TargetError
from fxopt.targets.rows import FLOAT_BITS

__all__ = ["BIT_CLASSES", "UNITS", "Parameter", "ParameterError", "by_bits", "expect_all_or_none"]

UNITS: Mapping[str, Mapping[str, float]] = {
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
    "time per item": {"s/item": 1.0, "ns/item": 1e-9, "ms/M": 1e-9, "us/M": 1e-12},
    "rate": {"MAC/s": 1.0, "GMAC/s": 1e9, "TMAC/s": 1e12, "GFLOP/s": 0.5e9, "TFLOP/s": 0.5e12},
    "bandwidth": {"B/s": 1.0, "MB/s": 1e6, "GB/s": 1e9, "TB/s": 1e12},
    "bytes": {"B": 1.0, "KB": 1e3, "MB": 1e6, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "frequency": {"Hz": 1.0, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9},
    "work per cycle": {"MAC/cycle": 1.0},
    "bytes per cycle": {"B/cycle": 1.0, "bit/cycle": 0.125},
    "items per cycle": {"item/cycle": 1.0},
    "energy per MAC": {"J/MAC": 1.0, "nJ/MAC": 1e-9, "pJ/MAC": 1e-12},
    "energy per byte": {"J/B": 1.0, "nJ/B": 1e-9, "pJ/B": 1e-12, "pJ/bit": 8e-12},
    "energy per cycle": {"J/cycle": 1.0, "nJ/cycle": 1e-9, "pJ/cycle": 1e-12},
    "power": {"W": 1.0, "mW": 1e-3},
    "ratio": {"1": 1.0},
    "count": {"1": 1.0},
}
"""Units that presets may use, by dimension, each with its factor to the SI unit that models compute in."""

BIT_CLASSES = (1, 2, 4, 8, 16, FLOAT_BITS)
"""Widths that arithmetic units come in; an operator runs on the narrowest one that holds its wider operand."""


class ParameterError(TargetError):
    """A figure does not fit its family of models.

    Attributes:
        key: The dotted name of the figure, below ``parameters``.
        reason: What is wrong with it.
    """

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__(f"parameters.{key}: {reason}")


@dataclass(frozen=True)
class Parameter:
    """One figure that a family takes.

    Attributes:
        dimension: A key of :data:`UNITS`.
        about: What the figure means, in a few words.
        required: Whether a preset has to give it.
        positive: Whether it has to be above 0 rather than at least 0.
        maximum: The largest value that makes sense, in the SI unit.
    """

    dimension: str
    about: str
    required: bool = True
    positive: bool = True
    maximum: float = math.inf

    def to_si(self, key: str, value: float, unit: str) -> float:
        """Convert ``value`` to the SI unit.

        Raises:
            ParameterError: If the unit is not one of the dimension's or the value is out of range.
        """
        units = UNITS[self.dimension]
        if unit not in units:
            raise ParameterError(key, f"unit {unit!r} is none of {self.dimension}; use one of {', '.join(units)}.")
        converted = value * units[unit]
        if not math.isfinite(converted):
            raise ParameterError(key, f"{value!r} is not a finite number.")
        if converted < 0.0 or (self.positive and converted == 0.0):
            raise ParameterError(key, f"{value!r} has to be {'above 0' if self.positive else 'at least 0'}.")
        if converted > self.maximum:
            raise ParameterError(key, f"{value!r} {unit} is above the largest that makes sense, {self.maximum:g}.")
        if self.dimension == "count" and converted != int(converted):
            raise ParameterError(key, f"{value!r} has to be a whole number.")
        return converted


def by_bits(values: Mapping[str, float], prefix: str, *, rising: bool) -> list[float]:
    """One value for each width of operands from 0 to 32: that of the narrowest class ``prefix.<bits>`` that holds it.

    Args:
        values: Figures in SI units, by dotted name.
        prefix: What stands before the bits in the names.
        rising: Whether values have to rise (or stay) with bits, as energies do; otherwise they have to fall (or
            stay), as rates do. That keeps cost from falling as bits grow.

    Returns:
        33 values; NaN where no class is wide enough.

    Raises:
        ParameterError: If there is no class at all or the order is broken.
    """
    given = [bits for bits in BIT_CLASSES if f"{prefix}.{bits}" in values]
    if not given:
        raise ParameterError(prefix, f"no figure for any width; give {prefix}.{FLOAT_BITS}, for one.")
    for narrow, wide in itertools.pairwise(given):
        step = values[f"{prefix}.{wide}"] - values[f"{prefix}.{narrow}"]
        if step < 0.0 if rising else step > 0.0:
            order = "at least" if rising else "at most"
            raise ParameterError(f"{prefix}.{wide}", f"has to be {order} that of {narrow} bits.")
    table = [math.nan] * (FLOAT_BITS + 1)
    for bits in reversed(given):
        table[: bits + 1] = [values[f"{prefix}.{bits}"]] * (bits + 1)
    return table


def expect_all_or_none(values: Mapping[str, float], keys: Sequence[str]) -> bool:
    """Whether the figures of a group, which make sense together alone, are given.

    Raises:
        ParameterError: If some are given and some are not.
    """
    missing = [key for key in keys if key not in values]
    if missing and len(missing) < len(keys):
        raise ParameterError(missing[0], f"is missing; {', '.join(keys)} are given together or not at all.")
    return not missing
