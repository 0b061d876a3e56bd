"""The same fraction everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search._engine import Engine

__all__ = ["UniformEngine", "founders", "uniform_policies"]

_STEPS = 20
_FINER = 32


def uniform_policies(space: SearchSpace, constraint: Constraint | None, steps: int = _STEPS) -> list[Policy]:
    """Uniform policies, the most promising first; they are not projected.

    For each pair of bits that some site offers, the fractions ``1, 1 - 1/steps, ...`` of the channels: the
    largest fraction within the constraint comes first, then those nearest to it, the larger of two equally
    near first. The pairs of bits take turns: those that are within the constraint at some fraction first; of them
    those whose fewer bits are more, as it is the fewer bits that accuracy hangs on.
    """
    pairs = {choice for decision in space if decision.kind == "bits" for choice in decision.choices}
    widest_first = sorted(
        (pair for pair in pairs if isinstance(pair, tuple)), key=lambda pair: (-min(pair), -sum(pair), pair)
    )
    has_channels = any(decision.kind == "channels" for decision in space)
    fractions = [(steps - i) / steps for i in range(steps)] if has_channels else [1.0]
    ranked: list[tuple[bool, int, int, int, Policy]] = []
    for turn, pair in enumerate(widest_first or [None]):
        row = [space.uniform(fraction, None if pair is None else (pair[0], pair[1])) for fraction in fractions]
        within = np.ones(len(row), dtype=bool) if constraint is None else constraint.feasible(row)
        first = int(within.argmax()) if within.any() else len(row) - 1
        over = not within.any()
        ranked.extend((over, abs(i - first), turn, i, policy) for i, policy in enumerate(row))
    return [policy for *_, policy in sorted(ranked, key=lambda entry: entry[:4])]


def founders(space: SearchSpace, constraint: Constraint | None, count: int) -> list[Policy]:
    """Uniform policies to start a search from: the largest within the constraint, then its neighbours.

    Where channels are decided alone, the largest is looked for between the steps of :func:`uniform_policies`, too.
    """
    if count < 1:
        return []
    walk = uniform_policies(space, constraint)
    kinds = {decision.kind for decision in space}
    if constraint is None or kinds != {"channels"}:
        return walk[:count]
    between = [space.uniform(1.0 - i / (_STEPS * _FINER)) for i in range(_STEPS * _FINER)]
    within = np.flatnonzero(constraint.feasible(between))
    first = [between[int(within[0])]] if len(within) else []
    return list(dict.fromkeys([*first, *walk]))[:count]


class UniformEngine(Engine):
    """Walks the uniform policies: the largest feasible fraction first, then its neighbours, projected.

    With bit-widths to choose it does so for each pair of bits. It ends when all have been tried.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: Recorded; the walk does not depend on it.
        steps: How many fractions to try, evenly spaced up to 1.

    Raises:
        SearchError: If ``steps`` is below 1.
    """

    name = "uniform"

    def __init__(
        self, space: SearchSpace, constraint: Constraint | None = None, seed: int = 0, *, steps: int = 20
    ) -> None:
        super().__init__(space, constraint, seed)
        if steps < 1:
            raise SearchError(f"The uniform engine needs at least one step, got steps={steps}.")
        self.steps = steps
        self._walk: list[Policy] | None = None
        self._next = 0
        self._seen: set[Policy] = set()

    @property
    def options(self) -> dict[str, Any]:
        """The number of fractions."""
        return {"steps": self.steps}

    def propose(self, n: int) -> Sequence[Policy]:
        """Project the next policies of the walk, without those that come out the same as an earlier one."""
        if self._walk is None:
            self._walk = uniform_policies(self.space, self.constraint, self.steps)
        fresh: list[Policy] = []
        while len(fresh) < n and self._next < len(self._walk):
            ahead = self._walk[self._next : self._next + n - len(fresh)]
            self._next += len(ahead)
            fresh.extend(policy for policy in self.project(ahead) if self._is_new(policy))
        return fresh

    def observe(self, policy: Policy, score: float) -> None:
        """Learn nothing."""

    def extra_state(self) -> dict[str, Any]:
        """Where the walk stands."""
        return {"next": self._next, "seen": sorted(self.space.encode(policy).tolist() for policy in self._seen)}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on where the walk stood."""
        self._next = int(state["next"])
        self._seen = {self.space.decode(row) for row in state["seen"]}

    def _is_new(self, policy: Policy) -> bool:
        new = policy not in self._seen
        self._seen.add(policy)
        return new
