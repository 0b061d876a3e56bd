"""What the learning agents share: an actor that walks the decisions, exploration, and a way to another network."""

from __future__ import annotations

import json
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from fxopt._files import write_text
from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.decisions._constraint import Enforce, check_enforce
from fxopt.errors import SearchError
from fxopt.search._engine import FAILED, Engine
from fxopt.search._networks import Adam, Perceptron, decode_array, encode_array
from fxopt.search._process import WAVES, DecisionProcess
from fxopt.search._uniform import uniform_policies

__all__ = ["AgentEngine"]

_LEAST_NOISE = 0.01
_REDRAWS = 4
_WIDER = 2.0
_EXPLORED = 0.4


class AgentEngine(Engine):
    """An actor that takes the decisions one after the other, and learns from what came of them.

    The first ``warmup`` episodes are a few uniform policies and others: without a constraint random ones, with one
    uniform policies of which some decisions are changed, since random policies, brought within a budget, are far from
    any that is good. After that, some of an episode's actions are drawn from a normal distribution around the actor's,
    truncated to [0, 1], whose width is ``noise`` times ``decay`` to the power of the episodes since; the others are the
    actor's own, so that a change of the score can be traced to few decisions. If that leads to a policy that was
    proposed before, it is drawn again, wider.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator.
        warmup: How many episodes come before the actor's.
        noise: The width of the exploration at first, in units of the actions' range.
        decay: What it is multiplied with after each episode.
        hidden: The units of the actor's hidden layers.
        rate: The actor's learning rate.
        enforce: ``"mask"`` or ``"decrease"``: how a policy is kept within the limits.
        warm_start: An agent that was trained elsewhere, as :meth:`agent` gives it, or the path of the file that
            :meth:`save_agent` wrote. There is no warm-up then: the first episode is the agent's own, without noise;
            with a constraint the second is a uniform policy, in case that it knows no better.

    Raises:
        SearchError: If an option is out of range or the agent cannot be read.
    """

    def __init__(
        self,
        space: SearchSpace,
        constraint: Constraint | None,
        seed: int,
        *,
        warmup: int,
        noise: float,
        decay: float,
        hidden: Sequence[int],
        rate: float,
        enforce: Enforce,
        warm_start: Mapping[str, Any] | str | os.PathLike[str] | None,
    ) -> None:
        super().__init__(space, constraint, seed)
        if warmup < 0 or not noise > 0.0 or not 0.0 < decay <= 1.0 or not rate > 0.0:
            raise SearchError(
                f"An agent needs warmup of at least 0, noise and rates above 0 and a decay in (0, 1]; got "
                f"warmup={warmup}, noise={noise}, decay={decay} and a rate of {rate}."
            )
        if not hidden or min(hidden) < 1:
            raise SearchError(f"An agent needs hidden layers of at least one unit, got hidden={list(hidden)}.")
        check_enforce(enforce)
        self.warmup = int(warmup)
        self.noise = float(noise)
        self.decay = float(decay)
        self.hidden = tuple(int(units) for units in hidden)
        self.rate = float(rate)
        self.enforce: Enforce = enforce
        self.process = DecisionProcess(space, constraint)
        self._warm_start = os.fspath(warm_start) if isinstance(warm_start, os.PathLike) else warm_start
        sizes = (len(self.process.features), *self.hidden, self.process.axes)
        self._actor = Perceptron(sizes, self.rng, "sigmoid")
        self._adam = Adam(self._actor.weights, self.rate)
        self._seen: set[Policy] = set()
        self._taken = None if self._warm_start is None else _read_agent(self._warm_start)
        if self._taken is not None:
            self._take_over(self._taken)

    @property
    def options(self) -> dict[str, Any]:
        """The options that agents share."""
        return {
            "warmup": self.warmup,
            "noise": self.noise,
            "decay": self.decay,
            "hidden": list(self.hidden),
            "enforce": self.enforce,
            "warm_start": self._warm_start if isinstance(self._warm_start, str | None) else dict(self._warm_start),
        }

    @abstractmethod
    def learn(self, row: npt.NDArray[np.intp], score: float) -> None:
        """Learn from one episode, given by its choice indices of shape ``(decisions,)``."""

    def propose(self, n: int) -> Sequence[Policy]:
        """Walk ``n`` episodes."""
        proposed = []
        for episode in range(self.asked, self.asked + n):
            founds = self._warm_start is None and episode < self.warmup
            policy = self._founder(episode) if founds else self._explored(episode)
            self._seen.add(policy)
            proposed.append(policy)
        return proposed

    def observe(self, policy: Policy, score: float) -> None:
        """Learn from an episode that did not fail."""
        if score > FAILED and len(self.space):
            self.learn(self.space.encode(policy), score)

    def act(self, states: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The actor's actions in states of shape ``(n, features)``, without noise, shape ``(n, axes)``."""
        return self._actor(states.astype(np.float32)).astype(np.float64)

    def policy(self) -> Policy:
        """The policy of the actor as it is, without noise."""
        row = self.process.walk(lambda _, state: self.act(state[np.newaxis])[0], masked=self.enforce == "mask")
        return self._within(self.space.decode(row))

    def width(self, episode: int) -> float:
        """The width of the exploration in an episode."""
        since = episode - (self.warmup if self._warm_start is None else 0)
        return max(self.noise * self.decay ** max(since, 0), _LEAST_NOISE)

    # Going elsewhere.

    def agent(self) -> dict[str, Any]:
        """The actor and the names of what it sees, as JSON-ready data for another engine's ``warm_start``."""
        return {
            "agent": self.name,
            "space": self.space.fingerprint,
            "features": list(self.process.features),
            "hidden": list(self.hidden),
            "axes": self.process.axes,
            "weights": [encode_array(weight) for weight in self._actor.weights],
        }

    def save_agent(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`agent` to a file, whole or not at all.

        Raises:
            SearchError: If the file cannot be written.
        """
        write_text(path, json.dumps(self.agent()), SearchError)

    def _take_over(self, agent: Mapping[str, Any]) -> None:
        """Start from another actor.

        Features meet by name. Those that it did not know have no weight; nor, on another space, have those that only
        told its decisions apart.
        """
        if tuple(agent["hidden"]) != self.hidden:
            raise SearchError(
                f"The agent has hidden layers of {list(agent['hidden'])} units and this engine of "
                f"{list(self.hidden)}; give hidden={list(agent['hidden'])}."
            )
        names, axes = [str(name) for name in agent["features"]], int(agent["axes"])
        sizes = (len(names), *self.hidden, axes)
        saved = Perceptron(sizes, np.random.default_rng(0))
        for weight, text in zip(saved.weights, agent["weights"], strict=True):
            weight[...] = decode_array(text, weight.shape)
        same = agent["space"] == self.space.fingerprint
        first, last = saved.weights[0], slice(0, min(axes, self.process.axes))
        for i, name in enumerate(self.process.features):
            known = name in names and (same or not name.startswith(WAVES))
            self._actor.weights[0][i] = first[names.index(name)] if known else 0.0
        for mine, theirs in zip(self._actor.weights[1:-2], saved.weights[1:-2], strict=True):
            mine[...] = theirs
        for mine, theirs in zip(self._actor.weights[-2:], saved.weights[-2:], strict=True):
            mine[..., last] = theirs[..., last]

    # The state.

    def extra_state(self) -> dict[str, Any]:
        """The actor, its optimizer, and what was proposed."""
        return {
            "actor": [encode_array(weight) for weight in self._actor.weights],
            "adam": self._adam.state(),
            "seen": sorted(self.space.encode(policy).tolist() for policy in self._seen),
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with another actor."""
        for weight, text in zip(self._actor.weights, state["actor"], strict=True):
            weight[...] = decode_array(text, weight.shape)
        self._adam.load(state["adam"])
        self._seen = {self.space.decode(row) for row in state["seen"]}

    # Episodes.

    def _founder(self, episode: int) -> Policy:
        uniform = self._uniform
        order = self.rng.permutation(len(self.space))
        if episode < len(uniform):
            return self._within(uniform[episode], order)
        if self.constraint is None:
            return self.space.sample(self.rng)
        row = self.space.encode(self._within(uniform[0]))
        for j in np.flatnonzero(self._explored_decisions()):
            moved = self.process.places[j, row[j]] + self.noise * self.rng.standard_normal(self.process.axes)
            row[j] = self.process.choice(int(j), np.clip(moved, 0.0, 1.0))
        return self._within(self.space.decode(row), order)

    @cached_property
    def _uniform(self) -> list[Policy]:
        return uniform_policies(self.space, self.constraint)[: max(1, self.warmup // 4)]

    def _explored_decisions(self) -> npt.NDArray[np.bool_]:
        """Which decisions an episode takes otherwise than the actor would: some, at least one."""
        explored = self.rng.random(len(self.space)) < _EXPLORED
        if len(explored):
            explored[self.rng.integers(len(explored))] = True
        return explored

    def _explored(self, episode: int) -> Policy:
        if self._warm_start is not None and episode == 0:
            return self.policy()
        if self._warm_start is not None and episode == 1 and self.constraint is not None:
            return self._founder(0)
        noise = self.width(episode)
        for _ in range(_REDRAWS):
            policy = self._episode(noise)
            if policy not in self._seen:
                break
            noise = min(noise * _WIDER, 1.0)
        return policy

    def _episode(self, noise: float) -> Policy:
        drawn = self.rng.random((len(self.space), self.process.axes))
        explored = self._explored_decisions()

        def act(j: int, state: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            mean = self.act(state[np.newaxis])[0]
            if not explored[j]:
                return np.asarray(mean)
            low, high = ndtr(-mean / noise), ndtr((1.0 - mean) / noise)
            return np.asarray(np.clip(mean + noise * ndtri(low + drawn[j] * (high - low)), 0.0, 1.0))

        row = self.process.walk(act, masked=self.enforce == "mask")
        return self._within(self.space.decode(row))

    def _within(self, policy: Policy, order: npt.NDArray[np.intp] | None = None) -> Policy:
        if self.constraint is None:
            return policy
        return self.constraint.project_all([policy], order, enforce=self.enforce)[0]


def _read_agent(source: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(source, str):
        try:
            source = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as failure:
            raise SearchError(f"Cannot read an agent from {source}: {failure}.") from failure
    if not isinstance(source, Mapping) or {"space", "features", "hidden", "axes", "weights"} - set(source):
        raise SearchError("This is no agent; give what an engine's agent() returned or save_agent() wrote.")
    return source
