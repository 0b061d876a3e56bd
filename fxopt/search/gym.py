"""The decision process as an environment of Gymnasium, for agents of other packages.

Needs the extra ``gym``: ``pip install 'fxopt[gym]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.decisions import Constraint, Policy, SearchSpace
from fxopt.errors import SearchError
from fxopt.search._process import DecisionProcess

try:
    import gymnasium
except ImportError as failure:
    raise SearchError(f"fxopt.search.gym needs Gymnasium ({failure}). Run: pip install 'fxopt[gym]'") from failure

__all__ = ["DecisionEnv"]

_Array = npt.NDArray[np.float32]


class DecisionEnv(gymnasium.Env[_Array, _Array]):
    """Takes the decisions of a space one after the other; the score of the policy is the reward of the last step.

    Observations are the states that fxopt's own agents see: the decision's features, the cost taken off, what the rest
    can take off, and the action applied last. An action has a number from 0 to 1 for each axis of a decision; it is
    rounded to a choice, and to the nearest open one where the constraint masks it. ``info`` holds the applied action,
    and at the end the policy and its score, all under those names.

    Args:
        space: What can be decided; at least one decision.
        evaluate: The score of a policy, higher is better.
        constraint: What the policies may cost; None for no limit.

    Attributes:
        best: The best score so far and its policy, or None.

    Raises:
        SearchError: If there is nothing to decide.
    """

    def __init__(
        self, space: SearchSpace, evaluate: Callable[[Policy], float], constraint: Constraint | None = None
    ) -> None:
        if not len(space):
            raise SearchError("An environment needs at least one decision, and this space has none.")
        self._space = space
        self._evaluate = evaluate
        self._constraint = constraint
        self._process = DecisionProcess(space, constraint)
        width = len(self._process.features)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (self._process.axes,), np.float32)
        self._row = space.encode(space.default())
        self._step = 0
        self.best: tuple[float, Policy] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[_Array, dict[str, Any]]:
        """Begin at the first decision."""
        super().reset(seed=seed, options=options)
        self._row = self._space.encode(self._space.default())
        self._step = 0
        return self._observed(), {}

    def step(self, action: _Array) -> tuple[_Array, float, bool, bool, dict[str, Any]]:
        """Take the next decision.

        Raises:
            SearchError: If the episode has ended; call ``reset``.
        """
        j = self._step
        if j >= len(self._space):
            raise SearchError("The episode has ended; call reset() before the next step.")
        wanted = np.clip(np.asarray(action, dtype=np.float64).reshape(self._process.axes), 0.0, 1.0)
        choice = self._process.choice(j, wanted)
        if self._constraint is not None:
            allowed = self._constraint.mask(self._row[:j], j)
            choice = choice if allowed[choice] else self._process.nearest(j, wanted, allowed)
        self._row[j] = choice
        self._step = j + 1
        info: dict[str, Any] = {"action": self._process.places[j, choice].astype(np.float32)}
        ended = self._step == len(self._space)
        score = 0.0
        if ended:
            policy = self._space.decode(self._row)
            score = float(self._evaluate(policy))
            info.update(policy=policy, score=score)
            if self.best is None or score > self.best[0]:
                self.best = (score, policy)
        return self._observed(), score, ended, False, info

    def _observed(self) -> _Array:
        place = min(self._step, len(self._space) - 1)
        return self._process.state(self._row, place).astype(np.float32)
