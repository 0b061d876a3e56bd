"""Tournaments, crossover and mutation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search._engine import FAILED, Engine
from fxopt.search._uniform import founders

__all__ = ["EvolutionEngine"]

_ATTEMPTS_AT_NEW = 8


class EvolutionEngine(Engine):
    """Keeps the best policies and breeds new ones from them.

    The first ``population`` proposals are a few uniform policies, the largest within the budget first, which is the
    heuristic to improve on, and random ones. After that each proposal is a child: two parents, each the best of
    ``tournament`` members drawn from the population, are crossed with probability ``crossover`` (every decision from
    either parent), else one of them is taken; then each decision mutates with probability ``mutation``, at least one
    of them, half the time to a neighbouring choice and half the time to any. Everything is projected to the constraint
    in a random order of decisions. Policies that were proposed before are bred again.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator.
        population: How many of the best policies are kept.
        tournament: How many members compete to be a parent.
        crossover: The probability of two parents rather than one.
        mutation: The probability that a decision mutates; None for one decision on average.

    Raises:
        SearchError: If an option is out of range.
    """

    name = "evolution"

    def __init__(
        self,
        space: SearchSpace,
        constraint: Constraint | None = None,
        seed: int = 0,
        *,
        population: int = 16,
        tournament: int = 3,
        crossover: float = 0.5,
        mutation: float | None = None,
    ) -> None:
        super().__init__(space, constraint, seed)
        if population < 2 or tournament < 1:
            raise SearchError(
                f"Evolution needs a population of at least 2 and a tournament of at least 1, "
                f"got population={population} and tournament={tournament}."
            )
        if not (0.0 <= crossover <= 1.0 and (mutation is None or 0.0 <= mutation <= 1.0)):
            raise SearchError(f"Probabilities lie in [0, 1], got crossover={crossover} and mutation={mutation}.")
        self.population = population
        self.tournament = tournament
        self.crossover = crossover
        self.mutation = mutation
        self._members: list[tuple[float, Policy]] = []
        self._seen: set[Policy] = set()
        self._uniform: list[Policy] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The sizes and probabilities."""
        return {
            "population": self.population,
            "tournament": self.tournament,
            "crossover": self.crossover,
            "mutation": self.mutation,
        }

    def propose(self, n: int) -> Sequence[Policy]:
        """Breed ``n`` policies that are new, as far as new ones are found."""
        proposed: list[Policy] = []
        for attempt in range(_ATTEMPTS_AT_NEW):
            for policy in self._breed(n - len(proposed), self.asked + len(proposed), first=attempt == 0):
                if policy not in self._seen or attempt == _ATTEMPTS_AT_NEW - 1:
                    self._seen.add(policy)
                    proposed.append(policy)
            if len(proposed) == n:
                break
        return proposed

    def observe(self, policy: Policy, score: float) -> None:
        """Put the policy among the best, if it is one of them."""
        if score == FAILED or any(member == policy for _, member in self._members):
            return
        self._members.append((score, policy))
        self._members.sort(key=lambda entry: -entry[0])
        del self._members[self.population :]

    def extra_state(self) -> dict[str, Any]:
        """The population and what was proposed."""
        return {
            "members": [[score, self.space.encode(policy).tolist()] for score, policy in self._members],
            "seen": sorted(self.space.encode(policy).tolist() for policy in self._seen),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with another population."""
        self._members = [(float(score), self.space.decode(row)) for score, row in state["members"]]
        self._seen = {self.space.decode(row) for row in state["seen"]}

    def _breed(self, n: int, asked: int, *, first: bool) -> list[Policy]:
        """``n`` policies within the constraint, numbers ``asked`` and on; uniform ones only at first."""
        wanted, orders = [], []
        for number in range(asked, asked + n):
            founds = number < self.population or not self._members
            wanted.append(self._founder(number, first=first) if founds else self._child())
            orders.append(self.rng.permutation(len(self.space)))
        return self.project(wanted, np.array(orders))

    def _founder(self, number: int, *, first: bool) -> Policy:
        if self._uniform is None:
            self._uniform = founders(self.space, self.constraint, max(1, self.population // 4))
        if first and number < len(self._uniform):
            return self._uniform[number]
        return self.space.sample(self.rng)

    def _child(self) -> Policy:
        row = self.space.encode(self._parent())
        if self.rng.random() < self.crossover:
            other = self.space.encode(self._parent())
            row = np.where(self.rng.random(len(row)) < 0.5, row, other)
        return self.space.decode(self._mutated(row))

    def _parent(self) -> Policy:
        """The best of a few members drawn; the members are sorted, best first."""
        return self._members[int(self.rng.integers(0, len(self._members), self.tournament).min())][1]

    def _mutated(self, row: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        decisions = len(row)
        if not decisions:
            return row
        mutates = self.rng.random(decisions) < (1.0 / decisions if self.mutation is None else self.mutation)
        mutates[self.rng.integers(decisions)] = True
        sizes = self.space.sizes
        near = np.clip(row + self.rng.choice([-1, 1], decisions), 0, sizes - 1)
        anywhere = self.rng.integers(0, sizes)
        new = np.where(self.rng.random(decisions) < 0.5, near, anywhere)
        return np.asarray(np.where(mutates, new, row), dtype=np.intp)
