"""SparsifyWeights: zeros where they are asked for, which stay zero, and which targets are told of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxopt import targets
from fxopt.data import TensorLoader
from fxopt.decisions import Policy, SearchSpace
from fxopt.errors import PassError, PolicyError
from fxopt.graph import trace
from fxopt.graph.packing import pack
from fxopt.graph.sparsity import pattern_of
from fxopt.lowering import lower
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize, RoundWeights, SelectOperators, SparsifyWeights
from fxopt.passes.sparsify_weights import SparseLayer
from fxopt.targets.rows import stored_bytes
from fxopt.training import fit, keep_zeros

SPARSIFY = SparsifyWeights(fractions=(0.3, 0.75), patterns=("2:4", "kernel:2"))


def small() -> fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
    )
    return trace(model.eval(), torch.randn(2, 1, 4, 4))


def zeros(gm: nn.Module, site: str) -> int:
    weight: Any = gm.get_submodule(site).weight
    return int((weight == 0).sum())


def test_weights_are_zeroed_as_asked_and_the_others_are_what_they_were() -> None:
    gm = small()
    policy = Policy({("sparsity", "0"): "kernel:4", ("sparsity", "3"): "2:4", ("sparsity", "6"): 0.8})
    sparse = SparsifyWeights(policy)(gm).graph_module
    assert [zeros(sparse, site) for site in ("0", "3", "6")] == [8 * 5, 8 * 18, 76]
    for site, choice in (("0", "kernel:4"), ("3", "2:4"), ("6", 0.8)):
        old, new = (one.get_parameter(f"{site}.weight").detach() for one in (gm, sparse))
        mask = pattern_of(choice).mask(old)
        assert torch.equal(new[mask], old[mask])
        assert not new[~mask].any()


def test_binding_a_policy_is_lowering_the_sparse_graph() -> None:
    gm = small()
    workload = lower(gm)
    space = SearchSpace([*PruneChannels().search_space(gm), *SPARSIFY.search_space(gm)])
    policies = [space.sample(np.random.default_rng(index)) for index in range(3)]
    bound = workload.bind(policies).rows
    by_index = (
        workload.columns(workload.choices(space, np.stack([space.encode(policy) for policy in policies]))).expand().rows
    )
    assert (bound == by_index).all()
    for policy, rows in zip(policies, bound, strict=True):
        graph = PruneChannels(policy)(gm).graph_module
        graph = SparsifyWeights(policy)(graph).graph_module
        made = lower(graph).bind().rows[0]
        assert (rows == made).all()
        for row, info in zip(made, workload.rows, strict=True):
            if ("sparsity", info.name) in policy:
                weight: Any = graph.get_submodule(info.name).weight
                assert row["weight_density"] == pytest.approx(float((weight != 0).float().mean()), abs=1e-6)
                packed = pack(weight, pattern_of(policy["sparsity", info.name]))
                stored = weight.numel() * 4 if packed is None else packed.values.numel() * 4 + len(packed.positions)
                alone = stored_bytes(row[None]) - 4 * (row["bias"] * row["k"] + row["held"])
                assert alone.tolist() == pytest.approx([stored])


def test_the_sparse_engine_counts_the_zeros_and_others_do_not() -> None:
    torch.manual_seed(0)
    gm = trace(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 64))
    policy = Policy({("sparsity", "0"): 0.875, ("sparsity", "2"): 0.875})
    workload = lower(gm)
    for name, ratio in (("eie", 0.125), ("pixel1", 1.0)):
        estimate = workload.estimate(targets.load(name), [Policy({}), policy])
        assert float(estimate.latency_s[1] / estimate.latency_s[0]) == pytest.approx(ratio)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_keeps_the_zeros_and_moves_the_rest(optimizer: Any) -> None:
    policy = Policy({("sparsity", "0"): 0.5, ("sparsity", "6"): "2:4"})
    sparse = SparsifyWeights(policy)(small()).graph_module
    before = {site: sparse.get_parameter(f"{site}.weight").detach().clone() for site in ("0", "6")}
    data = TensorLoader(torch.randn(32, 1, 4, 4), torch.arange(32) % 3, batch_size=16)
    fit(sparse, data, epochs=3, optimizer=optimizer, weight_decay=0.01)
    for site, old in before.items():
        new = sparse.get_parameter(f"{site}.weight").detach()
        assert torch.equal(new == 0, old == 0)
        assert not torch.equal(new, old)


def test_a_loop_of_ones_own_keeps_the_zeros_and_is_left_as_it_was() -> None:
    sparse = SparsifyWeights(Policy({("sparsity", "6"): 0.5}))(small()).graph_module
    weight = sparse.get_parameter("6.weight")
    with keep_zeros(sparse):
        sparse(torch.randn(4, 1, 4, 4)).sum().backward()
    assert weight.grad is not None
    assert not weight.grad[weight == 0].any()
    weight.grad = None
    sparse(torch.randn(4, 1, 4, 4)).sum().backward()
    assert weight.grad is not None
    assert weight.grad[weight == 0].any()


@pytest.mark.parametrize("after", [PruneChannels({("channels", "0"): 4}), SelectOperators()])
def test_passes_that_make_new_weights_take_no_sparse_graph(after: Any) -> None:
    sparse = SparsifyWeights(Policy({("sparsity", "0"): 0.5}))(small()).graph_module
    with pytest.raises(PassError, match="those of '0' were zeroed by 'sparsify-weights' already"):
        after(sparse)
    with pytest.raises(PassError, match="zeroed"):
        after.search_space(sparse)


def test_rounding_keeps_the_zeros() -> None:
    sparse = SparsifyWeights(Policy({("sparsity", "0"): 0.5, ("sparsity", "3"): "2:4"}))(small()).graph_module
    quantized = Quantize()(FoldBatchNorm()(sparse).graph_module).graph_module
    rounded = RoundWeights()(quantized).graph_module
    assert [zeros(rounded, site) for site in ("0", "3")] == [zeros(sparse, site) for site in ("0", "3")] == [36, 144]


def test_zeros_survive_folding_and_quantization() -> None:
    policy = Policy({("sparsity", "0"): 0.5})
    sparse = SparsifyWeights(policy)(small()).graph_module
    final = Quantize()(FoldBatchNorm()(sparse).graph_module).graph_module
    layer: Any = final.get_submodule("0")
    assert zeros(final, "0") == zeros(sparse, "0") == 36
    assert lower(final).bind().rows[0]["weight_density"][0] == 0.5
    assert layer.weight.shape == (8, 1, 3, 3)


def test_layers_can_be_left_out() -> None:
    gm = small()
    assert [one.site for one in SparsifyWeights(ignore=("3",)).search_space(gm)] == ["0", "6"]
    with pytest.raises(PolicyError, match="ignored"):
        SparsifyWeights({("sparsity", "3"): 0.5}, ignore=("3",))(gm)
    with pytest.raises(PassError, match="matches no module"):
        SparsifyWeights(ignore=("nothing",)).search_space(gm)


def test_what_becomes_of_every_layer_is_told_before() -> None:
    gm = small()
    policy = Policy({("sparsity", "0"): "kernel:2", ("sparsity", "6"): 0.75})
    told = SparsifyWeights(policy, ignore=("3",)).explain(gm)
    # 8 kernels of 9: 16 values, places of 4 bits; 96 weights: 24 values, of whose positions 2 bits are written as
    # they are, in 24 * 3 + 95 // 4 = 95 bits, one less than a bitmap.
    expected = [
        SparseLayer("0", "kernel:2", 72, 16, 288, 64 + 8),
        SparseLayer("3", 0.0, 288, 288, 1152, 1152, "ignored"),
        SparseLayer("6", 0.75, 96, 24, 384, 96 + 12),
    ]
    assert told == expected
    assert zeros(gm, "0") == 0
    sparse = SparsifyWeights(policy)(gm).graph_module
    assert [one.choice for one in SparsifyWeights().explain(sparse)] == ["kernel:2", 0.0, 0.75]


def test_what_cannot_be_decided_about_is_told_with_the_reason() -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    gm = trace(nn.Sequential(first, second, nn.ConvTranspose2d(4, 4, 2)).eval(), torch.randn(2, 4, 3, 3))
    reasons = [one.reason for one in SparsifyWeights().explain(gm)]
    assert reasons == ["its weight is another's too"] * 2 + ["ConvTranspose2d is not zeroed"]


def test_a_sparse_layer_is_offered_more_zeros_alone() -> None:
    step = SparsifyWeights(fractions=(0.3, 0.5, 0.75), patterns=("2:4", "1:4", "kernel:2"))
    sparse = SparsifyWeights(Policy({("sparsity", "3"): "2:4"}))(small()).graph_module
    choices = {decision.site: decision.choices for decision in step.search_space(sparse)}
    assert choices["3"] == ("2:4", 0.75, "1:4", "kernel:2")
    assert choices["6"] == (0.0, 0.3, 0.5, 0.75, "2:4", "1:4")


def test_kernels_of_one_weight_have_no_pattern() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(4, 4, 1)).eval(), torch.randn(2, 4, 3, 3))
    (decision,) = SPARSIFY.search_space(gm)
    assert decision.choices == (0.0, 0.3, 0.75, "2:4")


def test_weights_held_twice_are_left_alone() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    gm = trace(nn.Sequential(first, nn.ReLU(), second, nn.Linear(4, 2)).eval(), torch.randn(2, 4))
    assert [one.site for one in SPARSIFY.search_space(gm)] == ["3"]


@pytest.mark.parametrize("options", [{"fractions": (1.0,)}, {"patterns": ("4:2",)}, {"patterns": ("half",)}])
def test_options_that_mean_nothing_are_refused(options: Any) -> None:
    with pytest.raises(PassError):
        SparsifyWeights(**options)


def test_weights_that_are_not_finite_are_refused() -> None:
    gm = small()
    with torch.no_grad():
        gm.get_parameter("0.weight")[0] = float("nan")
    with pytest.raises(PassError, match="'0' holds NaN"):
        SparsifyWeights({("sparsity", "0"): 0.5})(gm)
