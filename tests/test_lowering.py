"""Lowering: what is bound without the graph equals what is lowered from the rewritten graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxopt.decisions import Capabilities, Policy, SearchSpace
from fxopt.errors import PolicyError
from fxopt.graph import trace
from fxopt.lowering import lower
from fxopt.models import small_mobilenet_v2
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize
from fxopt.targets import OpKind, load
from fxopt.targets.rows import bias_elements, macs, weights
from tests.strategies import cnns, networks, traced

CAPABILITIES = Capabilities({"*": ((8, 8), (32, 32))}, channel_tile=2)


def assert_same_rows(one, other):
    assert one.names == other.names
    for name in one.rows.dtype.names:
        np.testing.assert_array_equal(one.rows[name], other.rows[name], err_msg=name)


@settings(max_examples=6)
@given(network=networks(), seed=st.integers(0, 2**16))
def test_bound_channels_equal_the_lowered_pruned_graph(network, seed):
    gm = traced(network)[0]
    space = PruneChannels().search_space(gm, CAPABILITIES)
    policy = space.sample(np.random.default_rng(seed))
    pruned = PruneChannels(policy)(gm).graph_module
    assert_same_rows(lower(gm).bind(policy), lower(pruned).bind())


@settings(max_examples=6)
@given(network=cnns(), seed=st.integers(0, 2**16))
def test_bound_bits_equal_the_lowered_quantized_graph(network, seed):
    if network.activation == "silu":
        return  # Quantize writes SiLU as sigmoid and product, which are two rows.
    gm = FoldBatchNorm()(traced(network)[0].eval()).graph_module
    if any(isinstance(module, nn.BatchNorm2d) for module in gm.modules()):
        return  # A norm that cannot be folded is refused by Quantize.
    space = Quantize().search_space(gm, CAPABILITIES)
    policy = space.sample(np.random.default_rng(seed))
    quantized = Quantize(policy)(gm).graph_module
    bound = lower(gm).bind(policy)
    after = lower(quantized).bind()
    assert after.names == bound.names
    for name in ("weight_bits", "activation_bits", "k", "c"):
        layers = np.isin(bound.rows["kind"], [OpKind.CONV, OpKind.DEPTHWISE, OpKind.LINEAR])
        np.testing.assert_array_equal(after.rows[name][layers], bound.rows[name][layers], err_msg=name)


def test_channels_and_bits_together_equal_the_rewritten_graph():
    gm = trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16))
    passes = (PruneChannels(), Quantize())
    space = SearchSpace([d for one in passes for d in one.search_space(gm, CAPABILITIES)])
    workload = lower(gm)
    rng = np.random.default_rng(0)
    for _ in range(5):
        policy = space.sample(rng)
        pruned = PruneChannels(policy)(gm).graph_module
        folded = FoldBatchNorm()(pruned.eval()).graph_module
        quantized = Quantize(policy)(folded).graph_module
        assert_same_rows(lower(folded).bind(Policy(bits_of(policy))), lower(quantized).bind())
        assert_same_rows(workload.bind(Policy(channels_of(policy))), lower(pruned).bind())


def bits_of(policy):
    return {key: choice for key, choice in policy.items() if key[0] == "bits"}


def channels_of(policy):
    return {key: choice for key, choice in policy.items() if key[0] == "channels"}


@settings(max_examples=6)
@given(network=networks(), seed=st.integers(0, 2**16))
def test_many_policies_are_bound_as_one_by_one(network, seed):
    gm = traced(network)[0]
    space = PruneChannels().search_space(gm, CAPABILITIES)
    rng = np.random.default_rng(seed)
    policies = [space.sample(rng) for _ in range(3)]
    workload = lower(gm)
    together = workload.bind(policies)
    for index, policy in enumerate(policies):
        np.testing.assert_array_equal(together.rows[index], workload.bind(policy).rows[0])


@settings(max_examples=6)
@given(network=cnns())
def test_cost_never_falls_as_channels_grow(network):
    gm = traced(network)[0]
    space = PruneChannels().search_space(gm, CAPABILITIES)
    workload = lower(gm)
    for target in (load("pixel1"), load("v100")):
        for decision in space:
            policies = [Policy({decision.key: choice}) for choice in sorted(decision.choices)]
            estimate = target.estimate(workload.bind(policies))
            for metric in ("latency", "size", "macs", "memory"):
                assert (np.diff(estimate.metric(metric)) >= -1e-15).all()


@settings(max_examples=6)
@given(network=cnns())
def test_macs_agree_with_the_flop_counter_and_parameters_with_the_module(network):
    module, example = network.build()
    rows = lower(trace(module, example)).bind().rows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example[:1])
    assert 2 * macs(rows).sum() == counter.get_total_flops()
    assert (weights(rows) + bias_elements(rows)).sum() == sum(p.numel() for p in module.parameters())


def test_attention_counts_both_products_which_the_flop_counter_leaves_out_of_the_fused_kernel():
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = layer

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    rows = lower(trace(Net().eval(), torch.randn(2, 5, 8))).bind().rows[0]
    matmuls = rows[rows["kind"] == OpKind.MATMUL]
    # heads 2, sequence 5, head width 4: 2 * 5 * 5 * 4 for the scores and as many for the mixture.
    assert macs(matmuls).tolist() == [200.0, 200.0]


def test_live_bytes_of_a_residual_block_hold_the_shortcut():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(4, 4, 1)
            self.two = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x + self.two(self.one(x))

    rows = lower(trace(Net(), torch.randn(2, 4, 3, 3))).bind().rows[0]
    tensor_bytes = 4 * 9 * 4
    # input and one's output; input, one's and two's output; input, two's output and the sum.
    assert rows["live_bytes"].tolist() == [2 * tensor_bytes, 3 * tensor_bytes, 3 * tensor_bytes]


def test_an_unknown_operator_is_a_row_of_its_own_and_a_barrier():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return torch.special.bessel_j0(self.conv(x))

    workload = lower(trace(Net(), torch.randn(2, 3, 4, 4)))
    assert [row.kind for row in workload.rows] == [OpKind.CONV, OpKind.UNKNOWN]
    assert len(workload.barriers) == 1
    assert workload.channel_sites == {}
    assert load("pixel1").estimate(workload.bind()).uncosted == (workload.rows[1].name,)


def test_a_policy_of_another_model_is_refused_by_site():
    workload = lower(trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16)))
    with pytest.raises(PolicyError, match=r"'elsewhere'.*another model"):
        workload.bind(Policy({("channels", "elsewhere"): 3}))


def test_the_batch_multiplies_macs():
    gm = trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16))
    one, eight = (macs(lower(gm, batch=batch).bind().rows).sum() for batch in (1, 8))
    assert eight == 8 * one
