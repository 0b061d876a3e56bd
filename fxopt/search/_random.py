"""The engine to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxopt.decisions import Policy
from fxopt.search._engine import Engine

__all__ = ["RandomEngine"]


class RandomEngine(Engine):
    """Draws every choice with equal probability and projects the policy in a random order of decisions."""

    name = "random"

    def propose(self, n: int) -> Sequence[Policy]:
        """Draw ``n`` policies."""
        wanted, orders = [], []
        for _ in range(n):
            wanted.append(self.space.sample(self.rng))
            orders.append(self.rng.permutation(len(self.space)))
        return self.project(wanted, np.array(orders))

    def observe(self, policy: Policy, score: float) -> None:
        """Learn nothing."""
