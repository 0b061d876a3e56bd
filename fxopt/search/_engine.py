"""What a search engine is."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fxopt.decisions import Choice, Constraint, Key, Policy, SearchSpace
from fxopt.errors import SearchError

__all__ = ["FAILED", "Engine"]

FAILED = -math.inf
"""The score of a trial that failed: worse than any other."""


class Engine(ABC):
    """Proposes policies and learns from their scores.

    The life of an engine, however it is run::

        engine = MyEngine(space, constraint, seed=0)   # a fresh one for each search
        while policies := engine.ask(n):               # up to n policies; none: nothing left to try
            for policy in policies:
                engine.tell(policy, score(policy))     # every one, in any order; higher is better

    Several policies may be on their way at once. An engine that can propose nothing before it is told
    more gives fewer than asked for, or none; giving none while nothing is on its way ends the search.
    A failed trial is told as :data:`FAILED`.

    What :meth:`ask` gives is complete (every decision is made), within the constraint, and a function of
    the constructor's arguments and of the calls before alone: the engine owns its generator, ``self.rng``.
    So a search can be resumed by repeating its calls, or by :meth:`state_dict`.

    To write one, set :attr:`name`, implement :meth:`propose` and :meth:`observe`, and, if it keeps
    anything, :meth:`extra_state` and :meth:`load_extra_state`. Options are keyword arguments of its
    constructor, returned by :attr:`options`. ``fxopt.testing.EngineConformance`` checks the result.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator, not negative.

    Attributes:
        name: The engine's name in journals and in :mod:`fxopt.search.engines`.
        space: What can be decided.
        constraint: What the policies may cost, or None.
        seed: The seed.
        rng: The engine's own generator.

    Raises:
        SearchError: If the constraint is one of another space or the seed is negative.
    """

    name: ClassVar[str]

    def __init__(self, space: SearchSpace, constraint: Constraint | None = None, seed: int = 0) -> None:
        if constraint is not None and constraint.space != space:
            raise SearchError("The constraint was made for another search space than the engine's; make it anew.")
        if seed < 0:
            raise SearchError(f"A seed is a non-negative integer, got {seed}.")
        self.space = space
        self.constraint = constraint
        self.seed = int(seed)
        self.rng = np.random.default_rng(self.seed)
        self._asked = 0
        self._pending: list[Policy] = []

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options beyond space, constraint and seed, as JSON-ready data."""
        return {}

    @property
    def asked(self) -> int:
        """How many policies have been asked for."""
        return self._asked

    @property
    def pending(self) -> tuple[Policy, ...]:
        """The policies that were asked and not yet told."""
        return tuple(self._pending)

    def ask(self, n: int = 1) -> list[Policy]:
        """Up to ``n`` complete policies to try, all within the constraint.

        Raises:
            SearchError: If ``n`` is below 1, or the engine proposes what is over the constraint.
            PolicyError: If the engine proposes what the space does not offer.
        """
        if n < 1:
            raise SearchError(f"Ask for at least one policy, not {n}.")
        policies = [self.space.complete(policy) for policy in self.propose(n)]
        if len(policies) > n:
            raise SearchError(f"Engine {self.name!r} proposed {len(policies)} policies when asked for {n}.")
        if self.constraint is not None and not self.constraint.feasible(policies).all():
            raise SearchError(f"Engine {self.name!r} proposed a policy over the budget; it has to use self.project().")
        self._asked += len(policies)
        self._pending.extend(policies)
        return policies

    def tell(self, policy: Policy, score: float) -> None:
        """Report the score of a policy that was asked; higher is better, :data:`FAILED` for none.

        Raises:
            SearchError: If the policy was not asked or was told before, or the score is NaN or infinite.
        """
        if policy not in self._pending:
            raise SearchError(
                f"Engine {self.name!r} is told of a policy that was not asked, or that was told before: {policy!r}."
            )
        value = float(score)
        if math.isnan(value) or value == math.inf:
            raise SearchError(f"A score is a finite number, or FAILED; got {value} for {policy!r}.")
        self._pending.remove(policy)
        self.observe(policy, value)

    @abstractmethod
    def propose(self, n: int) -> Sequence[Policy]:
        """Up to ``n`` policies within the constraint; what they leave out is default.

        Called by :meth:`ask`, which checks the result. Draw from ``self.rng`` alone.
        """

    @abstractmethod
    def observe(self, policy: Policy, score: float) -> None:
        """Learn the score of a proposed policy, or :data:`FAILED`. Called by :meth:`tell`, which checks both."""

    def extra_state(self) -> dict[str, Any]:
        """What the engine keeps besides its generator, as JSON-ready data. None of it by default."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`extra_state` gave.

        Raises:
            SearchError: If there is something to take over and the engine does not say how.
        """
        if state:
            raise SearchError(f"Engine {self.name!r} keeps nothing that this state could set: {sorted(state)}.")

    def project(self, policies: Sequence[Mapping[Key, Choice]], order: Any = None) -> list[Policy]:
        """The nearest complete policies within the constraint; see ``Constraint.project_all``."""
        if self.constraint is None:
            return [self.space.complete(policy) for policy in policies]
        return self.constraint.project_all(policies, order)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what the engine does next, as JSON-ready data of its own."""
        return {
            "engine": self.name,
            "space": self.space.fingerprint,
            "asked": self._asked,
            "pending": [self.space.encode(policy).tolist() for policy in self._pending],
            "rng": copy.deepcopy(self.rng.bit_generator.state),
            "extra": copy.deepcopy(self.extra_state()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another engine of the same kind, space and options was.

        Raises:
            SearchError: If the state is of another engine or space, or lacks something.
        """
        missing = {"engine", "space", "asked", "pending", "rng", "extra"} - set(state)
        if missing:
            raise SearchError(f"The state lacks {', '.join(sorted(missing))}; give what state_dict() returned.")
        if state["engine"] != self.name or state["space"] != self.space.fingerprint:
            raise SearchError(
                f"The state is of engine {state['engine']!r} on space {state['space']}, and this is engine "
                f"{self.name!r} on space {self.space.fingerprint}. Create the engine that the state is of."
            )
        self._asked = int(state["asked"])
        self._pending = [self.space.decode(row) for row in state["pending"]]
        self.rng.bit_generator.state = copy.deepcopy(state["rng"])
        self.load_extra_state(copy.deepcopy(state["extra"]))
