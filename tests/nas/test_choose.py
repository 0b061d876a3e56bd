"""Networks are chosen within budget, and by engines over a trained supernet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fxopt.decisions import Constraint
from fxopt.errors import InfeasibleError, PassError
from fxopt.nas import PathScore, Supernet, check_budget, fine_tune, policy_within
from fxopt.search import engines, run_search
from tests.nas.toys import between, loader, mobile, mobile_table, paths


@pytest.fixture
def supernet() -> Supernet:
    made = Supernet(*mobile())
    with torch.no_grad():
        made.alpha.add_(torch.randn(made.alpha.shape, generator=torch.Generator().manual_seed(2)))
    return made


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_policy_is_within_the_limit_and_near_the_best(supernet: Supernet, share: float) -> None:
    limit, costs = between(share), mobile_table()
    every = np.array(list(paths(supernet)))
    chances = supernet.alpha.detach().double().log_softmax(1).numpy()
    scores = chances[np.arange(len(supernet.space)), every].sum(1)
    inside = costs.score(every) <= limit
    policy = policy_within(supernet, costs, {"latency": limit})
    row = supernet.space.encode(policy)
    assert costs.score(row[None])[0] <= limit
    found = chances[np.arange(len(row)), row].sum()
    # Not behind nine in ten of all policies within the limit.
    assert (scores[inside] > found).mean() < 0.1
    check_budget(supernet.derive(policy), costs, {"latency": limit})


def test_limits_that_nothing_meets(supernet: Supernet) -> None:
    with pytest.raises(InfeasibleError, match="cheapest architecture"):
        policy_within(supernet, mobile_table(), {"latency": 1e-9, "size": 1e9})
    with pytest.raises(PassError, match="over the limit"):
        check_budget(supernet.derive(supernet.most_likely()), mobile_table(), {"latency": 1e-9})


def test_engines_choose_from_a_supernet(supernet: Supernet) -> None:
    score = PathScore(supernet, loader(), loader(16, seed=1))
    before = {name: value.clone() for name, value in supernet.net.state_dict().items()}
    limit = between(0.5)
    constraint = Constraint(
        supernet.space, lambda many: mobile_table().estimate(many).latency_s[:, None], [limit], ["latency"]
    )
    for name in ("random", "evolution"):
        found = run_search(engines.create(name, supernet.space, constraint, 0), score, 4)
        assert found.policy is not None
        assert mobile_table().estimate(found.policy).latency_s[0] <= limit
        assert score(found.policy) == score(found.policy)
    assert all(torch.equal(value, before[name]) for name, value in supernet.net.state_dict().items())


def test_derived_networks_are_trained_by_the_supernet(supernet: Supernet) -> None:
    policy = supernet.space.decode([0] * len(supernet.space))
    for keep in (True, False):
        network = fine_tune(supernet, policy, loader(), epochs=1, keep_weights=keep)
        assert network(torch.randn(3, 2, 8, 8)).isfinite().all()
        assert not network.training
    as_it_is = fine_tune(supernet, policy, loader(), epochs=0)
    kept = supernet.derive(policy)
    assert all(torch.equal(a, b) for a, b in zip(as_it_is.parameters(), kept.parameters(), strict=True))
