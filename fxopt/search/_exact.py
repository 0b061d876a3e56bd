"""Sensitivities, and the best policy that they imply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search._additive_model import AdditiveModel
from fxopt.search._engine import FAILED, Engine
from fxopt.search._ladders import ladders
from fxopt.search._planning import best_policy
from fxopt.search._uniform import uniform_policies

__all__ = ["ExactEngine"]

_Floats = npt.NDArray[np.float64]
_Indices = npt.NDArray[np.intp]

_DRAWS = 4
_ENOUGH = 10


class ExactEngine(Engine):
    """Measures what each decision is worth and solves for the best policy, as a knapsack problem.

    First it asks for a uniform policy within the constraint and for single changes of it: every other choice of every
    decision, or ``probes`` of them, evenly spaced. A change that would pass the budget is made all the same, and other
    decisions make room. From the scores it learns what each choice adds (a Gaussian process that is a sum over
    decisions) and solves for the policy of the highest sum within the additive part of the cost,
    :func:`fxopt.search.solver.solve`; where the cost is no sum, it is linearized again at the solution, and the
    constraint has the last word. The solution is tried, its score is learnt, and so on; when the solution is one that
    was tried, it solves for a guess drawn from what is still possible.

    If the score is a sum, the policy proposed after all single changes is the optimum.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator.
        probes: How many choices of each decision to measure besides the first policy's; None for all.
        losses: Known losses of the choices of each decision, higher is worse, such as sensitivities that were measured
            without the engine; nothing is probed then, and the first policy proposed is the one that is best by them.

    Raises:
        SearchError: If ``probes`` is below 1 or ``losses`` does not fit the space.
    """

    name = "exact"

    def __init__(
        self,
        space: SearchSpace,
        constraint: Constraint | None = None,
        seed: int = 0,
        *,
        probes: int | None = None,
        losses: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__(space, constraint, seed)
        if probes is not None and probes < 1:
            raise SearchError(f"The exact engine measures at least one choice a decision, got probes={probes}.")
        self.probes = probes
        self.losses = None if losses is None else [[float(loss) for loss in table] for table in losses]
        if self.losses is not None and [len(table) for table in self.losses] != space.sizes.tolist():
            raise SearchError(f"losses needs one table a decision, of the lengths {space.sizes.tolist()}.")
        self._ladders = ladders(space, constraint)
        self._model = AdditiveModel(self._ladders, [decision.kind for decision in space])
        self._queue: list[tuple[int, int]] | None = None
        self._base: list[int] = []
        self._seen: set[Policy] = set()
        self._rows: list[list[int]] = []
        self._scores: list[float] = []
        self._fitted = 0
        self._slope = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The number of probes and the given losses."""
        return {"probes": self.probes, "losses": self.losses}

    def propose(self, n: int) -> Sequence[Policy]:
        """The next single changes; after them, solutions."""
        proposed: list[Policy] = []
        if self._queue is None:
            self._queue = self._plan()
            if self.losses is None:
                self._offer(self.space.decode(self._base), proposed)
        while self._queue and len(proposed) < n:
            self._offer(self._changed(*self._queue.pop()), proposed)
        while len(proposed) < n and (policy := self._solution()) is not None:
            self._offer(policy, proposed)
        return proposed

    def observe(self, policy: Policy, score: float) -> None:
        """Keep the score."""
        if score > FAILED:
            self._rows.append(self.space.encode(policy).tolist())
            self._scores.append(score)

    def extra_state(self) -> dict[str, Any]:
        """The scores, and what is still to be measured."""
        return {
            "queue": None if self._queue is None else [list(entry) for entry in self._queue],
            "base": self._base,
            "seen": sorted(self.space.encode(policy).tolist() for policy in self._seen),
            "rows": self._rows,
            "scores": self._scores,
            "model": self._model.state(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what was measured."""
        self._queue = None if state["queue"] is None else [(int(j), int(choice)) for j, choice in state["queue"]]
        self._base = [int(index) for index in state["base"]]
        self._seen = {self.space.decode(row) for row in state["seen"]}
        self._rows = [[int(index) for index in row] for row in state["rows"]]
        self._scores = [float(score) for score in state["scores"]]
        self._fitted = 0
        self._model.load(state["model"])

    # What is measured.

    def _plan(self) -> list[tuple[int, int]]:
        """The base, and the single changes of it in random order."""
        base = self.project(uniform_policies(self.space, self.constraint)[:1])[0]
        self._base = self.space.encode(base).tolist()
        if self.losses is not None:
            return []
        changes = [(j, choice) for j in range(len(self.space)) for choice in self._probed(j)]
        return [changes[i] for i in self.rng.permutation(len(changes))]

    def _probed(self, j: int) -> list[int]:
        """The choices of a decision to measure: evenly spaced along its ladder, its ends first."""
        ladder = self._ladders[j]
        others = [int(i) for i in np.lexsort(ladder.rungs.T[::-1]) if i != self._base[j]]
        if self.probes is None or self.probes >= len(others):
            return others
        if self.probes == 1:
            return [others[0 if self._base[j] != ladder.choice_at.flat[0] else -1]]
        return [others[int(i)] for i in np.unique(np.linspace(0, len(others) - 1, self.probes).round())]

    def _changed(self, j: int, choice: int) -> Policy:
        row = list(self._base)
        row[j] = choice
        rest = [i for i in self.rng.permutation(len(row)).tolist() if i != j]
        order = np.array([j, *rest], dtype=np.intp)
        return self.project([self.space.decode(row)], order)[0]

    def _offer(self, policy: Policy, proposed: list[Policy]) -> None:
        if policy not in self._seen:
            self._seen.add(policy)
            proposed.append(policy)

    # What follows from it.

    def _solution(self) -> Policy | None:
        """The best policy by what is known, by a guess, or at random, that was not tried; None if all found were."""
        known = self._known() if len(self.space) else None
        if known is None:
            return None
        for worth in (known, *(self._guess(known) for _ in range(_DRAWS))):
            policy = self._best_by(worth)
            if policy not in self._seen:
                return policy
        orders = np.array([self.rng.permutation(len(self.space)) for _ in range(_DRAWS)])
        drawn = self.project([self.space.sample(self.rng) for _ in range(_DRAWS)], orders)
        return next((policy for policy in drawn if policy not in self._seen), None)

    def _known(self) -> list[_Floats] | None:
        given = None if self.losses is None else [-np.array(table) for table in self.losses]
        if not self._scores:
            return given
        if self._fitted != len(self._scores):
            rows, scores = np.array(self._rows, dtype=np.intp).reshape(len(self._scores), -1), np.array(self._scores)
            self._fitted = len(self._scores)
            spread = 0.0
            if given is not None:
                prior = np.array([sum(table[i] for table, i in zip(given, row, strict=True)) for row in rows])
                self._slope = _slope(prior, scores)
                scores = scores - self._slope * prior
                spread = self._slope * float(np.sqrt(sum(table.var() for table in given)))
            self._model.fit(rows, scores, spread)
        learnt = self._model.worth()
        return learnt if given is None else [self._slope * a + b for a, b in zip(given, learnt, strict=True)]

    def _guess(self, known: list[_Floats]) -> list[_Floats]:
        if not self._scores:
            spread = max(float(np.ptp(table)) for table in known) if known else 0.0
            return [table + 0.1 * spread * self.rng.standard_normal(len(table)) for table in known]
        drawn, mean = self._model.drawn(self.rng), self._model.worth()
        return [table + one - other for table, one, other in zip(known, drawn, mean, strict=True)]

    def _best_by(self, worth: list[_Floats]) -> Policy:
        return best_policy(
            self.space, self.constraint, worth, self._base, lambda wanted, order: self.project([wanted], order)[0]
        )


def _slope(prior: _Floats, scores: _Floats) -> float:
    """How much of a score a unit of the given losses is; one until there are enough scores to tell."""
    away = prior - prior.mean()
    spread = float((away**2).sum())
    if len(scores) < _ENOUGH or spread == 0.0:
        return 1.0
    return float(away @ (scores - scores.mean())) / spread if away @ scores > 0.0 else 1.0
