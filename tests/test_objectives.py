"""Objectives: what a search is after."""

from __future__ import annotations

import itertools
import math
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from fxopt.decisions import Policy
from fxopt.errors import InfeasibleError, SearchError
from fxopt.graph import trace
from fxopt.lowering import ParametricWorkload, lower
from fxopt.objectives import BestScore, SmallestCost
from fxopt.passes import PruneChannels
from fxopt.targets import Estimate, Target, load
from tests.optimizing import DATA, optimize

POLICIES = [Policy({("channels", "0"): kept}) for kept in (8, 4, 1)]


@pytest.fixture(scope="module")
def job() -> tuple[Target, ParametricWorkload, Estimate]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = trace(model.eval(), torch.randn(2, 3, 6, 6))
    assert PruneChannels().search_space(graph)
    target, workload = load("pixel1"), lower(graph)
    return target, workload, target.estimate(workload.bind())


def macs(job: tuple[Target, ParametricWorkload, Estimate], policy: Policy) -> float:
    return float(job[1].estimate(job[0], [policy]).macs[0])


@pytest.mark.parametrize("objective", [BestScore("macs"), SmallestCost(0.5, "macs")])
def test_of_two_equal_scores_the_cheaper_policy_wins(
    objective: BestScore | SmallestCost, job: tuple[Target, ParametricWorkload, Estimate]
) -> None:
    reward = objective.reward(*job)
    assert ForkingPickler.dumps(reward)
    for score in (0.5, 0.9, 1.0):
        rewards = [reward(score, policy) for policy in POLICIES]
        assert rewards == sorted(rewards)
        assert len(set(rewards)) == 3


def test_the_reward_is_that_of_the_paper(job: tuple[Target, ParametricWorkload, Estimate]) -> None:
    reward = SmallestCost(0.5, "macs").reward(*job)
    assert reward(0.75, POLICIES[1]) == pytest.approx(-0.25 * math.log(macs(job, POLICIES[1])))
    plain = BestScore("macs", weight=0.2).reward(*job)
    assert plain(0.75, POLICIES[1]) == pytest.approx(0.75 - 0.2 * macs(job, POLICIES[1]) / macs(job, POLICIES[0]))


def test_what_keeps_the_score_ranks_before_what_does_not(job: tuple[Target, ParametricWorkload, Estimate]) -> None:
    reward = SmallestCost(0.6, "macs").reward(*job)
    for kept, lost in itertools.product(POLICIES, POLICIES):
        assert reward(0.6, kept) > reward(0.59, lost) > reward(0.3, lost)
    assert SmallestCost(0.0, "macs").reward(*job)(0.0, POLICIES[0]) == pytest.approx(-math.log(macs(job, POLICIES[0])))


def test_a_score_that_is_not_kept_is_said() -> None:
    SmallestCost(0.9).check(0.9, "It")
    BestScore().check(-5.0, "It")
    with pytest.raises(InfeasibleError, match=r"It has the score 0.8, below the least_score of 0.9"):
        SmallestCost(0.9).check(0.8, "It")


@pytest.mark.parametrize(
    ("score", "metric", "message"),
    [(1.5, "macs", "from 0 to 1"), (float("nan"), "macs", "from 0 to 1"), (0.5, "speed", "choose one of latency")],
)
def test_bad_objectives_are_refused(score: float, metric: str, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        SmallestCost(score, metric)


def test_the_one_call_keeps_the_score_at_less_cost() -> None:
    found = optimize(objective=SmallestCost(0.1, "macs"), passes="prune-channels", val=DATA, trials=6)
    assert found.report.after.macs < found.report.before.macs
    with pytest.raises(InfeasibleError, match="The model before the search"):
        optimize(objective=SmallestCost(1.0, "macs"), passes="prune-channels", val=DATA, trials=2)
