"""What a search is after: the best score within a budget, or the smallest cost at a score that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from fxopt.decisions import Policy
from fxopt.errors import InfeasibleError, SearchError
from fxopt.lowering import ParametricWorkload
from fxopt.targets import Estimate, Target

__all__ = ["BestScore", "Objective", "Reward", "SmallestCost"]

_UNITS: Mapping[str, float] = {"latency": 1e-9, "energy": 1e-12, "size": 1.0, "macs": 1.0, "memory": 1.0}
"""Costs are counted in nanoseconds, picojoules, bytes and MACs, so that their logarithms are positive."""

_LEAST_ERROR = 1e-3
"""An error of zero would make every cost alike."""


class Reward(Protocol):
    """What a search maximizes: a function of the score of a policy and of the policy; can be pickled."""

    def __call__(self, score: float, policy: Policy) -> float:
        """The reward; higher is better."""


class Objective(Protocol):
    """What to search for."""

    def reward(self, target: Target, workload: ParametricWorkload, original: Estimate) -> Reward:
        """What to maximize on a target, for a model that costs ``original`` as it is."""

    def check(self, score: float, what: str) -> None:
        """A score, of the original before a search or of the best policy after it, is good enough.

        Raises:
            FxoptError: If it is not.
        """


@dataclass(frozen=True)
class _Cost:
    """The cost of a policy; knows no graph, so that it can leave the process."""

    target: Target
    workload: ParametricWorkload
    metric: str

    def __call__(self, policy: Policy) -> float:
        return float(self.workload.estimate(self.target, [policy]).metric(self.metric)[0])


@dataclass(frozen=True)
class BestScore:
    """The best score within the budget; of two equal ones the cheaper policy.

    Attributes:
        metric: What makes a policy cheap.
        weight: How much of the score the whole cost of the original is worth.
    """

    metric: str = "latency"
    weight: float = 0.01

    def reward(self, target: Target, workload: ParametricWorkload, original: Estimate) -> Reward:
        """The score minus ``weight`` times the cost relative to the original."""
        whole = float(original.metric(self.metric)[0])
        return _BestScore(_Cost(target, workload, self.metric), whole, self.weight)

    def check(self, score: float, what: str) -> None:
        """Any score will do."""


@dataclass(frozen=True)
class _BestScore:
    cost: _Cost
    original: float
    weight: float

    def __call__(self, score: float, policy: Policy) -> float:
        return score - self.weight * self.cost(policy) / max(self.original, 1e-30)


@dataclass(frozen=True)
class SmallestCost:
    """The smallest cost of policies that keep a score, an accuracy between 0 and 1.

    The reward is AMC's, ``-error * log(cost)`` with ``error = 1 - score`` (He et al. 2018, section 3.4), and every
    policy whose score is below ``least_score`` ranks behind all that keep it, by how much it lacks. The cost is counted
    in nanoseconds, picojoules, bytes or MACs, and an error of less than 0.001 counts as that much, or no cost would
    matter to a policy without errors.

    Attributes:
        least_score: The score to keep, as judged in the search: on part of the validation data, without fine-tuning.
        metric: The cost: ``"latency"``, ``"energy"``, ``"size"``, ``"macs"`` or ``"memory"``.

    Raises:
        SearchError: If the score is not between 0 and 1, or there is no such metric.
    """

    least_score: float
    metric: str = "latency"

    def __post_init__(self) -> None:
        """Refuse what cannot be kept or counted."""
        if not 0.0 <= self.least_score <= 1.0:
            raise SearchError(f"least_score is an accuracy from 0 to 1, got {self.least_score!r}.")
        if self.metric not in _UNITS:
            raise SearchError(f"Unknown metric {self.metric!r}; choose one of {', '.join(_UNITS)}.")

    def reward(self, target: Target, workload: ParametricWorkload, original: Estimate) -> Reward:
        """``-error * log(cost)`` where the score is kept."""
        whole = float(original.metric(self.metric)[0])
        return _SmallestCost(_Cost(target, workload, self.metric), whole, self.least_score, _UNITS[self.metric])

    def check(self, score: float, what: str) -> None:
        """The score is kept.

        Raises:
            InfeasibleError: If it is not.
        """
        if score < self.least_score:
            raise InfeasibleError(
                f"{what} has the score {score:.4g}, below the least_score of {self.least_score:g}; lower that, train "
                "for longer, or give more trials.",
                metric="score",
                limit=self.least_score,
                least=score,
            )


@dataclass(frozen=True)
class _SmallestCost:
    cost: _Cost
    original: float
    least_score: float
    unit: float

    def __call__(self, score: float, policy: Policy) -> float:
        if score < self.least_score:
            # No reward of a policy that keeps the score is less: its error is at most 1 and its cost the original's.
            return -self._log(self.original) - (self.least_score - score)
        return -max(1.0 - score, _LEAST_ERROR) * self._log(self.cost(policy))

    def _log(self, cost: float) -> float:
        return math.log(max(cost / self.unit, 1.0))
