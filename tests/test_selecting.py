"""How far a selection of operators goes for the passes behind it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import fx

import fxopt
from fxopt import _selecting, targets
from fxopt._selecting import Selector
from fxopt._tuning import Tuning
from fxopt.decisions import Policy
from fxopt.errors import InfeasibleError
from fxopt.lowering import OperatorTable, lower, lower_operators
from fxopt.nas import ExpectedCost, Supernet, policy_within
from fxopt.passes import PruneChannels
from fxopt.progress import Silent
from tests.test_api_operators import DATA, EXAMPLE, STEP, make

TARGET = targets.load("bitfusion")


@functools.cache
def graph() -> fx.GraphModule:
    return fxopt.trace(make(), EXAMPLE)


@functools.cache
def table() -> OperatorTable:
    return lower_operators(graph(), STEP).table(TARGET)


def cost(policy: Policy, metric: str) -> float:
    return float(table().score(table().space.encode(policy)[None], metric)[0])


def cheapest() -> Policy:
    latency, _ = table().of("latency")
    return table().space.decode([row[:size].argmin() for row, size in zip(latency, table().space.sizes, strict=True)])


def within(limits: dict[str, float], most_s: float, last: Policy) -> tuple[Policy, bool]:
    """What is chosen where the others can bring whatever takes at most so long within the budget."""

    def completed(network: fx.GraphModule, *, anyhow: bool = True) -> None:
        taken = float(TARGET.estimate(lower(network, TARGET.capabilities.batch).bind()).latency_s[0])
        if taken > most_s:
            raise InfeasibleError("too slow", metric="latency", limit=most_s, least=taken)

    torch.manual_seed(0)
    supernet = Supernet(graph(), STEP)
    # The originals are the likeliest.
    with torch.no_grad():
        for row, one in zip(supernet.alpha, supernet.space, strict=True):
            row[one.choices.index(one.default)] = 3.0
    tuning = Tuning(DATA, 1, None, 0.01, 0, None, None)
    selector = Selector(STEP, tuning, (PruneChannels(),), None, Silent())
    return selector._within(supernet, table(), limits, completed, (0.0,) * len(limits), last)


def test_only_what_the_others_cannot_bring_down_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    least = {metric: cost(cheapest(), metric) for metric in ("latency", "size")}
    limits = {"latency": 1.0, "size": 1.6 * least["size"]}
    first, _ = within(limits, 1.0, cheapest())
    most = (cost(first, "latency") + least["latency"]) / 2
    assert cost(first, "latency") > most
    asked: list[dict[str, float]] = []

    def recorded(supernet: Supernet, costs: OperatorTable, within: dict[str, float], **options: Any) -> Policy:
        asked.append(dict(within))
        return policy_within(supernet, costs, within, **options)

    monkeypatch.setattr(_selecting, "policy_within", recorded)
    found, fell_back = within(limits, most, table().space.default())
    assert not fell_back
    assert cost(found, "latency") <= most
    assert {one["size"] for one in asked} == {limits["size"]}
    falling = [one["latency"] for one in asked]
    assert len(falling) > 1
    assert all(after <= 0.95 * before for before, after in itertools.pairwise(falling))
    # What was found and is too slow is not found again.
    assert falling[1] < cost(first, "latency")


def test_what_is_fallen_back_on_is_told_as_that() -> None:
    last = table().space.default()
    assert within({"latency": 1.0}, 0.0, last) == (last, False)
    assert within({"latency": cost(last, "latency") * 0.99}, 0.0, last) == (last, True)


FUSED = dataclasses.replace(STEP, candidates=("mb{e}-k{k}", "fused{e}-k3"))


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        # Dense layers are the fastest there, and have more weights than any others.
        ({"latency": 0.0, "size": 0.0}, {"latency": 0.0}),
        ({"latency": 0.3, "size": 0.5}, {"latency": 0.3, "size": 1.0}),
        ({"latency": 0.6, "size": 0.5}, {"latency": 0.6, "size": 0.5}),
        ({"latency": 0.0, "size": 5.0}, {"latency": 0.0, "size": 5.0}),
    ],
)
def test_limits_that_cannot_be_met_together_are_left_to_the_other_passes(
    asked: dict[str, float], kept: dict[str, float]
) -> None:
    """Parts of the way from the least, 0, to the original, 1."""
    supernet = Supernet(graph(), FUSED)
    own = lower_operators(graph(), FUSED).table(TARGET)
    row = supernet.space.encode(supernet.space.default())[None]
    ends = {metric: (ExpectedCost(own, metric).least, float(own.score(row, metric)[0])) for metric in asked}
    limits = {metric: ends[metric][0] * (1 - part) + ends[metric][1] * part for metric, part in asked.items()}
    found = _selecting._together(supernet, own, limits)
    parts = {metric: (limit - ends[metric][0]) / (ends[metric][1] - ends[metric][0]) for metric, limit in found.items()}
    assert parts == pytest.approx(kept)
    policy_within(supernet, own, found)
