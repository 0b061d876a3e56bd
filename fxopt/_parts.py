"""What one of several passes may decide within limits that all of them share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import InfeasibleError
from fxopt.lowering import IndexCosts

__all__ = ["Parts"]

_Indices = npt.NDArray[np.intp]
_Floats = npt.NDArray[np.float64]
_NO_LIMIT = 1e300


@dataclass(frozen=True)
class _Beside:
    """Costs of policies that decide some columns of a space; the others are given."""

    costs: IndexCosts
    columns: list[int]
    others: _Indices

    def at(self, indices: _Indices) -> _Floats:
        """Costs by choice indices of the columns, shape (policies, metrics)."""
        rows = np.repeat(self.others[None], len(indices), axis=0)
        rows[:, self.columns] = indices
        return self.costs.at(rows)

    def least(self, space: SearchSpace, metric: int) -> float:
        """The least cost that the decisions of ``space``, which are the columns, reach in a metric."""

        def cost(indices: _Indices) -> _Floats:
            return self.at(indices)[:, metric]

        free = Constraint(
            space, lambda some: cost(np.array([space.encode(one) for one in some])), [_NO_LIMIT], by_index=cost
        )
        return float(cost(space.encode(free.cheapest())[None])[0])


@dataclass(frozen=True)
class Parts:
    """Decisions of several passes.

    Attributes:
        space: All of them.
        costs: What they cost in each metric.
        limits: The limit of each metric.
        metrics: The metrics' names.
    """

    space: SearchSpace
    costs: IndexCosts
    limits: _Floats
    metrics: Sequence[str]

    def alone(self, own: SearchSpace) -> Constraint:
        """What keeps some decisions within the limits where the others change nothing.

        Args:
            own: The decisions.

        Raises:
            InfeasibleError: If nothing does.
        """
        return self._bounded(own, (self._beside(own, self.space.default()), self.limits))

    def shared(self, own: SearchSpace, aims: _Floats, others: Sequence[Policy]) -> Constraint:
        """What keeps some decisions within aims of their own, and so that the others can do the rest.

        Where they cannot go as far as their aims, they go as far as they can.

        Args:
            own: The decisions.
            aims: What may be left in each metric where the others change nothing.
            others: How far the others are counted on: the first of these policies that can be.

        Raises:
            InfeasibleError: If none can be.
        """
        now = self._beside(own, self.space.default())
        aims = np.maximum(aims, [now.least(own, metric) for metric in range(len(self.metrics))])
        for policy in others:
            rest = self._beside(own, policy)
            with contextlib.suppress(InfeasibleError):
                return self._bounded(own, (rest, self.limits), (now, aims))
        # Of several metrics not all can be as low as each of them alone; what counts is the end.
        return self._bounded(own, (rest, self.limits))

    def _beside(self, own: SearchSpace, others: Policy) -> _Beside:
        columns = [index for index, decision in enumerate(self.space) if decision.key in own.by_key]
        return _Beside(self.costs, columns, self.space.encode(others))

    def _bounded(self, own: SearchSpace, *bounds: tuple[_Beside, _Floats]) -> Constraint:
        """What keeps some decisions within limits, whatever the others are counted on for."""

        def costs(indices: _Indices) -> _Floats:
            return np.hstack([beside.at(indices) for beside, _ in bounds])

        def of_policies(policies: Sequence[Policy]) -> _Floats:
            return costs(np.array([own.encode(policy) for policy in policies]))

        limits = np.concatenate([limit for _, limit in bounds])
        return Constraint(own, of_policies, limits, list(self.metrics) * len(bounds), by_index=costs)
