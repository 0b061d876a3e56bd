"""What a search brings home."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fxopt.decisions import Policy

__all__ = ["SearchResult", "Trial", "best_so_far"]


@dataclass(frozen=True)
class Trial:
    """One policy that was tried.

    Attributes:
        number: Its place in the search, from 0.
        policy: The policy, complete.
        score: Its score, higher is better; None if the trial failed.
        error: Why it failed, or None.
        cached: Whether the score is that of an earlier trial of the same policy.
        elapsed_s: How long the evaluation took; zero if cached. Not compared.
    """

    number: int
    policy: Policy
    score: float | None
    error: str | None = None
    cached: bool = False
    elapsed_s: float = field(default=0.0, compare=False)

    @property
    def failed(self) -> bool:
        """Whether there is no score."""
        return self.score is None


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Attributes:
        best: The trial with the highest score; the first of several equal ones.
        trials: All trials, in order.
        engine: The name of the engine.
        seed: The engine's seed.
        stopped: Why the search ended: ``"trials"`` (all were run), ``"patience"`` (no improvement for long
            enough) or ``"exhausted"`` (the engine had nothing left to propose).
        resumed: How many of the trials came from the journal. Not compared.
    """

    best: Trial
    trials: tuple[Trial, ...]
    engine: str
    seed: int
    stopped: str
    resumed: int = field(default=0, compare=False)

    @property
    def policy(self) -> Policy:
        """The best policy."""
        return self.best.policy

    @property
    def score(self) -> float:
        """The best score."""
        return float("-inf") if self.best.score is None else self.best.score

    @property
    def evaluations(self) -> int:
        """How many policies were evaluated: the trials without those that repeat an earlier policy."""
        return sum(not trial.cached for trial in self.trials)

    @property
    def failed(self) -> int:
        """How many trials failed."""
        return sum(trial.failed for trial in self.trials)

    @property
    def curve(self) -> tuple[float | None, ...]:
        """The best score after each trial; None before the first that did not fail."""
        return best_so_far(self.trials)


def best_so_far(trials: Iterable[Trial]) -> tuple[float | None, ...]:
    """The best score after each trial; None before the first that did not fail."""
    best: float | None = None
    points = []
    for trial in trials:
        if trial.score is not None and (best is None or trial.score > best):
            best = trial.score
        points.append(best)
    return tuple(points)
