"""Deciding as a sequential process: what an agent sees at each decision, and what becomes of its action."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fxopt.decisions import AdditiveCosts, Constraint, SearchSpace
from fxopt.search._ladders import Ladder, ladders

__all__ = ["DYNAMIC", "WAVES", "DecisionProcess", "Interpolated"]

Floats: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.intp]

DYNAMIC = ("reduced", "rest")
_WIDE = 100.0
WAVES = ("sine", "cosine")
"""How the names begin of features that only tell decisions apart."""

_WAVES = 4


class DecisionProcess:
    """The decisions of a space taken one after the other, as an agent of AMC or HAQ takes them.

    An action is a number from 0 to 1 for each axis of a decision (two for pairs of bits that form a grid, else one). It
    names a rung of the axis: ``n`` rungs are as many equal parts of the interval. The action that was *applied* is the
    middle of the part of the rung that was taken, after rounding and budget.

    A state has static features, which describe the decision, the two of :data:`DYNAMIC`, and the action applied last:

    - ``reduced``: the cost taken off so far, relative to the cost of the default policy (AMC's *reduced*);
    - ``rest``: what the decisions still open could take off (AMC's *rest* is their cost; for a budget what matters is
      the part that can go).

    Both follow the additive part of the cost, the mean of those around the default and around the cheapest policy,
    which is exact for sums and, in total, for products of two decisions; of several metrics, their mean relative to the
    limits. Without a constraint both are zero.

    Static features are those of the decisions, by name, and the kinds of decision and operator; each is scaled to
    [0, 1] over the decisions, its logarithm where it spans a factor above 100, and zero where it is the same
    everywhere. Sines and cosines of the place in the order tell the decisions apart.

    Args:
        space: The search space.
        constraint: What the policies may cost; None for no limit.

    Attributes:
        space: The search space.
        constraint: The constraint, or None.
        ladders: The ladder of each decision.
        names: The names of the static features.
        axes: The largest number of axes of a decision.
        static: The static features, shape ``(decisions, features)``.
        places: The place in [0, 1] of every choice on each axis, zero on axes that a decision has not, shape
            ``(decisions, choices, axes)``.
        prices: What each choice costs relative to the limits beyond the decision's default, shape ``(decisions,
            choices, metrics)``.
        start: What the default policy costs relative to the limits, by the same additive costs, shape ``(metrics,)``.
        used: Which axes each decision has, shape ``(decisions, axes)``.
    """

    def __init__(self, space: SearchSpace, constraint: Constraint | None) -> None:
        self.space = space
        self.constraint = constraint
        self.ladders = ladders(space, constraint)
        self.axes = max((len(ladder.sizes) for ladder in self.ladders), default=1)
        width = int(space.sizes.max(initial=1))
        self.places: Floats = np.zeros((len(space), width, self.axes))
        self.used = np.zeros((len(space), self.axes), dtype=bool)
        for j, ladder in enumerate(self.ladders):
            self.places[j, : len(ladder.rungs), : len(ladder.sizes)] = ladder.places
            self.used[j, : len(ladder.sizes)] = True
        features = _static_features(space)
        self.names = tuple(features)
        self.static: Floats = np.array(list(features.values())).T.reshape(len(space), len(features))
        self.prices, self.start = _prices(space, constraint, width)
        self._default = space.encode(space.default())
        # Relative to the cost of the default; the mean over the metrics.
        scale = np.where(self.start > 0.0, self.start, 1.0)
        self._relief: Floats = -(self.prices / scale).mean(axis=2)
        most = np.array([table[:size].max() for table, size in zip(self._relief, space.sizes, strict=True)])
        self._rest: Floats = np.cumsum(most[::-1])[::-1] - most if len(space) else most

    @property
    def features(self) -> tuple[str, ...]:
        """The names of all features of a state, in order."""
        return (*self.names, *DYNAMIC, *(f"last{axis}" for axis in range(self.axes)))

    def states(self, rows: Indices) -> Floats:
        """The states that lead to policies, shape ``(n, decisions, features)``.

        Args:
            rows: Choice indices, shape ``(n, decisions)``.
        """
        count, decisions = rows.shape
        each = np.arange(decisions)
        relief = self._relief[each, rows]
        reduced = np.cumsum(relief, axis=1) - relief
        last = np.zeros((count, decisions, self.axes))
        last[:, 1:] = self.actions(rows)[:, :-1]
        static = np.broadcast_to(self.static, (count, *self.static.shape))
        rest = np.broadcast_to(self._rest, (count, decisions))
        return np.concatenate((static, reduced[..., np.newaxis], rest[..., np.newaxis], last), axis=2)

    def actions(self, rows: Indices) -> Floats:
        """The actions that were applied, shape ``(n, decisions, axes)``."""
        return np.asarray(self.places[np.arange(rows.shape[1]), rows])

    def choice(self, j: int, action: npt.NDArray[np.floating]) -> int:
        """The choice that an action names, shape ``(axes,)``."""
        ladder = self.ladders[j]
        rungs = [min(int(a * size), size - 1) for a, size in zip(action.tolist(), ladder.sizes, strict=False)]
        return int(ladder.choice_at[tuple(rungs)])

    def nearest(self, j: int, action: npt.NDArray[np.floating], allowed: npt.NDArray[np.bool_]) -> int:
        """The allowed choice nearest to an action; of equally near ones the first."""
        indices = np.flatnonzero(allowed)
        away = np.abs(self.places[j, indices] - action)[:, self.used[j]].sum(axis=1)
        return int(indices[away.argmin()])

    def walk(self, act: Callable[[int, Floats], npt.NDArray[np.floating]], *, masked: bool = True) -> Indices:
        """The policy that an agent makes, decision by decision; within the limits if ``masked``.

        The agent first decides on as if there were no limits. At the first choice that the constraint masks it takes
        the nearest one that is open, and from there on each action is held against the mask: so most of the walk costs
        nothing, and every step is as if it had been masked.

        Args:
            act: The action for a decision's index and state, shape ``(axes,)``, from 0 to 1.
            masked: Whether to mask choices that cannot be completed within the limits.

        Returns:
            Choice indices, shape ``(decisions,)``.
        """
        row = self._default.copy()
        last, reduced = np.zeros(self.axes), 0.0
        trail = [(last, reduced)]
        limits = self.constraint if masked else None
        actions: list[npt.NDArray[np.floating]] = []
        for j in range(len(self.space)):
            actions.append(act(j, self._state(j, reduced, last)))
            row[j] = self.choice(j, actions[-1])
            last, reduced = self.places[j, row[j]], reduced + float(self._relief[j, row[j]])
            trail.append((last, reduced))
        stop = len(row) if limits is None else limits.reach(row)
        for j in range(stop, len(row)):
            if limits is None:
                break
            last, reduced = trail[j] if j == stop else (last, reduced)
            action = actions[j] if j == stop else act(j, self._state(j, reduced, last))
            allowed = limits.mask(row[:j], j)
            row[j] = self.nearest(j, action, allowed)
            last, reduced = self.places[j, row[j]], reduced + float(self._relief[j, row[j]])
        return row

    def state(self, row: Indices, j: int) -> Floats:
        """The state at decision ``j`` after those before it were taken as in ``row``."""
        reduced = float(self._relief[np.arange(j), row[:j]].sum())
        return self._state(j, reduced, self.places[j - 1, row[j - 1]] if j else np.zeros(self.axes))

    def _state(self, j: int, reduced: float, last: Floats) -> Floats:
        return np.concatenate((self.static[j], (reduced, self._rest[j]), last))


class Interpolated:
    """A table for each decision, linear between the rungs of each axis.

    Args:
        ladders: The ladder of each decision.
        tables: For each decision the values of its choices, shape ``(choices, values)``.
    """

    def __init__(self, ladders: Sequence[Ladder], tables: Sequence[Floats]) -> None:
        sizes = np.array([(*ladder.sizes, 1)[:2] for ladder in ladders], dtype=np.intp).reshape(-1, 2)
        self._sizes = sizes
        width = tables[0].shape[1] if tables else 1
        self._grid: Floats = np.zeros((len(sizes), *sizes.max(axis=0, initial=1), width))
        for j, (ladder, table) in enumerate(zip(ladders, tables, strict=True)):
            rungs, others = sizes[j].tolist()
            self._grid[j, :rungs, :others] = table[ladder.choice_at.reshape(rungs, others)]

    def __call__(self, actions: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
        """The values of actions, and how they change with each of them.

        Args:
            actions: Shape ``(n, decisions, axes)``.

        Returns:
            Values of shape ``(n, decisions, values)`` and slopes of shape ``(n, decisions, axes, values)``.
        """
        each = np.arange(len(self._sizes))
        places = np.zeros((*actions.shape[:2], 2))
        places[..., : actions.shape[2]] = actions
        high = np.clip(places * self._sizes - 0.5, 0.0, self._sizes - 1.0)
        low = np.minimum(high.astype(np.intp), np.maximum(self._sizes - 2, 0))
        up = np.minimum(low + 1, self._sizes - 1)
        x, y = ((high - low)[..., axis, np.newaxis] for axis in (0, 1))
        corner = self._grid[each, low[..., 0], low[..., 1]]
        left = self._grid[each, low[..., 0], up[..., 1]] - corner
        below = self._grid[each, up[..., 0], low[..., 1]]
        right = self._grid[each, up[..., 0], up[..., 1]] - below
        across = below + y * right - corner - y * left
        slopes = np.stack((across, left + x * (right - left)), axis=2)
        slopes *= self._sizes[:, :, np.newaxis]
        return corner + y * left + x * across, slopes[:, :, : actions.shape[2]]


def _static_features(space: SearchSpace) -> dict[str, Floats]:
    """The features by name, scaled; each of shape ``(decisions,)``."""
    given = sorted({name for decision in space for name in decision.features})
    raw: dict[str, Floats] = {
        name: np.array([decision.features.get(name, 0.0) for decision in space], dtype=np.float64) for name in given
    }
    raw["choices"] = space.sizes.astype(np.float64)
    for kind in sorted({decision.kind for decision in space}):
        raw[f"kind {kind}"] = np.array([float(decision.kind == kind) for decision in space])
    for operator in sorted({decision.operator for decision in space if decision.operator}):
        raw[f"operator {operator}"] = np.array([float(decision.operator == operator) for decision in space])
    features = {name: _scaled(column) for name, column in raw.items()}
    along = (np.arange(len(space)) + 0.5) / max(len(space), 1)
    features["place"] = along
    for wave in range(_WAVES):
        features[f"sine {wave}"] = np.sin(2.0**wave * np.pi * along)
        features[f"cosine {wave}"] = np.cos(2.0**wave * np.pi * along)
    return features


def _scaled(column: Floats) -> Floats:
    finite = np.where(np.isfinite(column), column, 0.0)
    if len(finite) and finite.min() > 0.0 and finite.max() > _WIDE * finite.min():
        finite = np.log(finite)
    span = float(np.ptp(finite)) if len(finite) else 0.0
    return np.asarray((finite - finite.min()) / span if span > 0.0 else np.zeros_like(finite))


def _prices(space: SearchSpace, constraint: Constraint | None, width: int) -> tuple[Floats, Floats]:
    if constraint is None:
        return np.zeros((len(space), width, 1)), np.zeros(1)
    default, cheapest = space.encode(space.default()), space.encode(constraint.cheapest())
    found = [AdditiveCosts.around(space, constraint.costs_at, row) for row in (default, cheapest)]
    prices = np.zeros((len(space), width, constraint.limits.size))
    for j, size in enumerate(space.sizes):
        tables = [costs.tables[j] - costs.tables[j][default[j]] for costs in found]
        prices[j, :size] = 0.5 * (tables[0] + tables[1]) / constraint.limits
    return prices, found[0].constant / constraint.limits
