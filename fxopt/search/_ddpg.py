"""The deterministic policy gradient, as AMC and HAQ have it, with what their codes got wrong put right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.decisions import AdditiveCosts, Constraint, Policy, SearchSpace
from fxopt.decisions._constraint import Enforce
from fxopt.errors import SearchError
from fxopt.search._additive_model import AdditiveModel
from fxopt.search._agent import AgentEngine
from fxopt.search._planning import best_policy
from fxopt.search._process import Interpolated

__all__ = ["DDPGEngine"]

_Floats = npt.NDArray[np.float64]

_LINEARIZED_EVERY = 10
_FAR = 4.0
_DOUBT = 0.05
_SURE = 0.5
_PLANS = 4
_SETTLED = 8
_RESTORING = 10.0
_NEARLY = 0.98
_IMITATIONS = 200


class DDPGEngine(AgentEngine):
    """A deterministic actor takes the decisions one after the other; a critic tells it which way scores grow.

    As in AMC (He et al. 2018) and HAQ (Wang et al. 2019): a state of the decision's features, the cost taken off, the
    rest and the last action; actions from 0 to 1, two of them for pairs of bits; exploration by a truncated normal
    distribution that narrows; a terminal reward less a moving baseline (the middle of the replay); a replay of past
    episodes, of which the *applied* actions are kept. Otherwise:

    - The one reward of an episode is shared out: the critic is a sum over decisions that explains the rewards of whole
      episodes, rather than a value of each step that takes the other steps for noise. It is solved for, not trained:
      a Gaussian process (:class:`~fxopt.search._additive_model.AdditiveModel`).
    - The actor follows the critic's slope along the budget: where its policy costs as much as is allowed, the part of
      the slope that only raises the cost is taken off, so that it learns what to give room to rather than to run into
      the mask. With ``enforce="decrease"`` it does not.
    - The actor begins as an imitation of the best policy of the warm-up, and the critic that it follows is drawn from
      those that are possible given the rewards: what is not known of a decision is tried.
    - Some episodes (``planned``) are not the actor's: they are the best policy within the budget by what the critic
      knows, or by a guess drawn from what is possible, found by the solver that the exact engine has.
    - When the replay is full, the worse half of it is forgotten.

    Args:
        space: What can be decided.
        constraint: What the policies may cost; None for no limit.
        seed: The seed of the engine's generator.
        warmup: How many uniform and random episodes come first, before the actor learns.
        noise: The width of the exploration at first, in units of the actions' range.
        decay: What it is multiplied with after each episode.
        hidden: The units of the actor's hidden layers.
        actor_rate: The actor's learning rate (Adam).
        batch: How many decisions an update looks at, in whole episodes.
        updates: How many updates follow each episode.
        replay: How many episodes are kept.
        planned: The part of the episodes after the warm-up that the critic plans; 0 for the actor alone.
        enforce: ``"mask"`` closes what cannot be completed within the limits; ``"decrease"`` lowers a finished policy
            step by step, as HAQ does.
        warm_start: An agent that was trained on another network; see :meth:`agent`.

    Raises:
        SearchError: If an option is out of range or the agent cannot be read.
    """

    name = "ddpg"

    def __init__(
        self,
        space: SearchSpace,
        constraint: Constraint | None = None,
        seed: int = 0,
        *,
        warmup: int = 20,
        noise: float = 0.3,
        decay: float = 0.992,
        hidden: Sequence[int] = (64, 64),
        actor_rate: float = 1e-3,
        batch: int = 256,
        updates: int = 8,
        replay: int = 512,
        planned: float = 0.5,
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
            rate=actor_rate,
            enforce=enforce,
            warm_start=warm_start,
        )
        if batch < 1 or updates < 1 or replay < 2 or not 0.0 <= planned <= 1.0:
            raise SearchError(
                f"DDPG needs a batch and updates of at least 1, a replay of at least 2 and planned from 0 to 1, got "
                f"batch={batch}, updates={updates}, replay={replay} and planned={planned}."
            )
        self.batch = int(batch)
        self.updates = int(updates)
        self.replay = int(replay)
        self.planned = float(planned)
        self._model = AdditiveModel(self.process.ladders, [decision.kind for decision in space])
        if self._taken is not None and "critic" in self._taken:
            self._model.load(self._taken["critic"], elsewhere=True)
        self._rows = np.zeros((self.replay, len(space)), dtype=np.intp)
        self._rewards = np.zeros(self.replay)
        self._kept = 0
        self._told = 0
        self._market_row: list[int] | None = None
        self._market: tuple[Interpolated, _Floats] | None = None
        self._sums: AdditiveCosts | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's options."""
        return {
            **super().options,
            "actor_rate": self.rate,
            "batch": self.batch,
            "updates": self.updates,
            "replay": self.replay,
            "planned": self.planned,
        }

    def learn(self, row: npt.NDArray[np.intp], score: float) -> None:
        """Keep the episode, ask the critic anew, and let the actor follow it."""
        if self._kept == self.replay:
            self._forget()
        self._rows[self._kept], self._rewards[self._kept] = row, score
        self._kept += 1
        self._told += 1
        if not self._learns():
            return
        if self._market_row is None or self._told % _LINEARIZED_EVERY == 0:
            self._linearize(self._best().tolist())
        if self._told == max(self.warmup, 2) and self._warm_start is None:
            self._imitate(self._best(), _IMITATIONS)
        critic = self._critic()
        for _ in range(self.updates):
            self._update(critic)
        self._imitate(self._best(), self.updates)

    def agent(self) -> dict[str, Any]:
        """The actor, and what the critic learnt of decisions of each kind; see :meth:`AgentEngine.agent`."""
        return {**super().agent(), "critic": self._model.state()}

    def extra_state(self) -> dict[str, Any]:
        """The actor, the replay, and where costs were linearized."""
        mine = {
            "rows": self._rows[: self._kept].tolist(),
            "rewards": self._rewards[: self._kept].tolist(),
            "told": self._told,
            "market_row": self._market_row,
            "critic": self._model.state(),
        }
        return {**super().extra_state(), **mine}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with another actor and replay."""
        super().load_extra_state(state)
        self._kept, self._told = len(state["rewards"]), int(state["told"])
        self._rows[: self._kept] = np.array(state["rows"], dtype=np.intp).reshape(self._kept, len(self.space))
        self._rewards[: self._kept] = state["rewards"]
        self._market_row, self._market, self._sums = None, None, None
        if state["market_row"] is not None:
            self._linearize([int(index) for index in state["market_row"]])
        self._model.load(state["critic"])
        if self._learns():
            self._explain()

    def _learns(self) -> bool:
        """Whether there are enough episodes for the critic."""
        return self._told >= max(self.warmup if self._warm_start is None else _SETTLED, 2)

    def _explored(self, episode: int) -> Policy:
        if self._learns() and self.rng.random() < self.planned:
            policy = self._plan()
            if policy is not None:
                return policy
        return super()._explored(episode)

    def _plan(self) -> Policy | None:
        """The best policy by what the critic knows or guesses that was not proposed; None if all were."""
        for attempt in range(_PLANS):
            sure = attempt == 0 and self.rng.random() < _SURE
            worth = self._model.worth() if sure else self._model.drawn(self.rng)
            policy = best_policy(self.space, self.constraint, worth, self._best(), self._within, self._sums)
            if policy not in self._seen:
                return policy
        return None

    def _forget(self) -> None:
        """Keep the better half of the replay, in the order in which it came."""
        better = np.sort(np.argsort(-self._rewards, kind="stable")[: self.replay // 2])
        self._kept = len(better)
        self._rows[: self._kept], self._rewards[: self._kept] = self._rows[better], self._rewards[better]

    def _critic(self) -> Interpolated:
        """A guess at what each action adds to the score."""
        self._explain()
        return Interpolated(self.process.ladders, [table[:, np.newaxis] for table in self._model.drawn(self.rng)])

    def _explain(self) -> None:
        """Ask the critic anew; of what is far below the middle it is enough to know roughly how far."""
        rewards = self._rewards[: self._kept]
        middle, high = np.quantile(rewards, [0.5, 0.9])
        spread = float(high - middle) or float(rewards.std()) or 1.0
        away = (rewards - middle) / spread
        self._model.fit(self._rows[: self._kept], away, doubt=_DOUBT * np.maximum(-away - _FAR, 0.0))

    def _best(self) -> npt.NDArray[np.intp]:
        return np.asarray(self._rows[int(self._rewards[: self._kept].argmax())])

    def _imitate(self, row: npt.NDArray[np.intp], steps: int) -> None:
        """Teach the actor the actions of a policy, in the states that lead to it."""
        states = self.process.states(row[np.newaxis])[0].astype(np.float32)
        wanted = self.process.actions(row[np.newaxis])[0]
        for _ in range(steps):
            actions, kept = self._actor.forward(states)
            away = (actions - wanted) * self.process.used / len(states)
            self._adam.step(self._actor.backward(kept, away.astype(np.float32))[0])

    def _update(self, critic: Interpolated) -> None:
        """One step of the actor up the critic's slope, in the states of some episodes of the replay."""
        picked = self.rng.integers(0, self._kept, max(1, round(self.batch / len(self.space))))
        states = self.process.states(self._rows[picked]).astype(np.float32)
        flat = states.reshape(-1, states.shape[2])
        actions, kept = self._actor.forward(flat)
        wanted = actions.reshape(*states.shape[:2], -1).astype(np.float64)
        slopes = critic(wanted)[1][..., 0] * self.process.used
        if self.constraint is not None and self.enforce == "mask":
            slopes = self._along_the_budget(slopes, wanted)
        slopes /= max(float(np.sqrt((slopes**2).mean())), 1e-30)
        down = -slopes.reshape(len(flat), -1) / len(flat)
        self._adam.step(self._actor.backward(kept, down.astype(np.float32))[0])

    def _linearize(self, row: list[int]) -> None:
        """Price actions by what they cost around a policy."""
        if self.constraint is None or row == self._market_row:
            return
        costs = AdditiveCosts.around(self.space, self.constraint.costs_at, row)
        tables = [table / self.constraint.limits for table in costs.tables]
        self._market = Interpolated(self.process.ladders, tables), costs.constant / self.constraint.limits
        self._market_row, self._sums = row, costs

    def _along_the_budget(self, slopes: _Floats, actions: _Floats) -> _Floats:
        """The slopes without what raises a cost that is at its limit; over it, they lead back."""
        if self._market is None:
            return slopes
        values, prices = self._market[0](actions)
        costs = values.sum(axis=1) + self._market[1]
        for m in range(costs.shape[1]):
            price = prices[..., m]
            norm = (price**2).sum(axis=(1, 2))
            norm[norm == 0.0] = 1.0
            along = np.maximum((slopes * price).sum(axis=(1, 2)) / norm, 0.0)
            back = _RESTORING * np.maximum(costs[:, m] - 1.0, 0.0) * np.sqrt((slopes**2).sum(axis=(1, 2)) / norm)
            pull = np.where(costs[:, m] >= _NEARLY, along, 0.0) + back
            slopes = slopes - pull[:, np.newaxis, np.newaxis] * price
        return slopes
