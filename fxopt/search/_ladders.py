"""The choices of decisions as positions on axes: what engines compute with that need nearness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Choice, Constraint, SearchSpace

__all__ = ["Ladder", "ladders"]


class Ladder:
    """Where the choices of one decision stand on its axes.

    Pairs of bits that form a grid, every width of weights with every width of activations, have two axes. All other
    choices stand on one: numbers by size, tuples by their sum, names (operators) by what they cost, or in the order in
    which they are declared where there is no constraint.

    Args:
        choices: The choices.
        costs: What each choice costs, shape ``(choices,)``, or None.

    Attributes:
        sizes: The number of rungs of each axis.
        rungs: The rung of every choice on each axis, shape ``(choices, axes)``.
        choice_at: The index of the choice at each place of the grid, of the shape ``sizes``.
    """

    def __init__(self, choices: Sequence[Choice], costs: npt.NDArray[np.float64] | None = None) -> None:
        columns = _grid(choices)
        if columns is None:
            columns = [np.argsort(np.argsort(_heights(choices, costs), kind="stable"), kind="stable")]
        self.rungs: npt.NDArray[np.intp] = np.stack(columns, axis=1).astype(np.intp)
        self.sizes: tuple[int, ...] = tuple(int(size) for size in self.rungs.max(axis=0) + 1)
        self.choice_at: npt.NDArray[np.intp] = np.zeros(self.sizes, dtype=np.intp)
        self.choice_at[tuple(self.rungs.T)] = np.arange(len(choices))

    @property
    def places(self) -> npt.NDArray[np.float64]:
        """The place of every choice on each axis, from 0 to 1, shape ``(choices, axes)``."""
        return np.asarray((self.rungs + 0.5) / np.array(self.sizes))


def ladders(space: SearchSpace, constraint: Constraint | None) -> list[Ladder]:
    """A ladder for each decision; names are ordered by what they cost with all else cheapest."""
    named = [j for j, decision in enumerate(space) if any(isinstance(choice, str) for choice in decision.choices)]
    costs: dict[int, npt.NDArray[np.float64]] = {}
    if constraint is not None and named:
        base = space.encode(constraint.cheapest())
        for j in named:
            rows = np.repeat(base[np.newaxis], space.sizes[j], axis=0)
            rows[:, j] = np.arange(space.sizes[j])
            costs[j] = (constraint.costs_at(rows) / constraint.limits).max(axis=1)
    return [Ladder(decision.choices, costs.get(j)) for j, decision in enumerate(space)]


def _grid(choices: Sequence[Choice]) -> list[npt.NDArray[np.intp]] | None:
    """The rungs on each axis, if the choices are all combinations of what their components can be."""
    tuples = [choice for choice in choices if isinstance(choice, tuple)]
    if len(tuples) != len(choices) or {len(choice) for choice in tuples} != {2}:
        return None
    values = np.array(tuples)
    axes = [np.unique(column, return_inverse=True) for column in values.T]
    sizes = [len(levels) for levels, _ in axes]
    if min(sizes) < 2 or np.prod(sizes) != len(choices):
        return None
    return [rungs for _, rungs in axes]


def _heights(choices: Sequence[Choice], costs: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
    if any(isinstance(choice, str) for choice in choices):
        return np.arange(len(choices), dtype=np.float64) if costs is None else costs
    return np.array([sum(choice) if isinstance(choice, tuple) else choice for choice in choices], dtype=np.float64)
