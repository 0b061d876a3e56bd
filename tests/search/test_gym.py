"""The environment passes Gymnasium's own check, and agents of others learn on it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fxopt.decisions import AdditiveCosts, Constraint, Decision, Policy, SearchSpace
from fxopt.errors import SearchError

pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env

from fxopt.search.gym import DecisionEnv

GRID = tuple((w, a) for w in (2, 4, 8) for a in (2, 4, 8))
SPACE = SearchSpace([Decision("bits", f"conv{i}", GRID, (8, 8), {"weights": 1.0 + i}) for i in range(3)])
COSTS = AdditiveCosts(SPACE, [[float(w * a) for w, a in GRID]] * 3)


def score(policy: Policy) -> float:
    return -sum(2.0**-bits for pair in policy.values() for bits in pair)  # type: ignore[union-attr, operator, misc]


def environment() -> DecisionEnv:
    return DecisionEnv(SPACE, score, Constraint(SPACE, COSTS, 100.0, by_index=COSTS.at))


def test_gymnasium_has_nothing_to_say() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(infinity|normalized|symmetric).*")
        check_env(environment(), skip_render_check=True)


def test_an_episode_is_a_policy_within_the_budget() -> None:
    env = environment()
    for _ in range(20):
        env.reset(seed=0)
        rewards, ended = [], False
        while not ended:
            _, reward, ended, cut, info = env.step(np.ones(2, dtype=np.float32))
            rewards.append(reward)
            assert not cut
        assert rewards == [0.0, 0.0, score(info["policy"])]
        assert COSTS([info["policy"]])[0, 0] <= 100.0
    assert info["policy"]["bits", "conv0"] == (8, 8), "the first decision gets what it wants"
    assert env.best == (info["score"], info["policy"])
    with pytest.raises(SearchError, match="call reset"):
        env.step(np.ones(2, dtype=np.float32))


def test_nothing_to_decide_is_refused() -> None:
    with pytest.raises(SearchError, match="at least one decision"):
        DecisionEnv(SearchSpace(), score)


def test_an_agent_of_stable_baselines_learns() -> None:
    """On one decision without a budget, the wide choices are found: the last episodes beat the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stable_baselines3 = pytest.importorskip("stable_baselines3")
        env = DecisionEnv(SPACE[:1], score)
        agent = stable_baselines3.PPO("MlpPolicy", env, n_steps=64, batch_size=32, learning_rate=3e-3, seed=0)
        agent.learn(512)
        observation, _ = env.reset()
        _, learnt, *_ = env.step(agent.predict(observation, deterministic=True)[0])
    drawn = [score(SPACE[:1].sample(np.random.default_rng(seed))) for seed in range(50)]
    assert learnt > float(np.mean(drawn))
