"""A small space whose best policy is known, and engines and evaluations for it."""

from __future__ import annotations

import numpy as np

from fxopt.decisions import Constraint, Decision, Policy, SearchSpace
from fxopt.search import Engine, engines

SPACE = SearchSpace([Decision("channels", f"conv{i}", tuple(range(4, 33, 4)), 32) for i in range(5)])
BEST = SPACE.decode([1, 6, 3, 2, 4])
NAMES = ["uniform", "random", "greedy", "evolution"]


def score(policy: Policy) -> float:
    return -float(np.abs(SPACE.encode(policy) - SPACE.encode(BEST)).sum())


def make(name: str = "evolution", seed: int = 0, limit: float = 100.0) -> Engine:
    def cost(batch: object) -> object:
        return np.array([float(sum(policy.values())) for policy in batch])  # type: ignore[attr-defined]

    return engines.create(name, SPACE, Constraint(SPACE, cost, limit, ["size"]), seed)  # type: ignore[arg-type]


class Counted:
    """An evaluation that counts its calls and can be made to break at one of them."""

    def __init__(self, breaks_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls = 0
        self.breaks_at = breaks_at
        self.error = error

    def __call__(self, policy: Policy) -> float:
        if self.calls == self.breaks_at and self.error is not None:
            raise self.error
        self.calls += 1
        return score(policy)
