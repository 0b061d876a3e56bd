"""The policy gradient without a critic."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Constraint, SearchSpace
from fxopt.decisions._constraint import Enforce
from fxopt.errors import SearchError
from fxopt.search._agent import AgentEngine

__all__ = ["ReinforceEngine"]


class ReinforceEngine(AgentEngine):
    """Makes the actions of episodes that were better than usual more likely (REINFORCE, Williams 1992).

    An episode's advantage is its reward less a moving average of rewards, in units of a moving average of their
    deviations, clipped to [-3, 3]. The actor steps along the gradient of the logarithm of the density of its actions,
    a normal distribution around its output as wide as the exploration was, times the advantage; the actions are those
    that were applied. The last ``batch`` episodes are looked at together. Nothing is kept of older ones.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator.
        warmup: How many uniform and random episodes come first; they set the baseline.
        noise: The width of the exploration at first, in units of the actions' range.
        decay: What it is multiplied with after each episode.
        hidden: The units of the actor's hidden layers.
        rate: The actor's learning rate (Adam).
        batch: How many episodes make a step.
        baseline: The part of the moving averages that stays at each episode.
        enforce: ``"mask"`` or ``"decrease"``, as for DDPG.
        warm_start: An agent that was trained on another network; see :meth:`agent`.

    Raises:
        SearchError: If an option is out of range or the agent cannot be read.
    """

    name = "reinforce"

    def __init__(
        self,
        space: SearchSpace,
        constraint: Constraint | None = None,
        seed: int = 0,
        *,
        warmup: int = 20,
        noise: float = 0.2,
        decay: float = 0.995,
        hidden: Sequence[int] = (64, 64),
        rate: float = 3e-3,
        batch: int = 4,
        baseline: float = 0.9,
        enforce: Enforce = "mask",
        warm_start: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            space,
            constraint,
            seed,
            warmup=warmup,
            noise=noise,
            decay=decay,
            hidden=hidden,
            rate=rate,
            enforce=enforce,
            warm_start=warm_start,
        )
        if batch < 1 or not 0.0 <= baseline < 1.0:
            raise SearchError(
                f"REINFORCE needs a batch of at least 1 and a baseline in [0, 1), got batch={batch} and "
                f"baseline={baseline}."
            )
        self.batch = int(batch)
        self.baseline = float(baseline)
        self._level: float | None = None
        self._spread = 0.0
        self._told = 0
        self._waiting: list[tuple[list[int], float]] = []

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options."""
        return {**super().options, "rate": self.rate, "batch": self.batch, "baseline": self.baseline}

    def learn(self, row: npt.NDArray[np.intp], score: float) -> None:
        """Compare the episode with the baseline, move the baseline, and step when there are enough episodes."""
        level = score if self._level is None else self._level
        away = score - level
        self._spread = abs(away) if not self._spread else self._mixed(self._spread, abs(away))
        self._level = self._mixed(level, score)
        self._told += 1
        if self._told <= self.warmup and self._warm_start is None:
            return
        advantage = float(np.clip(away / self._spread, -3.0, 3.0)) if self._spread else 0.0
        self._waiting.append((row.tolist(), advantage))
        if len(self._waiting) >= self.batch:
            self._step()

    def extra_state(self) -> dict[str, Any]:
        """The actor, the baseline and the episodes that wait for a step."""
        mine = {
            "level": self._level,
            "spread": self._spread,
            "told": self._told,
            "waiting": [[row, advantage] for row, advantage in self._waiting],
        }
        return {**super().extra_state(), **mine}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with another actor and baseline."""
        super().load_extra_state(state)
        self._level = None if state["level"] is None else float(state["level"])
        self._spread, self._told = float(state["spread"]), int(state["told"])
        self._waiting = [([int(index) for index in row], float(advantage)) for row, advantage in state["waiting"]]

    def _mixed(self, old: float, new: float) -> float:
        return self.baseline * old + (1.0 - self.baseline) * new

    def _step(self) -> None:
        rows = np.array([row for row, _ in self._waiting], dtype=np.intp)
        advantages = np.array([advantage for _, advantage in self._waiting])
        self._waiting = []
        states = self.process.states(rows)
        flat = states.reshape(-1, states.shape[2]).astype(np.float32)
        means, kept = self._actor.forward(flat)
        away = self.process.actions(rows) - means.reshape(*states.shape[:2], -1)
        # The gradient of the log-density, in units of the width: actions far out count as one width.
        pull = np.clip(away / self.width(self.asked), -1.0, 1.0) * self.process.used
        down = -(pull * advantages[:, np.newaxis, np.newaxis]).reshape(len(flat), -1) / len(flat)
        self._adam.step(self._actor.backward(kept, down.astype(np.float32))[0])
