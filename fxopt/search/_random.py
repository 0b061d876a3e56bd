"""The engine to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search._engine import Engine
from fxopt.search._uniform import founders

__all__ = ["RandomEngine"]


class RandomEngine(Engine):
    """Draws every choice with equal probability and projects the policy in a random order of decisions.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator.
        uniform: How many uniform policies come first, the largest within the budget before its neighbours; 0 to leave
            everything to chance.

    Raises:
        SearchError: If ``uniform`` is below 0.
    """

    name = "random"

    def __init__(
        self, space: SearchSpace, constraint: Constraint | None = None, seed: int = 0, *, uniform: int = 1
    ) -> None:
        super().__init__(space, constraint, seed)
        if uniform < 0:
            raise SearchError(f"The random engine starts from no less than 0 uniform policies, got uniform={uniform}.")
        self.uniform = uniform
        self._founders: list[Policy] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """How many uniform policies come first."""
        return {"uniform": self.uniform}

    def propose(self, n: int) -> Sequence[Policy]:
        """Draw ``n`` policies, but for those that come first."""
        if self._founders is None:
            self._founders = founders(self.space, self.constraint, self.uniform)
        wanted, orders = [], []
        for number in range(self.asked, self.asked + n):
            drawn = self.space.sample(self.rng)
            wanted.append(self._founders[number] if number < len(self._founders) else drawn)
            orders.append(self.rng.permutation(len(self.space)))
        return self.project(wanted, np.array(orders))

    def observe(self, policy: Policy, score: float) -> None:
        """Learn nothing."""
