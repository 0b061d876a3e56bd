"""Lowering: what is bound without the graph equals what is lowered from the rewritten graph."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fxopt import lowering
from fxopt.decisions import Capabilities, Decision, Policy, SearchSpace
from fxopt.errors import PolicyError, TargetError
from fxopt.graph import trace
from fxopt.lowering import lower
from fxopt.models import small_mobilenet_v2
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize
from fxopt.targets import Activation, OpKind, load
from fxopt.targets.rows import ROW_DTYPE, macs, parameters
from tests.strategies import cnns, networks, traced

CAPABILITIES = Capabilities({"*": ((8, 8), (32, 32))}, channel_tile=2)
ANY_BITS = Capabilities({"*": ((1, 1), (2, 8), (4, 4), (5, 3), (8, 2), (8, 8), (4, 32), (32, 32))})


def assert_same_rows(one, other):
    # Quantize writes SiLU as x * sigmoid(x): one row all the same, named after the product.
    pairs = zip(one.names, other.names, strict=True)
    assert all(mine == theirs or theirs.endswith("_product") for mine, theirs in pairs)
    for name in ROW_DTYPE.names:
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
@given(network=networks(), seed=st.integers(0, 2**16))
def test_bound_bits_equal_the_lowered_quantized_graph(network, seed):
    gm = FoldBatchNorm()(traced(network)[0].eval()).graph_module
    if any(isinstance(module, nn.BatchNorm2d) for module in gm.modules()):
        return  # A norm that cannot be folded is refused by Quantize.
    space = Quantize().search_space(gm, ANY_BITS)
    policy = space.sample(np.random.default_rng(seed))
    quantized = Quantize(policy)(gm).graph_module
    assert_same_rows(lower(gm).bind(policy), lower(quantized).bind())


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
@given(network=networks(), seed=st.integers(0, 2**16))
def test_streamed_estimates_equal_those_of_written_rows(network, seed):
    gm = traced(network)[0]
    decisions = [d for one in (PruneChannels(), Quantize()) for d in one.search_space(gm, CAPABILITIES)]
    space = SearchSpace(decisions)
    rng = np.random.default_rng(seed)
    policies = [space.sample(rng) for _ in range(5)]
    workload = lower(gm)
    indices = np.stack([space.encode(policy) for policy in policies])
    for name in ("pixel1", "v100"):
        target = load(name)
        written = target.estimate(workload.bind(policies))
        choices = workload.choices(space, indices)
        for given_as, threads in ((policies, 1), (iter(policies), 1), (choices, 1), (choices, 2)):
            streamed = workload.estimate(target, given_as, threads=threads)
            assert streamed.uncosted == written.uncosted
            for metric in ("latency", "size", "macs", "memory"):
                np.testing.assert_array_equal(streamed.metric(metric), written.metric(metric))


@settings(max_examples=6)
@given(network=networks(), seed=st.integers(0, 2**16))
def test_tables_of_bits_score_what_is_estimated(network, seed):
    gm = FoldBatchNorm()(traced(network)[0].eval()).graph_module
    workload = lower(gm)
    pairs = ((8, 8), (4, 8), (8, 4), (2, 2), (32, 32))
    sites = list(workload.bit_sites)
    # One layer is left alone.
    space = SearchSpace([Decision("bits", site, pairs, (32, 32)) for site in sites[1:]])
    indices = np.random.default_rng(seed).integers(0, len(pairs), (6, len(space)))
    for name in ("pixel1", "v100"):
        target = load(name)
        table = workload.bit_table(target, space)
        estimate = workload.estimate(target, workload.choices(space, indices))
        for metric in ("latency", "size", "macs"):
            np.testing.assert_allclose(table.score(indices, metric), estimate.metric(metric), rtol=1e-12)


def test_tables_of_bits_take_no_other_decisions():
    gm = trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16))
    with pytest.raises(PolicyError, match="bits alone"):
        lower(gm).bit_table(load("pixel1"), PruneChannels().search_space(gm, CAPABILITIES))


def test_blocks_are_joined_in_order(monkeypatch):
    monkeypatch.setattr(lowering, "_BLOCK", 3)
    gm = trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16))
    workload, target = lower(gm), load("pixel1")
    space = PruneChannels().search_space(gm, CAPABILITIES)
    policies = [space.uniform(fraction) for fraction in np.linspace(0.1, 1.0, 10)]
    streamed = workload.estimate(target, policies)
    np.testing.assert_array_equal(streamed.latency_s, target.estimate(workload.bind(policies)).latency_s)
    with pytest.raises(TargetError, match="streamed"):
        _ = streamed.rows
    with pytest.raises(PolicyError, match="no policy"):
        workload.estimate(target, [])


def test_choices_out_of_range_are_refused_by_site():
    gm = trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16))
    workload = lower(gm)
    space = PruneChannels().search_space(gm, CAPABILITIES)
    site = space[0].site
    with pytest.raises(PolicyError, match=f"'{site}' has"):
        workload.bind(Policy({("channels", site): 10**6}))
    with pytest.raises(PolicyError, match=f"of '{site}' is out of range"):
        workload.choices(space, np.full((2, len(space)), 10**3))
    with pytest.raises(PolicyError, match=r"shape \(policies, "):
        workload.choices(space, np.zeros((2, 1), int))


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
    assert parameters(rows).sum() == sum(p.numel() for p in module.parameters())


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


def lowered(module, *example):
    return lower(trace(module.eval(), example)).bind()


class Tied(nn.Module):
    """An embedding whose table is the classifier's weight, positions, and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.positions = nn.Parameter(torch.randn(1, 5, 6))
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions
        return self.head(self.norm(self.mix(self.mix(x) * self.scale)))


def test_every_parameter_is_stored_once():
    module = Tied()
    work = lowered(module, torch.randint(0, 11, (2, 5)))
    rows = work.rows[0]
    by_name = dict(zip(work.names, rows, strict=True))
    assert parameters(rows).sum() == sum(p.numel() for p in module.parameters())
    # tokens, positions, mix twice, scale, norm (weight and bias), head
    assert rows["reused"].tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert rows["held"].tolist() == [0.0, 30.0, 0.0, 6.0, 0.0, 12.0, 0.0]
    assert by_name["head"]["k"] == 11
    size = load("pixel1").estimate(work).weight_bytes[0]
    assert size == 4 * sum(p.numel() for p in module.parameters())


class Sliced(nn.Module):
    """Two convolutions with slices of one weight, one with a weight computed from parameters, one with activations."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 1, 1))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
        self.hyper = nn.Linear(2, 12)

    def forward(self, x, z):
        low = nn.functional.conv2d(x, self.weight[:5])
        high = nn.functional.conv2d(x, self.weight[5:])
        again = nn.functional.conv2d(x, self.weight[:5])
        dynamic = nn.functional.conv2d(x, self.hyper(z).mean(0).view(4, 3, 1, 1))
        return low + again, high, self.normed(x) + dynamic


def test_slices_are_weights_of_their_own_and_computed_weights_are_not_stored():
    rows = lowered(Sliced(), torch.randn(2, 3, 4, 4), torch.randn(2, 2)).rows[0]
    convs = rows[rows["kind"] == OpKind.CONV]
    stored = {(int(row["k"]), int(row["reused"])) for row in convs}
    assert stored == {(5, 0), (3, 0), (5, 1), (4, 1), (4, 0)}
    # slices 8 * 3, the normed convolution 12 + 4 as it is deployed, the hyper network 24 + 12
    assert parameters(rows).sum() == 24 + 16 + 36


def test_silu_is_one_row_however_it_is_written():
    class Net(nn.Module):
        def __init__(self, written_out):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.written_out = written_out

        def forward(self, x):
            x = self.conv(x)
            return x * torch.sigmoid(x) if self.written_out else nn.functional.silu(x)

    one, other = (lowered(Net(written_out), torch.randn(2, 3, 4, 4)) for written_out in (False, True))
    np.testing.assert_array_equal(one.rows, other.rows)
    assert one.rows["fused"].tolist() == [[0, 1]]
    # The input of a gate that reads something else, or that others read, is no SiLU.
    gated = lowered(Gate(), torch.randn(2, 3, 4, 4))
    assert len(gated) == 4


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        gate = torch.sigmoid(x)
        return x * gate + gate


def test_copies_and_activations_tell_of_what_manner_they_are():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.ReLU6(), nn.Hardswish()

        def forward(self, x):
            y = self.two(self.one(x) + torch.relu(x))
            z = torch.cat([y, x], 1)
            return z.permute(0, 2, 3, 1)[:, 1:], nn.functional.leaky_relu(x) * torch.tanh(x)

    work = lowered(Net(), torch.randn(2, 4, 3, 3))
    found = {name.split("_")[0]: row for name, row in zip(work.names, work.rows[0], strict=True)}
    activations = {name: int(row["activation"]) for name, row in found.items() if row["kind"] == OpKind.ELEMENTWISE}
    clamps = {"one": Activation.CLAMP, "relu": Activation.CLAMP, "leaky": Activation.CLAMP}
    assert activations == {**clamps, "two": Activation.CURVE, "tanh": Activation.CURVE, "add": 0, "mul": 0}
    # Joining moves nothing that its readers would not read elsewhere; the others rearrange elements.
    copies = {name: int(row["transposed"]) for name, row in found.items() if row["kind"] == OpKind.COPY}
    assert copies == {"cat": 0, "permute": 1, "slice": 1}


def test_windows_dilation_and_resizing_reach_the_rows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=2, dilation=2)
            self.pool = nn.MaxPool2d(3, 2)

        def forward(self, x):
            x = self.pool(self.conv(x))
            x = nn.functional.interpolate(x, scale_factor=2)
            return nn.functional.avg_pool2d(x, 4).flatten(1), x.mean((2, 3))

    rows = lowered(Net(), torch.randn(2, 3, 9, 9)).rows[0]
    kinds = [OpKind.CONV, OpKind.POOL, OpKind.RESIZE, OpKind.POOL, OpKind.POOL]
    assert rows["kind"].tolist() == kinds
    assert rows["dilation"].tolist() == [2, 1, 1, 1, 1]
    assert rows["kernel_h"].tolist() == [3, 3, 1, 4, 8]
    assert rows["stride_w"].tolist() == [1, 2, 1, 4, 8]
    assert rows["out_h"][[1, 3, 4]].tolist() == [4, 2, 1]


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 6 * 4 * 3 * 8),
        (nn.Conv3d(2, 4, 3), (2, 2, 4, 5, 6), 4 * 2 * 27 * 2 * 3 * 4),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 9, 9), 6 * 2 * 9 * 25),
    ],
)
def test_macs_of_unusual_convolutions(module, shape, expected):
    work = lowered(nn.Sequential(module), torch.randn(shape))
    assert macs(work.rows).sum() == expected
    assert load("v100").estimate(work).uncosted == ()


def test_a_long_chain_needs_memory_in_proportion():
    class Chain(nn.Module):
        def __init__(self, length):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()) for _ in range(length)))

        def forward(self, x):
            return self.layers(x)

    peaks = []
    for length in (50, 100):
        gm = trace(Chain(length), torch.randn(2, 2, 3, 3))
        tracemalloc.start()
        work = lower(gm, batch=2).bind()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(work) == 2 * length
    assert peaks[1] < 3.0 * peaks[0]


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


def test_operators_with_several_results_are_rows_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 8)
            self.recurrent = nn.LSTM(8, 6, batch_first=True)

        def forward(self, x):
            left, right = self.linear(x).chunk(2, -1)
            y = torch.cat([right, left], -1)
            return self.recurrent(y)[0], y.topk(2, -1)[0]

    module = Net()
    workload = lower(trace(module.eval(), torch.randn(2, 3, 4)))
    # Chunks are views; what the recurrent layer costs is not known, and what it holds is.
    kinds = [OpKind.LINEAR, OpKind.COPY, OpKind.UNKNOWN, OpKind.ELEMENTWISE]
    assert [row.kind for row in workload.rows] == kinds
    assert workload.barriers == (workload.rows[2].node,)
    assert parameters(workload.bind().rows).sum() == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("enabled", [False, True])
def test_regions_of_autocast_are_written_out_or_unknown(enabled):
    class Net(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", enabled=enabled):
                return x @ x.transpose(1, 2) + 1.0

    module, x = Net(), torch.randn(5, 3, 3)
    gm = trace(module, torch.randn(2, 3, 3))
    assert torch.equal(gm(x), module(x))
    kinds = [row.kind for row in lower(gm).rows]
    assert kinds == ([OpKind.UNKNOWN] if enabled else [OpKind.COPY, OpKind.MATMUL, OpKind.ELEMENTWISE])


def test_a_policy_of_another_model_is_refused_by_site():
    workload = lower(trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16)))
    with pytest.raises(PolicyError, match=r"'elsewhere'.*another model"):
        workload.bind(Policy({("channels", "elsewhere"): 3}))


def test_the_batch_multiplies_macs():
    gm = trace(small_mobilenet_v2(), torch.randn(2, 1, 16, 16))
    one, eight = (macs(lower(gm, batch=batch).bind().rows).sum() for batch in (1, 8))
    assert eight == 8 * one
