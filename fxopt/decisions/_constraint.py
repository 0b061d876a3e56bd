"""Keeping policies within limits: the one mechanism that decides what is feasible.

At each decision, given those before it, the choices that cannot be completed within the limits are
masked: each is costed with the cheapest choices for all decisions that are still open. Walking the
decisions under that mask always ends within the limits, whatever the cost function looks like, because
the cheapest completion itself stays allowed at every step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fxopt.decisions._budget import format_quantity
from fxopt.decisions._decision import Choice, Key
from fxopt.decisions._decrease import decrease
from fxopt.decisions._policy import Policy
from fxopt.decisions._space import SearchSpace
from fxopt.errors import BudgetError, InfeasibleError, PolicyError, SearchError

__all__ = ["Constraint", "Enforce", "check_enforce"]

Enforce: TypeAlias = Literal["mask", "decrease"]
"""How a policy is brought within the limits."""

_Floats: TypeAlias = npt.NDArray[np.float64]
_Indices: TypeAlias = npt.NDArray[np.intp]

_FIRST_STRIDE = 8
_ENUMERABLE = 4096
_POWERS = (1, 2, 4, 8, 16, 32)


def check_enforce(enforce: str) -> None:
    """Refuse another way of keeping a budget.

    Raises:
        SearchError: If ``enforce`` is none of :data:`Enforce`.
    """
    known = get_args(Enforce)
    if enforce not in known:
        raise SearchError(f"A budget is enforced by {' or by '.join(map(repr, known))}, not by {enforce!r}.")


class Constraint:
    """Upper limits on what a policy costs.

    The cheapest policy is found by cost, not by order, since fewer bits or channels are not always
    cheaper: coordinate descent over the choices, exact for one metric that is a sum over decisions. With
    several metrics it descends on a norm of the metrics relative to their limits that weighs the worst
    more and more. There, and for costs that are not sums, the mask may be stricter than need be but never
    too lax. Before it calls a space of up to 4096 policies infeasible, it tries them all.

    Args:
        space: The search space.
        cost: Costs of policies, shape ``(n,)`` or ``(n, metrics)``; called with batches of complete
            policies. It has to give a policy the same cost in every batch.
        by_index: The same costs of policies given by their choice indices, shape ``(n, decisions)``; None to
            make policies of them. Walks cost many policies, and by index most of their time is saved.
        limits: The upper limit of each metric, in the units of ``cost``; above zero and finite.
        metrics: The metrics' names, for messages.

    Attributes:
        space: The search space.
        limits: The limits, shape ``(metrics,)``, read-only.
        metrics: The metrics' names.

    Raises:
        BudgetError: If the limits are malformed.
        InfeasibleError: If even the cheapest policy is over; says of which metric, by how much, and the
            least that is possible.
        SearchError: If ``cost`` returns another shape or NaN.
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: Callable[[Sequence[Policy]], npt.NDArray[np.float64]],
        limits: npt.ArrayLike,
        metrics: Sequence[str] = (),
        *,
        by_index: Callable[[_Indices], npt.NDArray[np.float64]] | None = None,
    ) -> None:
        self.space = space
        self._cost = cost
        self._by_index = by_index
        self.limits = np.atleast_1d(np.array(limits, dtype=np.float64))
        self.limits.setflags(write=False)
        self.metrics = tuple(metrics) or _default_names(self.limits.size)
        if self.limits.ndim != 1 or not self.limits.size or not np.isfinite(self.limits).all():
            raise BudgetError(f"Limits are one finite number per metric, got {self.limits.tolist()}.")
        if (self.limits <= 0).any():
            raise BudgetError(
                f"Limits are above zero, got {dict(zip(self.metrics, self.limits.tolist(), strict=False))}."
            )
        if len(self.metrics) != self.limits.size:
            raise BudgetError(
                f"There are {self.limits.size} limits and {len(self.metrics)} metrics; give one name each."
            )
        self._starts = np.concatenate(([0], np.cumsum(space.sizes)))
        self._completions = self._find_completions()

    def costs(self, policies: Sequence[Policy]) -> _Floats:
        """The costs of ``policies``, shape ``(n, metrics)``.

        Raises:
            SearchError: If the cost function returned another shape or NaN.
        """
        if not policies:
            return np.empty((0, self.limits.size))
        table = self._checked_costs(self._cost(policies), len(policies))
        if np.isnan(table).any():
            row, column = np.argwhere(np.isnan(table))[0]
            raise SearchError(f"The cost function returned NaN {self.metrics[column]} for {policies[row]!r}.")
        return table

    def costs_at(self, indices: npt.NDArray[np.intp]) -> _Floats:
        """The costs of policies given by choice indices of shape ``(n, decisions)``, shape ``(n, metrics)``.

        Raises:
            SearchError: If the cost function returned another shape or NaN.
            PolicyError: If an index is out of range.
        """
        if self._by_index is None or not len(indices):
            return self.costs(self.space.decode_all(indices))
        table = self._checked_costs(self._by_index(indices), len(indices))
        if np.isnan(table).any():
            row, column = np.argwhere(np.isnan(table))[0]
            policy = self.space.decode(indices[row])
            raise SearchError(f"The cost function returned NaN {self.metrics[column]} for {policy!r}.")
        return table

    def _checked_costs(self, found: npt.ArrayLike, policies: int) -> _Floats:
        costs = np.asarray(found, dtype=np.float64)
        table = costs[:, np.newaxis] if costs.ndim == 1 else costs
        if table.shape != (policies, self.limits.size):
            raise SearchError(
                f"The cost function returned the shape {costs.shape} for {policies} policies and "
                f"{self.limits.size} metrics; it has to be (policies, metrics)."
            )
        return table

    def feasible(self, policies: Sequence[Policy]) -> npt.NDArray[np.bool_]:
        """Which of ``policies`` are within all limits, shape ``(n,)``; what they leave out is default."""
        complete = [policy if len(policy) == len(self.space) else self.space.complete(policy) for policy in policies]
        return np.asarray((self.costs(complete) <= self.limits).all(axis=1))

    def cheapest(self) -> Policy:
        """The cheapest policy: the one whose worst metric is lowest relative to its limit."""
        return self.space.decode(self._completions[0])

    def mask(
        self, prefix: Mapping[Key, Choice] | Sequence[int] | _Indices, i: int, order: Sequence[int] | None = None
    ) -> npt.NDArray[np.bool_]:
        """Which choices of decision ``i`` can be completed within the limits.

        Args:
            prefix: What is decided already: a policy of those decisions alone, or their choice indices in
                the order of the walk.
            i: The index in the space of the decision to take.
            order: The walk, a permutation of the decisions' indices; the order of the space if None. Only
                a prefix of choice indices needs it.

        Returns:
            A truth value per choice. If the prefix was itself taken under the mask, at least one is true.

        Raises:
            PolicyError: If the prefix does not fit the space.
        """
        columns, choices = self._decided(prefix, self._checked_orders(order, 1)[0])
        state = self._completions.copy()
        state[:, columns] = choices
        return self._allowed_choices([state], [i])[0]

    def reach(self, row: _Indices, start: int = 0) -> int:
        """How many decisions can be taken as in ``row``, in the order of the space, before the mask forbids one.

        Args:
            row: Choice indices, shape ``(decisions,)``; those before ``start`` were taken under the mask.
            start: Where to begin.

        Returns:
            The index of the first decision whose choice is masked, or the number of decisions.
        """
        ahead = np.arange(start, len(self.space))
        if not len(ahead):
            return len(self.space)
        taken = np.arange(len(self.space)) <= ahead[:, np.newaxis, np.newaxis]
        within = self._within(np.where(taken, row, self._completions).reshape(-1, len(self.space)))
        stuck = np.flatnonzero(~_any(within.reshape(len(ahead), -1), axis=1))
        return start + int(stuck[0]) if len(stuck) else len(self.space)

    def project(self, policy: Mapping[Key, Choice], order: Sequence[int] | None = None) -> Policy:
        """The feasible policy that a walk over the decisions makes of ``policy``.

        A feasible policy is returned as it is. Otherwise each decision keeps the wanted choice if the mask
        allows it, and else takes the allowed choice nearest in index (the lower of two equally near).

        Args:
            policy: The policy wanted; what it leaves out is default.
            order: The order in which to decide; the order of the space if None. Early decisions get what
                they want, late ones make room.

        Returns:
            A complete policy within the limits.

        Raises:
            PolicyError: If the policy does not fit the space, or the order is no permutation.
        """
        return self.project_all([policy], order)[0]

    def project_all(
        self,
        policies: Sequence[Mapping[Key, Choice]],
        order: Sequence[int] | _Indices | None = None,
        *,
        enforce: Enforce = "mask",
    ) -> list[Policy]:
        """Project many policies at once, with few and large calls of the cost function.

        Args:
            policies: The policies wanted.
            order: One order for all of them, or one for each, shape ``(policies, decisions)``.
            enforce: ``"mask"`` walks the decisions under the mask; ``"decrease"`` lowers all of them step by step,
                the last of the order first, as HAQ does, and walks only if the lowest is still over.

        Returns:
            What :meth:`project` makes of each, or the policies that HAQ's decrease makes of them.

        Raises:
            PolicyError: If a policy does not fit the space, or an order is no permutation.
            SearchError: If ``enforce`` is neither of the two.
        """
        check_enforce(enforce)
        if not policies:
            return []
        orders = self._checked_orders(order, len(policies))
        wanted = np.stack([self.space.encode(policy) for policy in policies])
        if enforce == "decrease":
            lowered = [decrease(self.space, self._within, *pair) for pair in zip(wanted, orders, strict=True)]
            wanted = np.array(lowered, dtype=np.intp).reshape(wanted.shape)
        over = np.flatnonzero(~self._within(wanted))
        wanted[over] = self._walk_all(wanted[over], orders[over])
        # A cost that is a rounding error off from batch to batch must not let a policy slip through.
        wanted[~self._within(wanted)] = self._completions[0]
        return self.space.decode_all(wanted)

    # The walk.

    def _walk_all(self, wanted: _Indices, orders: _Indices) -> _Indices:
        walks = [_Walk(row, order, self._completions.copy()) for row, order in zip(wanted, orders, strict=True)]
        active = walks
        while active:
            self._advance(active)
            stuck = [walk for walk in active if walk.stuck]
            masks = self._allowed_choices([walk.state for walk in stuck], [walk.column for walk in stuck])
            for walk, allowed in zip(stuck, masks, strict=True):
                walk.give_way(allowed)
            active = [walk for walk in active if walk.position < len(self.space)]
        return np.array([walk.state[0] for walk in walks], dtype=np.intp).reshape(wanted.shape)

    def _advance(self, walks: Sequence[_Walk]) -> None:
        """Take wanted choices, several decisions ahead at once, up to the first that is not allowed."""
        ladders = [walk.ladder() for walk in walks]
        within = self._within(np.concatenate(ladders).reshape(-1, len(self.space)))
        start = 0
        for walk, ladder in zip(walks, ladders, strict=True):
            steps, completions = ladder.shape[:2]
            stop = start + steps * completions
            walk.take(_any(within[start:stop].reshape(steps, completions), axis=1))
            start = stop

    def _allowed_choices(self, states: Sequence[_Indices], columns: Sequence[int]) -> list[npt.NDArray[np.bool_]]:
        """The mask over the choices of ``columns[k]`` with the rest as in ``states[k]``, in one costing."""
        if not states:
            return []
        sizes = [int(self.space.sizes[column]) for column in columns]
        blocks = []
        for state, column, size in zip(states, columns, sizes, strict=True):
            block = np.repeat(state, size, axis=0)
            block[:, column] = np.tile(np.arange(size), len(state))
            blocks.append(block)
        within = np.split(self._within(np.concatenate(blocks)), np.cumsum([len(block) for block in blocks])[:-1])
        return [_any(part.reshape(-1, size), axis=0) for part, size in zip(within, sizes, strict=True)]

    def _within(self, indices: _Indices) -> npt.NDArray[np.bool_]:
        return np.asarray((self.costs_at(indices) <= self.limits).all(axis=1))

    def _checked_orders(self, order: Sequence[int] | _Indices | None, policies: int) -> _Indices:
        decisions = np.arange(len(self.space))
        walks = decisions if order is None else np.asarray(order, dtype=np.intp)
        if walks.shape not in {decisions.shape, (policies, len(decisions))} or (np.sort(walks) != decisions).any():
            raise PolicyError(f"An order is a permutation of the {len(decisions)} decisions' indices.")
        return np.broadcast_to(walks, (policies, len(decisions)))

    def _decided(
        self, prefix: Mapping[Key, Choice] | Sequence[int] | _Indices, order: _Indices
    ) -> tuple[_Indices, _Indices]:
        if isinstance(prefix, Mapping):
            indices = self.space.encode(prefix)
            columns = np.array([j for j, d in enumerate(self.space) if d.key in prefix], dtype=np.intp)
            return columns, indices[columns]
        choices = np.asarray(prefix, dtype=np.intp)
        columns = order[: len(choices)]
        if len(columns) != len(choices) or ((choices < 0) | (choices >= self.space.sizes[columns])).any():
            raise PolicyError(f"The prefix {choices.tolist()} does not hold choice indices of the first decisions.")
        return columns, choices

    # The cheapest completions.

    def _find_completions(self) -> _Indices:
        """Policies whose choices complete a prefix cheaply, the best first; at least that one is feasible."""
        default = self.space.encode(self.space.default())
        metrics = range(self.limits.size)
        found = [self._descend(default, _Metric(m)) for m in metrics]
        least = np.array([self.costs_at(row[np.newaxis])[0, m] for m, row in zip(metrics, found, strict=True)])
        if len(metrics) > 1:
            found.append(self._balanced(default))
        candidates, within = self._ranked(np.unique(np.stack(found), axis=0))
        if not within and self.space.policies <= _ENUMERABLE:
            every = np.array(list(itertools.product(*map(range, self.space.sizes))), dtype=np.intp)
            least = self.costs_at(every).min(axis=0)
            ranked, within = self._ranked(every)
            candidates = ranked[:1]
        if not within:
            raise self._infeasible(least, self.costs_at(candidates[:1])[0])
        return candidates

    def _ranked(self, candidates: _Indices) -> tuple[_Indices, bool]:
        """The candidates by their worst metric, feasible ones first, and whether there is a feasible one."""
        within = self._within(candidates)
        worst = self._objective(candidates, _worst)
        return candidates[np.lexsort((worst, ~within))], bool(within.any())

    def _balanced(self, row: _Indices) -> _Indices:
        """The policy whose worst metric is lowest, approached by norms that weigh it more and more."""
        rows = []
        for power in _POWERS:
            row = self._descend(row, _Norm(power))
            rows.append(row)
        rows.append(self._descend(row, _worst))
        ranked, _ = self._ranked(np.stack(rows))
        return np.asarray(ranked[0])

    def _descend(self, row: _Indices, objective: Callable[[_Floats], _Floats]) -> _Indices:
        """Coordinate descent: in each round the most promising one, two, four, ... or all decisions move.

        All at once is exact for a sum over decisions, in one round.
        """
        value = self._objective(row[np.newaxis], objective)[0]
        for _ in range(int(self._starts[-1])):
            values = self._objective(self._deviations(row), objective)
            steps = [(values[start:stop].min(), j) for j, (start, stop) in enumerate(itertools.pairwise(self._starts))]
            better = [j for least, j in sorted(steps) if least < value]
            counts = sorted({min(2**k, len(better)) for k in range(len(better).bit_length() + 1)} - {0})
            rows = np.repeat(row[np.newaxis], len(counts), axis=0)
            for candidate, count in zip(rows, counts, strict=True):
                for j in better[:count]:
                    candidate[j] = values[self._starts[j] : self._starts[j + 1]].argmin()
            reached = self._objective(rows, objective)
            if not len(reached) or reached.min() >= value:
                break
            row, value = rows[reached.argmin()], reached.min()
        return row

    def _deviations(self, row: _Indices) -> _Indices:
        """``row`` with each decision in turn set to each of its choices."""
        rows = np.repeat(row[np.newaxis], self._starts[-1], axis=0)
        for j, (start, stop) in enumerate(itertools.pairwise(self._starts)):
            rows[start:stop, j] = np.arange(stop - start)
        return rows

    def _objective(self, indices: _Indices, objective: Callable[[_Floats], _Floats]) -> _Floats:
        return objective(self.costs_at(indices) / self.limits)

    def _infeasible(self, least: _Floats, nearest: _Floats) -> InfeasibleError:
        alone = bool((least > self.limits).any())
        reached = least if alone else nearest
        m = int((reached / self.limits).argmax())
        metric, limit, value = self.metrics[m], float(self.limits[m]), float(reached[m])
        shown, bound = format_quantity(metric, value), format_quantity(metric, limit)
        if value < 10 * limit:
            over = f"over the budget of {bound} by {value / limit - 1:.1%}"
        else:
            over = f"{value / limit:,.0f} times the budget of {bound}"
        if alone:
            message = f"The least possible {metric} is {shown}, {over}."
        else:
            names = ", ".join(self.metrics)
            message = (
                f"No policy was found that meets the budgets of {names} together, though each can be met alone: "
                f"the nearest has a {metric} of {shown}, {over}."
            )
        enough = format_quantity(metric, _rounded_up(value))
        advice = f"Raise the {metric} budget to {enough}, or offer more choices."
        return InfeasibleError(f"{message} {advice}", metric=metric, limit=limit, least=value)


@dataclass
class _Walk:
    """One policy on its way through the decisions.

    Attributes:
        wanted: The choices wanted.
        order: The order in which the decisions are taken.
        state: What is decided, followed by each of the cheapest completions, ``(completions, decisions)``.
        position: How many decisions are taken.
        stride: How many decisions ahead to look.
        stuck: Whether the wanted choice at ``position`` is not allowed.
    """

    wanted: _Indices
    order: _Indices
    state: _Indices
    position: int = 0
    stride: int = _FIRST_STRIDE
    stuck: bool = False

    @property
    def column(self) -> int:
        """The index of the decision to take next."""
        return int(self.order[self.position])

    def ladder(self) -> _Indices:
        """The states after taking one, two, ... more wanted choices, ``(steps, completions, decisions)``."""
        ahead = self.order[self.position : self.position + self.stride]
        steps = np.repeat(self.state[np.newaxis], len(ahead), axis=0)
        for step, column in enumerate(ahead):
            steps[step:, :, column] = self.wanted[column]
        return steps

    def take(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Take the wanted choices up to the first that is not allowed."""
        taken = len(allowed) if allowed.all() else int(np.argmin(allowed))
        columns = self.order[self.position : self.position + taken]
        self.state[:, columns] = self.wanted[columns]
        self.position += taken
        self.stuck = taken < len(allowed)
        self.stride = max(1, self.stride // 2) if self.stuck else self.stride * 2

    def give_way(self, allowed: npt.NDArray[np.bool_]) -> None:
        """Take the allowed choice nearest to the wanted one."""
        column = self.column
        indices = np.flatnonzero(allowed)
        nearest = indices[np.abs(indices - self.wanted[column]).argmin()] if len(indices) else self.state[0, column]
        self.state[:, column] = nearest
        self.position += 1
        self.stuck = False


def _rounded_up(value: float) -> float:
    """``value`` rounded up to the four digits that messages show."""
    if not (math.isfinite(value) and value > 0):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit


@dataclass(frozen=True)
class _Metric:
    """One metric of costs relative to their limits."""

    index: int

    def __call__(self, ratios: _Floats) -> _Floats:
        return ratios[:, self.index]


@dataclass(frozen=True)
class _Norm:
    """The p-norm over the metrics of costs relative to their limits: between their sum and the worst."""

    power: int

    def __call__(self, ratios: _Floats) -> _Floats:
        top = ratios.max(axis=1)
        scale = np.where(np.isfinite(top) & (top > 0), top, 1.0)
        return np.asarray(top * ((ratios / scale[:, np.newaxis]) ** self.power).sum(axis=1) ** (1 / self.power))


def _worst(ratios: _Floats) -> _Floats:
    return np.asarray(ratios.max(axis=1))


def _any(table: npt.NDArray[np.bool_], axis: int) -> npt.NDArray[np.bool_]:
    return np.asarray(table.any(axis=axis))


def _default_names(metrics: int) -> tuple[str, ...]:
    return ("cost",) if metrics == 1 else tuple(f"cost {m}" for m in range(metrics))
