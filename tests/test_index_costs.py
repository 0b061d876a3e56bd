"""Costs by choice indices: the cheapest way to them, and the same figures as any other."""

from __future__ import annotations

import functools
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxopt
from fxopt.decisions import Capabilities, Constraint, Decision, SearchSpace
from fxopt.errors import PolicyError, UnsupportedError
from fxopt.lowering import IndexCosts, lower
from fxopt.passes import PruneChannels, Quantize, SparsifyWeights
from fxopt.targets import load
from tests.strategies import networks, traced

SUMS = ("latency", "size", "macs")
ANY_BITS = Capabilities({"*": ((2, 8), (4, 4), (5, 3), (8, 8), (4, 32), (32, 32))})
WEIGHT_BITS = Capabilities({"*": ((2, 32), (4, 32), (8, 32), (32, 32))})


@functools.cache
def chain() -> fx.GraphModule:
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)
    return fxopt.trace(nn.Sequential(*layers).eval(), torch.randn(2, 3, 12, 12))


@functools.cache
def transformer() -> fx.GraphModule:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return fxopt.trace(nn.Sequential(nn.Linear(5, 8), layer, nn.Linear(8, 3)).eval(), torch.randn(2, 6, 5))


def assert_same(found: IndexCosts, gm: fx.GraphModule, space: SearchSpace, metrics: tuple[str, ...]) -> None:
    """Against rows that are bound and estimated policy by policy."""
    target = load("bitfusion")
    rng = np.random.default_rng(0)
    policies = [space.default(), *(space.sample(rng) for _ in range(8))]
    workload = lower(gm)
    expected = np.array(
        [[float(target.estimate(workload.bind(one)).metric(metric)[0]) for metric in metrics] for one in policies]
    )
    np.testing.assert_allclose(found(policies), expected, rtol=1e-12)
    indices = np.array([space.encode(policy) for policy in policies])
    np.testing.assert_array_equal(found.at(indices), found(policies))


@settings(max_examples=4)
@given(network=networks(), kinds=st.sets(st.sampled_from(["channels", "bits", "sparsity"]), min_size=1))
def test_costs_by_index_are_those_of_estimates(network: Any, kinds: set[str]) -> None:
    gm = traced(network)[0].eval()
    decisions: list[Decision] = []
    if "channels" in kinds:
        decisions += PruneChannels().search_space(gm)
    if "bits" in kinds:
        decisions += Quantize().search_space(gm, ANY_BITS)
    if "sparsity" in kinds:
        decisions += SparsifyWeights().search_space(gm)
    space = SearchSpace(decisions)
    if len(space):
        assert_same(lower(gm).index_costs(load("bitfusion"), space, SUMS), gm, space, SUMS)


@pytest.mark.parametrize(
    ("make", "decide", "way"),
    [
        # A convolution between two groups costs what its inputs and its outputs make it cost together.
        (chain, lambda gm: PruneChannels().search_space(gm), "estimate"),
        (chain, lambda gm: PruneChannels(ignore=("2",)).search_space(gm), "sum"),
        # Heads and the hidden width of a block have every layer but the stream's to themselves.
        (transformer, lambda gm: PruneChannels().search_space(gm), "sum"),
        (transformer, lambda gm: PruneChannels(residual_stream=True).search_space(gm), "estimate"),
        (chain, lambda gm: SparsifyWeights().search_space(gm), "sum"),
        # Bits of activations are those of the layer that reads them, written by another one.
        (chain, lambda gm: Quantize().search_space(gm, ANY_BITS), "table"),
        (chain, lambda gm: Quantize().search_space(gm, WEIGHT_BITS), "sum"),
        (
            chain,
            lambda gm: SearchSpace(
                [*PruneChannels(ignore=("2",)).search_space(gm), *Quantize().search_space(gm, WEIGHT_BITS)]
            ),
            "estimate",
        ),
    ],
)
def test_the_way_is_the_cheapest_that_is_exact(make: Any, decide: Any, way: str) -> None:
    gm = make()
    space = decide(gm)
    found = lower(gm).index_costs(load("bitfusion"), space, SUMS)
    assert found.way == way
    assert_same(found, gm, space, SUMS)


def test_a_peak_is_no_sum() -> None:
    gm = chain()
    for space in (SparsifyWeights().search_space(gm), Quantize().search_space(gm, ANY_BITS)):
        found = lower(gm).index_costs(load("bitfusion"), space, ("size", "memory"))
        assert found.way == "estimate"
        assert_same(found, gm, space, ("size", "memory"))


def test_policies_within_a_constraint_are_the_same_by_index_and_by_policy() -> None:
    gm = chain()
    space = Quantize().search_space(gm, ANY_BITS)
    workload, target = lower(gm), load("bitfusion")

    def slow(policies: Any) -> Any:
        estimate = workload.estimate(target, policies)
        return np.stack([estimate.metric(metric) for metric in SUMS], axis=1)

    costs = workload.index_costs(target, space, SUMS)
    limits = slow([space.default()])[0] * [0.7, 0.7, 1.0]
    rng = np.random.default_rng(1)
    wanted = [space.sample(rng) for _ in range(12)]
    expected = Constraint(space, slow, limits).project_all(wanted)
    assert Constraint(space, costs, limits, by_index=costs.at).project_all(wanted) == expected


def test_what_cannot_be_costed_is_refused() -> None:
    gm = chain()
    space = PruneChannels().search_space(gm)
    with pytest.raises(UnsupportedError, match="energy"):
        lower(gm).index_costs(load("pixel1"), space, ("energy",))([space.default()])
    elsewhere = SearchSpace([Decision("channels", "layer9", (1, 2), 2)])
    with pytest.raises(PolicyError, match="layer9"):
        lower(gm).index_costs(load("pixel1"), elsewhere, ("macs",))([elsewhere.default()])


def test_choices_of_channels_hold_widths_alone() -> None:
    space = PruneChannels().search_space(chain(), load("pixel1").capabilities)
    workload, count = lower(chain()), 50_000
    indices = np.zeros((count, len(space)), np.uint8)
    widths = 4 * count * len(workload.channel_sites)
    tracemalloc.start()
    try:
        workload.choices(space, indices)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * widths
