"""HAQ's way into a budget: lower every decision a step in turn until the limits hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fxopt.decisions._decision import Choice
from fxopt.decisions._space import SearchSpace

__all__ = ["decrease"]

_Indices = npt.NDArray[np.intp]


def decrease(
    space: SearchSpace,
    within: Callable[[_Indices], npt.NDArray[np.bool_]],
    row: _Indices,
    order: Sequence[int] | _Indices,
) -> _Indices:
    """``row`` lowered until it is within the limits, as HAQ does it (Wang et al. 2019, HAQ, section 3).

    A sweep goes through the decisions from the last of ``order`` to the first. A number goes to the next smaller
    choice; a tuple has its last component lowered and then its first, each to the next smaller one on offer with the
    others as they are (of a pair of bits: activations, then weights); a name stays. The limits are looked at after
    every single step, and the walk ends as soon as they hold. All steps of a sweep are costed at once.

    Args:
        space: The search space.
        within: Which of some rows of choice indices, shape ``(n, decisions)``, are within the limits.
        row: The choice indices wanted, shape ``(decisions,)``.
        order: A permutation of the decisions' indices.

    Returns:
        The first row within the limits; or the lowest row, which may be over, if there is none.
    """
    current = np.array(row, dtype=np.intp)
    if within(current[np.newaxis])[0]:
        return current
    steps = [_lower_steps(decision.choices) for decision in space]
    while True:
        ladder: list[_Indices] = []
        for j in reversed([int(j) for j in order]):
            for step in steps[j]:
                lower = step[current[j]]
                if lower != current[j]:
                    current[j] = lower
                    ladder.append(current.copy())
        if not ladder:
            return current
        inside = np.flatnonzero(within(np.stack(ladder)))
        if len(inside):
            return ladder[int(inside[0])]


@functools.lru_cache(maxsize=256)
def _lower_steps(choices: tuple[Choice, ...]) -> tuple[_Indices, ...]:
    """For each step of a sweep, the choice that follows each choice; many decisions have the same choices."""
    if all(isinstance(choice, tuple) for choice in choices):
        widths = {len(choice) for choice in choices if isinstance(choice, tuple)}
        axes = range(min(widths)) if len(widths) == 1 else range(0)
        return tuple(_lowered(choices, axis) for axis in reversed(axes))
    if any(isinstance(choice, str) for choice in choices):
        return ()
    return (_lowered(choices, None),)


def _lowered(choices: Sequence[Choice], axis: int | None) -> _Indices:
    found = np.array([_next_lower(choices, choice, axis) for choice in choices], dtype=np.intp)
    found.setflags(write=False)
    return found


def _next_lower(choices: Sequence[Choice], choice: Choice, axis: int | None) -> int:
    lower = [(value, i) for i, other in enumerate(choices) if (value := _below(other, choice, axis)) is not None]
    return max(lower)[1] if lower else choices.index(choice)


def _below(other: Choice, choice: Choice, axis: int | None) -> float | None:
    """The component of ``other`` that is lowered, if that is all that tells it from ``choice``."""
    if axis is None:
        smaller = isinstance(other, (int, float)) and isinstance(choice, (int, float)) and other < choice
        return float(other) if smaller and isinstance(other, (int, float)) else None
    if not isinstance(other, tuple) or not isinstance(choice, tuple) or not other[axis] < choice[axis]:
        return None
    same = other[:axis] + other[axis + 1 :] == choice[:axis] + choice[axis + 1 :]
    return float(other[axis]) if same else None
