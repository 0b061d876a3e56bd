"""Budgets of quantized networks on real targets, by HAQ's decrease and by the mask: kept, and used to within a step."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxopt
from fxopt.decisions import Capabilities, Constraint, Policy, SearchSpace
from fxopt.lowering import IndexCosts, lower
from fxopt.passes import Quantize
from fxopt.search import engines, run_search
from fxopt.targets import load

BUDGETS = [("zynq7020", "latency"), ("bitfusion", "energy"), ("bitfusion", "size"), ("vu9p", "memory")]
WAYS = ["mask", "decrease"]
PAIRS = tuple((w, a) for w in range(2, 9) for a in range(2, 9))


@functools.cache
def network() -> fx.GraphModule:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs)
        return [depthwise, nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.ReLU()]

    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), *block(8, 24), *block(24, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return fxopt.trace(nn.Sequential(*layers, nn.Linear(16, 5)).eval(), torch.randn(2, 3, 16, 16))


class Problem:
    """A space of pairs of bits, and a budget between the cheapest and the dearest policy."""

    def __init__(self, target: str, metric: str, tightness: float = 0.4) -> None:
        self.space: SearchSpace = Quantize().search_space(network(), Capabilities({"*": PAIRS}))
        self.costs: IndexCosts = lower(network()).index_costs(load(target), self.space, [metric])
        ends = [self.cost(self.uniform(bits)) for bits in (2, 8)]
        self.limit = ends[0] + tightness * (ends[1] - ends[0])
        self.constraint = Constraint(self.space, self.costs, self.limit, [metric], by_index=self.costs.at)

    def uniform(self, bits: int) -> Policy:
        return Policy({decision.key: (bits, bits) for decision in self.space})

    def cost(self, policy: Policy) -> float:
        return float(self.costs([policy])[0, 0])

    def back(self, found: Policy, wanted: Policy, enforce: str) -> float:
        """The dearest of the policies that are one step nearer to what was wanted."""
        steps = []
        for decision in self.space:
            here, there = found[decision.key], wanted[decision.key]
            if here == there:
                continue
            if enforce == "mask":
                index = decision.choices.index(here)
                nearer = [decision.choices[index + (1 if decision.choices.index(there) > index else -1)]]
            else:
                nearer = [
                    (here[0] + more, here[1] + 1 - more)  # type: ignore[index]
                    for more in (0, 1)
                    if here[1 - more] < there[1 - more]  # type: ignore[index]
                ]
            steps += [found.merged(Policy({decision.key: choice})) for choice in nearer]
        return float(self.costs(steps)[:, 0].max())


def score(policy: Policy) -> float:
    pairs: Any = policy.values()
    return -sum((1 + i) * (2.0**-w + 2.0**-a) for i, (w, a) in enumerate(pairs))


@functools.cache
def problem(target: str, metric: str) -> Problem:
    return Problem(target, metric)


@pytest.mark.parametrize("enforce", WAYS)
@pytest.mark.parametrize(("target", "metric"), BUDGETS)
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000))
def test_what_is_over_gives_way_by_less_than_a_step(enforce: Any, target: str, metric: str, seed: int) -> None:
    """The step that was taken last was needed; with latency and memory not every step costs something."""
    made = problem(target, metric)
    rng = np.random.default_rng(seed)
    wanted = made.space.sample(rng)
    (found,) = made.constraint.project_all([wanted], rng.permutation(len(made.space)), enforce=enforce)
    assert made.cost(found) <= made.limit
    if made.cost(wanted) <= made.limit:
        assert found == wanted
    else:
        assert made.back(found, wanted, enforce) > made.limit


@pytest.mark.parametrize("enforce", WAYS)
@pytest.mark.parametrize(("target", "metric"), BUDGETS)
def test_an_agent_keeps_each_budget_and_uses_it(enforce: str, target: str, metric: str) -> None:
    made = problem(target, metric)
    engine = engines.create("ddpg", made.space, made.constraint, enforce=enforce, hidden=(32,), warmup=6, updates=1)
    trials = run_search(engine, score, 14).trials
    costs = made.costs([trial.policy for trial in trials])[:, 0]
    assert (costs <= made.limit).all()
    best = max(trials, key=lambda trial: trial.score or -np.inf).policy
    full = made.uniform(8)
    assert made.back(best, full, "decrease") > made.limit, "bits are left that would have cost nothing"
