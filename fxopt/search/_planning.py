"""The best policy within a budget, by what each choice is thought to be worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fxopt.decisions import AdditiveCosts, Constraint, Policy, SearchSpace
from fxopt.errors import InfeasibleError, SearchError
from fxopt.search.solver import solve, solve_lagrangian

__all__ = ["best_policy"]

_LARGE = 200_000
_RELINEARIZED = 3


def best_policy(
    space: SearchSpace,
    constraint: Constraint | None,
    worth: Sequence[npt.NDArray[np.float64]],
    around: Sequence[int] | npt.NDArray[np.intp],
    project: Callable[[Policy, npt.NDArray[np.intp]], Policy],
    costs: AdditiveCosts | None = None,
) -> Policy:
    """The policy of the highest sum within the limits, or one near it where the cost is no sum.

    The cost is linearized at a policy, then anew at each solution.

    Args:
        space: What can be decided.
        constraint: What a policy may cost; None for no limit.
        worth: What each choice of each decision adds to the score.
        around: Choice indices of the policy around which the cost is linearized first.
        project: Brings a policy within the limits, given the order in which decisions get what they want.
        costs: The cost linearized already, to leave it at that; None to linearize it here.
    """
    if constraint is None or not len(worth):
        return space.decode([int(table.argmax()) for table in worth])
    losses = [-table for table in worth]
    order = np.argsort([-float(np.ptp(table)) for table in worth], kind="stable")
    row = np.array(around, dtype=np.intp)
    found: list[tuple[float, Policy]] = []
    for _ in range(_RELINEARIZED):
        sums = costs or AdditiveCosts.around(space, constraint.costs_at, row)
        solver = solve if sum(map(len, losses)) <= _LARGE else solve_lagrangian
        try:
            row = solver(losses, sums.tables, constraint.limits - sums.constant).indices
        except (InfeasibleError, SearchError):
            row = space.encode(constraint.cheapest())
        policy = project(space.decode(row), order)
        value = sum(float(table[i]) for table, i in zip(worth, space.encode(policy), strict=True))
        found.append((value, policy))
        if costs is not None or np.allclose(
            constraint.costs_at(row[np.newaxis]), sums.at(row[np.newaxis]), rtol=1e-9, atol=0.0
        ):
            break
    return max(found, key=lambda entry: entry[0])[1]
