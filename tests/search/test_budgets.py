"""Budgets after rounding: nothing that is tried is over, and what had to give way leaves less than one step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.decisions import Constraint, Decision, Policy, SearchSpace
from fxopt.search import compare, engines

ENGINES = ("uniform", "random", "greedy", "exact", "evolution", "reinforce", "ddpg")
LEARNING = ("greedy", "exact", "evolution", "ddpg")
LAYERS = 6


class Chain:
    """Separable convolutions one after the other: the widths of neighbours multiply, as in MobileNetV1."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.tile = int(rng.choice([1, 4, 8]))
        tiles = np.sort(rng.integers(3, 12, LAYERS))
        self.areas = np.sort(rng.integers(9, 800, LAYERS))[::-1].astype(float)
        self.weights = rng.lognormal(0.0, 1.0, LAYERS)
        self.space = SearchSpace(
            Decision(
                "channels", f"layer{i}", tuple(range(self.tile, self.tile * size + 1, self.tile)), self.tile * size
            )
            for i, size in enumerate(tiles.tolist())
        )
        self.limit = float(rng.uniform(0.35, 0.7)) * float(self.costs([self.space.default()])[0])
        self.constraint = Constraint(self.space, self.costs, self.limit, ["macs"])

    def costs(self, policies: Sequence[Policy]) -> npt.NDArray[np.float64]:
        widths = np.array([list(policy.values()) for policy in policies], dtype=np.float64)
        before = np.concatenate((np.full((len(widths), 1), 3.0), widths[:, :-1]), axis=1)
        return np.asarray(((before * widths + 9.0 * widths) * self.areas).sum(axis=1) + 10.0 * widths[:, -1])

    def score(self, policy: Policy) -> float:
        kept = np.array(list(policy.values())) / np.array(list(self.space.default().values()))
        return -float((self.weights * (1.0 - kept) ** 2).sum())

    def dearest_step(self, policy: Policy) -> float:
        row = self.space.encode(policy)
        raised = [row + (np.arange(LAYERS) == j) for j in range(LAYERS) if row[j] + 1 < self.space.sizes[j]]
        return float((self.costs(self.space.decode_all(np.array(raised))) - self.costs([policy])).max())

    def left(self, policy: Policy) -> float:
        return self.limit - float(self.costs([policy])[0])


@given(st.integers(0, 10_000), st.permutations(range(LAYERS)))
def test_what_had_to_give_way_leaves_less_than_a_step(seed: int, order: list[int]) -> None:
    chain = Chain(seed)
    wanted = chain.space.uniform(float(np.random.default_rng(seed).uniform(0.8, 1.0)))
    found = chain.constraint.project(wanted, order)
    assert all(choice % chain.tile == 0 for choice in found.values())
    assert chain.left(found) >= 0.0
    if chain.left(wanted) < 0.0:
        assert chain.left(found) < chain.dearest_step(found)
    else:
        assert found == wanted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ENGINES)
def test_no_engine_tries_what_is_over(name: str, seed: int) -> None:
    chain = Chain(seed)
    found = compare(chain.space, chain.score, 40, constraint=chain.constraint, names=[name], seeds=(seed,))
    (run,) = found.runs
    assert min(chain.left(trial.policy) for trial in run.result.trials) >= 0.0
    if name in LEARNING:
        assert chain.left(run.result.policy) < chain.dearest_step(run.result.policy)


def test_every_engine_is_looked_at() -> None:
    assert set(ENGINES) | {"optuna"} == set(engines.names())
