"""Choosing one entry from each of many tables so that the losses are least and the costs within limits.

Where losses and costs are sums over decisions, the best policy needs no search: it is the solution of a knapsack
problem with one choice a decision. :func:`solve` finds it exactly, :func:`solve_lagrangian` nearly, for tens of
thousands of decisions, and says how far it may be from the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from fxopt.errors import InfeasibleError, SearchError

__all__ = ["Solution", "solve", "solve_lagrangian"]

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.intp]

_CUTS = 200
_MOVES = 2000
_TIGHTENINGS = 6
_STATES = 400_000
_ROUNDING = 1e-9
_SLACK = 1e-12


@dataclass(frozen=True)
class Solution:
    """One choice for each decision.

    Attributes:
        indices: The index of each decision's choice, shape ``(decisions,)``.
        loss: The sum of their losses.
        costs: The sums of their costs, shape ``(metrics,)``; within the limits.
        bound: No solution has a loss below this.
    """

    indices: _Ints
    loss: float
    costs: _Floats
    bound: float

    @property
    def gap(self) -> float:
        """How far the loss may be above the optimum."""
        return max(0.0, self.loss - self.bound)


def solve(losses: Sequence[npt.ArrayLike], costs: Sequence[npt.ArrayLike], limits: npt.ArrayLike) -> Solution:
    """The choices of least loss within the limits, exactly.

    The Lagrangian relaxation gives a bound and a solution near it. Every choice that the two prove to be in no better
    solution is left out (by its reduced loss). What remains, a few choices for a few decisions, is gone through
    decision by decision, with all partial solutions dropped that cannot end as the best; if those are too many, HiGHS
    solves it as an integer program.

    Args:
        losses: For each decision the losses of its choices, shape ``(choices,)``.
        costs: For each decision the costs of its choices, shape ``(choices,)`` or ``(choices, metrics)``.
        limits: The largest sum of each metric.

    Returns:
        The solution; its gap is that of the arithmetic, about 1e-9 of the losses' range.

    Raises:
        SearchError: If the tables do not fit each other or hold what is not finite, or HiGHS fails.
        InfeasibleError: If no choice of all is within the limits.
    """
    tables = _Tables.of(losses, costs, limits)
    relaxed = _relax(tables)
    best = _feasible(tables, relaxed)
    upper = np.inf if best is None else tables.loss(best)
    if best is not None and upper - relaxed.bound <= tables.rounding:
        return tables.solution(best, relaxed.bound)
    reduced = tables.loss_of + tables.cost_of @ relaxed.multipliers
    reduced -= np.minimum.reduceat(reduced, tables.starts)[tables.owner]
    kept = relaxed.bound + reduced <= upper + tables.rounding
    done, found = _enumerated(tables, kept, reduced, upper - relaxed.bound + tables.rounding)
    if not done:
        found = _integer_program(tables, kept)
    if found is None:
        if best is None:
            raise tables.infeasible()
        return tables.solution(best, relaxed.bound)
    if best is not None and upper < tables.loss(found):
        found = best
    loss = tables.loss(found)
    return tables.solution(found, max(relaxed.bound, loss - tables.rounding))


def solve_lagrangian(
    losses: Sequence[npt.ArrayLike], costs: Sequence[npt.ArrayLike], limits: npt.ArrayLike
) -> Solution:
    """Choices within the limits of nearly the least loss, and a bound on how near, for any number of decisions.

    A price for each metric is sought at which every decision's best choice by itself (loss plus price times cost) just
    meets the limits; what room is left is filled by single moves. For one metric the gap is at most the loss of one
    step of one decision.

    Args:
        losses: As for :func:`solve`.
        costs: As for :func:`solve`.
        limits: As for :func:`solve`.

    Returns:
        The solution, with its bound.

    Raises:
        SearchError: If the tables do not fit each other or hold what is not finite, or none within several limits
            was found though each can be met alone; :func:`solve` decides whether there is one.
        InfeasibleError: If no choice is within one of the limits.
    """
    tables = _Tables.of(losses, costs, limits)
    relaxed = _relax(tables)
    best = _feasible(tables, relaxed)
    if best is None:
        raise SearchError("No choices within all limits were found; solve() tells whether there are any.")
    return tables.solution(best, relaxed.bound)


@dataclass(frozen=True)
class _Tables:
    """All choices of all decisions, one after the other; costs relative to the limits, less one in all.

    Attributes:
        starts: Where each decision's choices begin.
        owner: The decision of each choice.
        loss_of: The loss of each choice.
        cost_of: The cost of each choice in units of the limits, shape ``(choices, metrics)``.
        limits: The limits, in the caller's units.
        room: What the costs of all choices taken may sum to, in units of the limits.
        scale: What a unit of ``cost_of`` is worth, shape ``(metrics,)``.
        rounding: A difference of losses that is one of arithmetic.
    """

    starts: _Ints
    owner: _Ints
    loss_of: _Floats
    cost_of: _Floats
    limits: _Floats
    room: _Floats
    scale: _Floats
    rounding: float

    @classmethod
    def of(cls, losses: Sequence[npt.ArrayLike], costs: Sequence[npt.ArrayLike], limits: npt.ArrayLike) -> _Tables:
        bounds = np.atleast_1d(np.asarray(limits, dtype=np.float64))
        rows = [np.asarray(table, dtype=np.float64) for table in losses]
        arrays = [np.asarray(table, dtype=np.float64) for table in costs]
        many = [table[:, np.newaxis] if table.ndim == 1 else table for table in arrays]
        sizes = [len(row) if row.ndim == 1 else 0 for row in rows]
        wanted = [(size, bounds.size) for size in sizes]
        if not rows or min(sizes) < 1 or [table.shape for table in many] != wanted:
            raise SearchError(
                f"Each decision needs a loss and {bounds.size} costs for each of its choices; got losses of the shapes "
                f"{[row.shape for row in rows][:5]} and costs of {[table.shape for table in many][:5]}."
            )
        loss_of, cost_of = np.concatenate(rows), np.concatenate(many)
        if not all(np.isfinite(array).all() for array in (loss_of, cost_of, bounds)):
            raise SearchError("Losses, costs and limits are finite; leave choices that are impossible out.")
        scale = np.maximum(np.abs(bounds), np.abs(cost_of).max(axis=0))
        scale[scale == 0.0] = 1.0
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.intp)
        owner = np.repeat(np.arange(len(sizes), dtype=np.intp), sizes)
        spread = float(np.abs(loss_of).max(initial=0.0))
        return cls(
            starts, owner, loss_of, cost_of / scale, bounds, bounds / scale, scale, _ROUNDING * max(spread, 1e-30)
        )

    def loss(self, flat: _Ints) -> float:
        return float(self.loss_of[flat].sum())

    def used(self, flat: _Ints) -> _Floats:
        return np.asarray(self.cost_of[flat].sum(axis=0))

    def excess(self, flat: _Ints) -> _Floats:
        """By how much the limits are passed, in the caller's units and arithmetic."""
        return np.asarray((self.cost_of[flat] * self.scale).sum(axis=0) - self.limits) / self.scale

    def fits(self, flat: _Ints) -> bool:
        return bool((self.excess(flat) <= _SLACK).all())

    def least(self, values: _Floats) -> _Ints:
        """For each decision its choice of least value, the first of equal ones."""
        least = np.minimum.reduceat(values, self.starts)
        hits = np.flatnonzero(values == least[self.owner])
        return np.asarray(hits[np.unique(self.owner[hits], return_index=True)[1]], dtype=np.intp)

    def solution(self, flat: _Ints, bound: float) -> Solution:
        loss = self.loss(flat)
        costs = np.asarray((self.cost_of[flat] * self.scale).sum(axis=0))
        return Solution(flat - self.starts, loss, costs, min(bound, loss))

    def infeasible(self) -> InfeasibleError:
        lows = [np.minimum.reduceat(self.cost_of[:, m], self.starts).sum() for m in range(self.limits.size)]
        least = np.array(lows) * self.scale
        over = np.flatnonzero(least > self.limits)
        if not len(over):
            return InfeasibleError(
                "No choices meet all limits together, though each limit can be met alone; raise one of them.",
                metric="cost 0",
                limit=float(self.limits[0]),
                least=float(least[0]),
            )
        m = int(over[0])
        return InfeasibleError(
            f"The least possible sum of cost {m} is {least[m]:.6g}, over the limit of {self.limits[m]:.6g}; raise it.",
            metric=f"cost {m}",
            limit=float(self.limits[m]),
            least=float(least[m]),
        )


@dataclass(frozen=True)
class _Relaxed:
    """The Lagrangian relaxation at its best prices.

    Attributes:
        multipliers: The price of each metric, in losses per unit of the limits.
        bound: The value of the relaxation, below every solution's loss.
    """

    multipliers: _Floats
    bound: float


def _relax(tables: _Tables) -> _Relaxed:
    """Raise the bound by cutting planes until its model is met; for one metric the cuts meet in a point."""
    metrics = tables.room.size
    lows = np.array([np.minimum.reduceat(tables.cost_of[:, m], tables.starts).sum() for m in range(metrics)])
    if (lows * tables.scale > tables.limits + _ROUNDING * tables.scale).any():
        raise tables.infeasible()
    cuts: list[tuple[float, _Floats]] = []
    prices, best = np.zeros(metrics), _Relaxed(np.zeros(metrics), -np.inf)
    for _ in range(_CUTS):
        taken = tables.least(tables.loss_of + tables.cost_of @ prices)
        loss, slope = tables.loss(taken), tables.used(taken) - tables.room
        value = loss + float(slope @ prices)
        if value > best.bound:
            best = _Relaxed(prices, value)
        if (slope <= 0.0).all() and not prices.any():
            break
        cuts.append((loss, slope))
        step = _between(cuts) if metrics == 1 else _highest(cuts, tables)
        if step is None or step[1] - best.bound <= tables.rounding * 1e-2 or np.array_equal(step[0], prices):
            break
        prices = step[0]
    return best


def _between(cuts: Sequence[tuple[float, _Floats]]) -> tuple[_Floats, float] | None:
    """Where the lowest rising and the lowest falling cut meet, and their value there."""
    rising = [(float(slope[0]), loss) for loss, slope in cuts if slope[0] > 0.0]
    falling = [(float(slope[0]), loss) for loss, slope in cuts if slope[0] <= 0.0]
    if not falling:
        # No cut falls yet: so high a price that the cheapest choices are taken.
        return np.array([max(1.0, 1e3 * max(abs(loss) for loss, _ in cuts)) * 16.0 ** len(cuts)]), np.inf
    (up, high), (down, low) = min(rising), max(falling)
    price = (low - high) / (up - down)
    return np.array([max(price, 0.0)]), high + up * price


def _highest(cuts: Sequence[tuple[float, _Floats]], tables: _Tables) -> tuple[_Floats, float] | None:
    """The prices at which the least of the cuts is highest, and its value there."""
    metrics = tables.room.size
    ceiling = 1e3 * max(float(np.abs(tables.loss_of).max()), 1e-30) / max(float(np.abs(tables.cost_of).max()), 1e-30)
    slopes = np.array([np.append(-slope, 1.0) for _, slope in cuts])
    bounds = [(0.0, ceiling)] * metrics + [(None, None)]
    found = linprog([*[0.0] * metrics, -1.0], slopes, [loss for loss, _ in cuts], bounds=bounds, method="highs")
    if found.x is None or found.fun is None:
        return None
    return np.maximum(found.x[:metrics], 0.0), float(-found.fun)


def _feasible(tables: _Tables, relaxed: _Relaxed) -> _Ints | None:
    """A solution within the limits near the relaxed one: prices are raised until it fits, then room is filled."""
    start = relaxed.multipliers if relaxed.multipliers.any() else np.ones(tables.room.size)
    if tables.fits(tables.least(tables.loss_of)):
        return tables.least(tables.loss_of)
    low, high = 0.0, None
    for factor in (1.0, 1.0 + 1e-9, 1.0 + 1e-6, 1.001, 1.01, 1.1, 2.0, 10.0, 1e3, 1e6, 1e9):
        if tables.fits(tables.least(tables.loss_of + factor * (tables.cost_of @ start))):
            high = factor
            break
        low = factor
    if high is None:
        return None
    for _ in range(40):
        middle = 0.5 * (low + high)
        if tables.fits(tables.least(tables.loss_of + middle * (tables.cost_of @ start))):
            high = middle
        else:
            low = middle
    return _filled(tables, tables.least(tables.loss_of + high * (tables.cost_of @ start)))


def _filled(tables: _Tables, flat: _Ints) -> _Ints:
    """Take the single move that lowers the loss most and still fits, as long as there is one."""
    flat = flat.copy()
    for _ in range(_MOVES):
        gains = tables.loss_of[flat][tables.owner] - tables.loss_of
        room = tables.room - tables.used(flat)
        extra = tables.cost_of - tables.cost_of[flat][tables.owner]
        gains[(extra > room).any(axis=1)] = 0.0
        best = int(gains.argmax())
        if gains[best] <= 0.0:
            break
        previous = int(flat[tables.owner[best]])
        flat[tables.owner[best]] = best
        if not tables.fits(flat):
            flat[tables.owner[best]] = previous
            break
    return flat


def _enumerated(
    tables: _Tables, kept: npt.NDArray[np.bool_], reduced: _Floats, gap: float
) -> tuple[bool, _Ints | None]:
    """The best of the choices that are kept, by going through all that can be best; whether that was feasible to do.

    Decision after decision, the partial solutions that are kept are those whose reduced losses do not sum to more than
    the gap, that can be completed within the limits, and, for one metric, that no other is better than in both loss and
    cost.
    """
    if not np.isfinite(gap):
        return False, None
    places = np.flatnonzero(kept)
    options = np.split(places, np.flatnonzero(np.diff(tables.owner[places])) + 1)
    options.sort(key=lambda choices: (len(choices), -float(reduced[choices].max())))
    least = np.array([tables.cost_of[choices].min(axis=0) for choices in options])
    # What the decisions after each one cost at least.
    rest = np.concatenate((np.cumsum(least[::-1], axis=0)[::-1][1:], np.zeros((1, tables.room.size))))
    spent, value, over = np.zeros((1, tables.room.size)), np.zeros(1), np.zeros(1)
    trails: list[tuple[_Ints, _Ints]] = []
    for choices, after in zip(options, rest, strict=True):
        if len(over) * len(choices) > _STATES:
            return False, None
        parent, choice = (grid.ravel() for grid in np.meshgrid(np.arange(len(over)), choices, indexing="ij"))
        new_over, new_spent = over[parent] + reduced[choice], spent[parent] + tables.cost_of[choice]
        alive = np.flatnonzero((new_over <= gap) & (new_spent + after <= tables.room + _SLACK).all(axis=1))
        new_value = value[parent[alive]] + tables.loss_of[choice[alive]]
        if tables.room.size == 1:
            ranked = np.lexsort((new_value, new_spent[alive, 0]))
            lowest = np.minimum.accumulate(new_value[ranked])
            best = np.concatenate(([True], new_value[ranked][1:] < lowest[:-1])) if len(ranked) else ranked.astype(bool)
            ranked = ranked[best]
            alive, new_value = alive[ranked], new_value[ranked]
        trails.append((parent[alive], choice[alive]))
        spent, value, over = new_spent[alive], new_value, new_over[alive]
    for last in np.argsort(value, kind="stable"):
        flat, state = np.zeros(len(tables.starts), dtype=np.intp), int(last)
        for parents, taken in reversed(trails):
            flat[tables.owner[taken[state]]] = taken[state]
            state = int(parents[state])
        if tables.fits(flat):
            return True, flat
    return True, None


def _integer_program(tables: _Tables, kept: npt.NDArray[np.bool_]) -> _Ints | None:
    """The best of the choices that are kept, by HiGHS; None if there is none within the limits.

    HiGHS keeps limits up to a tolerance; where it used that, the limits are drawn in by as much and it solves again.
    """
    places = np.flatnonzero(kept)
    owner = tables.owner[places]
    single = np.bincount(owner, minlength=len(tables.starts))[owner] == 1
    fixed, free = places[single], places[~single]
    flat = np.zeros(len(tables.starts), dtype=np.intp)
    flat[tables.owner[fixed]] = fixed
    if not len(free):
        return flat if tables.fits(flat) else None
    rows, columns = np.unique(tables.owner[free], return_inverse=True)
    one_each = sparse.csr_array((np.ones(len(free)), (columns, np.arange(len(free)))), shape=(len(rows), len(free)))
    room = tables.room - tables.cost_of[fixed].sum(axis=0)
    unit = max(float(np.abs(tables.loss_of[free]).max()), 1e-30)
    for _ in range(_TIGHTENINGS):
        found = milp(
            tables.loss_of[free] / unit,
            integrality=np.ones(len(free), dtype=np.int64),
            bounds=Bounds(0.0, 1.0),
            constraints=[LinearConstraint(one_each, 1.0, 1.0), LinearConstraint(tables.cost_of[free].T, -np.inf, room)],
            options={"mip_rel_gap": 0.0},
        )
        if found.status == 2:
            return None
        if found.status != 0 or found.x is None:
            raise SearchError(f"HiGHS could not solve the integer program: {found.message}")
        chosen = free[np.flatnonzero(found.x > 0.5)]
        flat[tables.owner[chosen]] = chosen
        excess = tables.excess(flat)
        if (excess <= _SLACK).all():
            return flat
        room = room - np.maximum(excess, 0.0) * 2.0
    return None
