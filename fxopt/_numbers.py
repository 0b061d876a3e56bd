"""Numbers that people hand over, checked."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from fxopt.errors import FxoptError

__all__ = ["check_below_one", "check_not_negative", "check_positive", "check_whole"]

_MOST = 2**63 - 1
"""What torch takes."""


def check_whole(least: int, error: type[FxoptError] = FxoptError, /, **values: Any) -> None:
    """Numbers are whole and not below the least."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            raise error(f"{name} has to be a whole number of at least {least}, got {value!r}.")
        if int(value) > _MOST:
            raise error(f"{name} has to be a whole number of at most 2**63 - 1, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(error: type[FxoptError] = FxoptError, /, **values: Any) -> None:
    """Numbers are above zero and finite."""
    for name, value in values.items():
        if not (_is_number(value) and 0.0 < float(value) < math.inf):
            raise error(f"{name} has to be above zero and finite, got {value!r}.")


def check_not_negative(error: type[FxoptError] = FxoptError, /, **values: Any) -> None:
    """Numbers are zero or above, and finite."""
    for name, value in values.items():
        if not (_is_number(value) and 0.0 <= float(value) < math.inf):
            raise error(f"{name} has to be finite and not below zero, got {value!r}.")


def check_below_one(error: type[FxoptError] = FxoptError, /, **values: Any) -> None:
    """Numbers are zero or above, and below one."""
    for name, value in values.items():
        if not (_is_number(value) and 0.0 <= float(value) < 1.0):
            raise error(f"{name} lies in [0, 1), got {value!r}.")
