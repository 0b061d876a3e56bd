"""Costs that are sums over decisions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fxopt.decisions._decision import Choice, Key
from fxopt.decisions._space import SearchSpace
from fxopt.errors import SearchError

__all__ = ["AdditiveCosts"]


class AdditiveCosts:
    """What each choice costs by itself, in one table a decision; a policy costs the sum.

    Such are the look-up tables of a device that runs layer after layer, and the first-order part of any other
    cost. A constraint takes both forms of the cost::

        costs = AdditiveCosts(space, tables)
        constraint = Constraint(space, costs, limits, by_index=costs.at)

    Args:
        space: The search space.
        tables: For each decision the costs of its choices, shape ``(choices,)`` or ``(choices, metrics)``.
        constant: What every policy costs besides, a number or one for each metric.

    Attributes:
        space: The search space.
        tables: The tables, each of shape ``(choices, metrics)``, read-only.
        constant: What every policy costs besides, shape ``(metrics,)``.

    Raises:
        SearchError: If a table does not fit its decision, the tables differ in their metrics, or a cost is not finite.
    """

    def __init__(self, space: SearchSpace, tables: Sequence[npt.ArrayLike], constant: npt.ArrayLike = 0.0) -> None:
        self.space = space
        arrays = [np.array(table, dtype=np.float64) for table in tables]
        arrays = [table[:, np.newaxis] if table.ndim == 1 else table for table in arrays]
        metrics = {table.shape[1] for table in arrays if table.ndim == 2}
        fits = [table.shape[0] for table in arrays if table.ndim == 2] == space.sizes.tolist()
        if not fits or len(metrics) > 1:
            raise SearchError(
                f"Additive costs need one table a decision, of the shapes {space.sizes.tolist()} by the number of "
                f"metrics; got {[table.shape for table in arrays]}."
            )
        width = metrics.pop() if metrics else np.size(constant)
        self._flat = np.concatenate(arrays) if arrays else np.zeros((0, width))
        self.constant = np.broadcast_to(np.asarray(constant, dtype=np.float64), (width,)).copy()
        if not (np.isfinite(self._flat).all() and np.isfinite(self.constant).all()):
            raise SearchError("Additive costs are finite numbers; leave choices that are impossible out of the space.")
        self._flat.setflags(write=False)
        self._starts = np.concatenate(([0], np.cumsum(space.sizes))).astype(np.intp)
        self.tables = tuple(self._flat[start:stop] for start, stop in itertools.pairwise(self._starts))

    @classmethod
    def around(
        cls, space: SearchSpace, costs_at: Callable[[npt.NDArray[np.intp]], npt.NDArray[np.float64]], row: npt.ArrayLike
    ) -> AdditiveCosts:
        """The additive part of a cost at a policy: what each single change of it costs.

        Args:
            space: The search space.
            costs_at: Costs by choice indices, shape ``(n, metrics)``, as ``Constraint.costs_at``.
            row: The policy's choice indices, shape ``(decisions,)``.

        Returns:
            Costs that are exact at the policy and at every single change of it, and everywhere if the cost is a sum.
        """
        base = np.asarray(row, dtype=np.intp)
        starts = np.concatenate(([0], np.cumsum(space.sizes)))
        rows = np.repeat(base[np.newaxis], starts[-1] + 1, axis=0)
        for j, (start, stop) in enumerate(itertools.pairwise(starts)):
            rows[start:stop, j] = np.arange(stop - start)
        costs = np.asarray(costs_at(rows), dtype=np.float64)
        tables = [costs[start:stop] - costs[-1] for start, stop in itertools.pairwise(starts)]
        return cls(space, tables, costs[-1])

    def __call__(self, policies: Sequence[Mapping[Key, Choice]]) -> npt.NDArray[np.float64]:
        """Costs of policies, shape ``(n, metrics)``."""
        rows = np.array([self.space.encode(policy) for policy in policies], dtype=np.intp)
        return self.at(rows.reshape(len(policies), len(self.space)))

    def at(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Costs by choice indices of shape ``(n, decisions)``, shape ``(n, metrics)``."""
        parts = self._flat[indices + self._starts[:-1]]
        return np.asarray(self.constant + parts.sum(axis=1), dtype=np.float64)
