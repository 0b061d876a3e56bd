"""How a learning rate goes: its share of the highest one at each step."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "rising_cosine"]

_WARM_UP_SHARE = 0.05
_CYCLE_RISE = 0.3
_CYCLE_START = 0.04


def rising_cosine(step: int, total: int) -> float:
    """A linear rise over the first twentieth of all steps, times half a cosine from 1 to 0."""
    return _rise(step, total) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def _rise(step: int, total: int) -> float:
    return min(1.0, (step + 1) / max(1.0, total * _WARM_UP_SHARE))


def _steps(step: int, total: int) -> float:
    """The rise, and a tenth at a half and again at three quarters of all steps."""
    return _rise(step, total) * 0.1 ** ((2 * step >= total) + (4 * step >= 3 * total))


def _one_cycle(step: int, total: int) -> float:
    """From a twenty-fifth up over the first three tenths and down to nothing, by half cosines (Smith, Topin 2018)."""
    done = step / total
    if done < _CYCLE_RISE:
        return _CYCLE_START + (1.0 - _CYCLE_START) * 0.5 * (1.0 - math.cos(math.pi * done / _CYCLE_RISE))
    return 0.5 * (1.0 + math.cos(math.pi * (done - _CYCLE_RISE) / (1.0 - _CYCLE_RISE)))


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": _rise,
    "cosine": rising_cosine,
    "one-cycle": _one_cycle,
    "step": _steps,
}
"""Functions of a step and the number of all steps, by name."""
