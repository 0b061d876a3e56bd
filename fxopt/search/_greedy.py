"""One decision at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.search._engine import FAILED, Engine
from fxopt.search._uniform import uniform_policies

__all__ = ["GreedyEngine"]

_RESTART_DRAWS = 32
_RESTART_ROUNDS = 8


@dataclass(frozen=True)
class _Move:
    """One decision of the base set to another choice: which decision, and what the base scored."""

    decision: int
    base_score: float | None


class GreedyEngine(Engine):
    """Improves a base policy one decision at a time, and lets insensitive decisions make room.

    The base is at first the best uniform policy within the constraint. A sweep tries, in random order,
    every decision at every other choice than the base's. The decision that moves is settled first, so
    that a costly choice can be tried at a tight budget: the others are then projected with the most
    sensitive first, and those to which the score reacted least make room. How sensitive a decision is,
    is the mean change of the score when it moved. Whatever scores above the base becomes the base at
    once. After a sweep without improvement, the search restarts from a random policy; it ends when a few
    hundred random policies are none of them new.

    One sweep solves any score that is a sum over decisions, if there is no constraint.
    """

    name = "greedy"

    def __init__(self, space: SearchSpace, constraint: Constraint | None = None, seed: int = 0) -> None:
        super().__init__(space, constraint, seed)
        self._base: Policy | None = None
        self._base_score = FAILED
        self._improved = True
        self._queue: list[tuple[int, int]] = []
        self._seen: set[Policy] = set()
        self._moves: list[tuple[Policy, _Move | None]] = []
        self._changes = np.zeros(len(space))
        self._counts = np.zeros(len(space))

    def propose(self, n: int) -> Sequence[Policy]:
        """The next moves that lead to new policies; a new base when the sweep has brought nothing."""
        proposed: list[Policy] = []
        while len(proposed) < n:
            if not self._queue and not self._next_sweep(proposed):
                break
            if self._queue and len(proposed) < n:
                self._try_move(*self._queue.pop(), proposed)
        return proposed

    def observe(self, policy: Policy, score: float) -> None:
        """Take a better policy as the base, and learn how sensitive the moved decision is."""
        i = next(i for i, (candidate, _) in enumerate(self._moves) if candidate == policy)
        _, move = self._moves.pop(i)
        if move is not None and move.base_score is not None and score > FAILED:
            self._changes[move.decision] += abs(score - move.base_score)
            self._counts[move.decision] += 1
        if score > self._base_score:
            self._base, self._base_score, self._improved = policy, score, True

    def extra_state(self) -> dict[str, Any]:
        """The base, the rest of the sweep, what was tried, and the sensitivities."""
        moves = [[self._row(p), None if m is None else [m.decision, m.base_score]] for p, m in self._moves]
        return {
            "base": None if self._base is None else self._row(self._base),
            "base_score": _finite(self._base_score),
            "improved": self._improved,
            "queue": [list(entry) for entry in self._queue],
            "seen": sorted(self._row(policy) for policy in self._seen),
            "moves": moves,
            "changes": self._changes.tolist(),
            "counts": self._counts.tolist(),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on in the middle of a sweep."""
        self._base = None if state["base"] is None else self.space.decode(state["base"])
        self._base_score = FAILED if state["base_score"] is None else float(state["base_score"])
        self._improved = bool(state["improved"])
        self._queue = [(int(decision), int(choice)) for decision, choice in state["queue"]]
        self._seen = {self.space.decode(row) for row in state["seen"]}
        self._moves = [
            (self.space.decode(row), None if move is None else _Move(int(move[0]), move[1]))
            for row, move in state["moves"]
        ]
        self._changes = np.array(state["changes"], dtype=np.float64)
        self._counts = np.array(state["counts"], dtype=np.float64)

    def _next_sweep(self, proposed: list[Policy]) -> bool:
        """Fill the queue, with a new base first if need be; False if there is nothing to do for now."""
        if not self._improved and self._moves:
            return False
        if not self._improved or self._base is None:
            base = self._new_base()
            if base is None:
                return False
            self._base, self._base_score = base, FAILED
            self._offer(base, None, proposed)
        self._improved = False
        moves = [(j, choice) for j, decision in enumerate(self.space) for choice in range(len(decision.choices))]
        self._queue = [moves[i] for i in self.rng.permutation(len(moves))]
        return True

    def _new_base(self) -> Policy | None:
        if self._base is None:
            return self.project(uniform_policies(self.space, self.constraint)[:1])[0]
        for _ in range(_RESTART_ROUNDS):
            drawn = [self.space.sample(self.rng) for _ in range(_RESTART_DRAWS)]
            bases = self.project(drawn, self.rng.permutation(len(self.space)))
            new = [policy for policy in bases if policy not in self._seen]
            if new:
                return new[0]
        return None

    def _try_move(self, decision: int, choice: int, proposed: list[Policy]) -> None:
        row = self.space.encode(self._base or self.space.default())
        if row[decision] == choice:
            return
        row[decision] = choice
        rank = np.lexsort((self.rng.permutation(len(row)), -self._sensitivities()))
        order = np.concatenate(([decision], rank[rank != decision]))
        policy = self.project([self.space.decode(row)], order)[0]
        self._offer(policy, _Move(decision, _finite(self._base_score)), proposed)

    def _sensitivities(self) -> npt.NDArray[np.float64]:
        """The mean change of the score per decision; infinite where none is known, to be careful."""
        known = self._counts > 0
        means = self._changes / np.where(known, self._counts, 1.0)
        return np.where(known, means, np.inf)

    def _offer(self, policy: Policy, move: _Move | None, proposed: list[Policy]) -> None:
        if policy in self._seen:
            return
        self._seen.add(policy)
        self._moves.append((policy, move))
        proposed.append(policy)

    def _row(self, policy: Policy) -> list[int]:
        return [int(i) for i in self.space.encode(policy)]


def _finite(score: float) -> float | None:
    return None if score == FAILED else score
