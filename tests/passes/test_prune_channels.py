"""PruneChannels: cutting equals masking, whatever the wiring; the least important channels go; nothing else changes."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fxopt.decisions import Capabilities, Policy, SearchSpace
from fxopt.errors import PassError, PolicyError
from fxopt.graph import trace
from fxopt.passes import FoldBatchNorm, PruneChannels, Quantize
from fxopt.testing import assert_equivalent
from tests.strategies import BLOCKS, Cnn, Transformer, cnns, networks, randomize_statistics, traced
from tests.wiring import Wired

EXACT = 1e-10


def prepared(module: nn.Module, *size: int) -> tuple[fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    randomize_statistics(module)
    inputs = torch.randn(2, *size, dtype=torch.float64)
    return trace(module.double().eval(), inputs), inputs


def elements(gm: nn.Module) -> int:
    return sum(value.numel() for value in (*gm.parameters(), *gm.buffers()))


def pruned(gm: fx.GraphModule, inputs: Any, policy: Policy, **options: Any) -> fx.GraphModule:
    """Prune, and check all that has to hold of every pruned graph."""
    step = PruneChannels(policy, **options)
    result = step(gm)
    assert result.modified
    assert elements(result.graph_module) < elements(gm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equivalent(step.masked(gm), result.graph_module, inputs, relative=EXACT, batch=3)
    assert_no_stale_attribute(result.graph_module)
    assert list(result.graph_module.state_dict()) == list(gm.state_dict())
    return result.graph_module


def assert_no_stale_attribute(gm: fx.GraphModule) -> None:
    for path in {str(node.target) for node in gm.graph.find_nodes(op="call_module")}:
        module: Any = gm.get_submodule(path)
        if isinstance(module, _ConvTransposeNd):
            assert module.weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
        elif isinstance(module, _ConvNd):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
            assert module.running_mean.shape == (module.num_features,)
        if isinstance(module, (_ConvNd, nn.Linear)) and module.bias is not None:
            assert module.bias.shape == (getattr(module, "out_channels", None) or module.out_features,)


# Cutting equals masking.


@settings(max_examples=8)
@example(network=Cnn(BLOCKS, 6, "flatten", True, "relu", 0), seed=0)
@given(network=networks(), seed=st.integers(0, 99))
def test_prune_and_run_equals_mask_and_run(network: Cnn | Transformer, seed: int) -> None:
    gm, inputs = traced(network, torch.float64)
    space = PruneChannels().search_space(gm)
    assert len(space) >= 1
    policy = space.sample(np.random.default_rng(seed))
    if policy == space.default():
        policy = space.uniform(0.5)
    pruned(gm, inputs, policy)


@settings(max_examples=3)
@given(network=networks())
def test_the_pruned_graph_trains_and_is_pruned_again(network: Cnn | Transformer) -> None:
    gm, inputs = traced(network, torch.float64)
    once = pruned(gm, inputs, PruneChannels().search_space(gm).uniform(0.6))
    assert not PruneChannels(PruneChannels().search_space(once).default())(once).modified
    smallest = PruneChannels().search_space(once)
    if len(smallest):
        pruned(once, inputs, smallest.decode([0] * len(smallest)))
    once.train()
    once(inputs).square().mean().backward()
    with torch.no_grad():
        for value in once.parameters():
            if value.grad is not None:
                value -= 0.1 * value.grad
    assert torch.isfinite(once(inputs)).all()


@settings(max_examples=3)
@given(network=networks())
def test_zero_pruning_is_the_identity(network: Cnn | Transformer) -> None:
    gm, _ = traced(network, torch.float64)
    for policy in (None, Policy(), PruneChannels().search_space(gm).default()):
        result = PruneChannels(policy)(gm)
        assert not result.modified
        assert result.graph_module is gm
        masked = PruneChannels(policy).masked(gm)
        assert masked is not gm
        assert all(value is gm.get_parameter(name) for name, value in masked.named_parameters())


@settings(max_examples=3)
@given(network=cnns(norm=True))
def test_folding_and_cutting_commute(network: Cnn) -> None:
    gm, inputs = traced(network, torch.float64)
    policy = PruneChannels().search_space(gm).uniform(0.5)
    cut = PruneChannels(policy)(gm).graph_module
    assert_equivalent(cut, FoldBatchNorm()(cut).graph_module, inputs, relative=EXACT, batch=3)


def test_a_policy_from_json_gives_the_same_graph_on_a_new_trace() -> None:
    network = Cnn(("inverted", "concat"), 6, "flatten", True, "relu6", 1)
    gm, inputs = traced(network, torch.float64)
    policy = PruneChannels().search_space(gm).uniform(0.5)
    module, _ = network.build()
    again = trace(module.double().eval(), inputs)
    one = PruneChannels(policy)(gm).graph_module
    other = PruneChannels(Policy.from_json(policy.to_json()))(again).graph_module
    assert str(one.graph) == str(other.graph)
    assert_equivalent(one, other, inputs, relative=0.0)


# Wirings that the random networks lack.


def transposed(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 3, **options), nn.ReLU(), nn.Conv2d(8, 2, 1))


WIRINGS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "one dimension": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 2, 1)), (3, 7)),
    "three dimensions": (nn.Sequential(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), nn.Conv3d(6, 2, 1)), (2, 4, 4, 4)),
    "transposed": (transposed(stride=2), (3, 4, 4)),
    "transposed in groups": (transposed(groups=2), (3, 4, 4)),
    "transposed depthwise": (transposed(groups=8), (3, 4, 4)),
    "instance norm": (nn.Sequential(nn.Conv2d(3, 6, 1), nn.InstanceNorm2d(6), nn.Conv2d(6, 2, 1)), (3, 4, 4)),
    "slopes": (nn.Sequential(nn.Conv2d(3, 6, 1), nn.PReLU(6), nn.Conv2d(6, 2, 1)), (3, 4, 4)),
    "one slope": (nn.Sequential(nn.Linear(3, 6), nn.PReLU(), nn.Linear(6, 2)), (3,)),
    "view with sizes": (
        Wired(lambda m, x: m.b(m.a(x).view(-1, 6 * 16)), a=nn.Conv2d(3, 6, 1), b=nn.Linear(96, 2)),
        (3, 4, 4),
    ),
    "split by sizes": (
        Wired(
            lambda m, x: (lambda p, q: m.b(p) + m.c(q))(*m.a(x).split([2, 6], 1)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(2, 2, 1),
            c=nn.Conv2d(6, 2, 1),
        ),
        (3, 4, 4),
    ),
    "parameter read directly": (
        Wired(
            lambda m, x: m.b(m.a(x) * m.gain + m.shift),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 2, 1),
            gain=nn.Parameter(torch.arange(6.0, dtype=torch.float64).view(6, 1, 1)),
            shift=nn.Parameter(torch.ones(1, 6, 1, 1, dtype=torch.float64)),
        ),
        (3, 4, 4),
    ),
    "layer called twice": (
        Wired(
            lambda m, x: m.c(m.b(torch.relu(m.b(m.a(x))))),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 6, 3, padding=1),
            c=nn.Conv2d(6, 2, 1),
        ),
        (3, 4, 4),
    ),
    "gate from another layer": (
        Wired(
            lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(3, 6, 1),
            c=nn.Conv2d(6, 2, 1),
        ),
        (3, 4, 4),
    ),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_wirings(wiring: str) -> None:
    module, size = WIRINGS[wiring]
    gm, inputs = prepared(module, *size)
    space = PruneChannels().search_space(gm)
    assert len(space) >= 1
    result = pruned(gm, inputs, space.uniform(0.5))
    for node in result.graph.find_nodes(op="call_module"):
        layer = result.get_submodule(str(node.target))
        if isinstance(layer, nn.InstanceNorm2d):
            assert layer.num_features == 3
        if isinstance(layer, nn.PReLU):
            assert layer.num_parameters == layer.weight.numel()


def test_tied_weights_stay_tied() -> None:
    module = Wired(lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1), c=nn.Conv2d(6, 2, 1))
    module.b.weight = module.a.weight
    gm, inputs = prepared(module, 3, 4, 4)
    result = pruned(gm, inputs, PruneChannels().search_space(gm).uniform(0.5))
    assert result.get_submodule("a").weight is result.get_submodule("b").weight
    masked = PruneChannels(PruneChannels().search_space(gm).uniform(0.5)).masked(gm)
    assert masked.get_submodule("a").weight is masked.get_submodule("b").weight


# Which channels go.


def two_layers(reads: list[float]) -> fx.GraphModule:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(1, len(reads), 1), nn.ReLU(), nn.Conv2d(len(reads), 2, 1)), 1, 2, 2)
    with torch.no_grad():
        gm.get_submodule("0").weight.copy_(torch.arange(1.0, len(reads) + 1).view(-1, 1, 1, 1))
        gm.get_submodule("2").weight.copy_(torch.tensor(reads).view(1, -1, 1, 1).expand(2, -1, 1, 1))
    return gm


@pytest.mark.parametrize(
    ("reads", "kept", "stay"),
    [
        ([0.1, -5.0, 3.0, 0.2], 2, [2.0, 3.0]),
        ([0.1, -5.0, 3.0, 0.2], 3, [2.0, 3.0, 4.0]),
        ([1.0, 1.0, 1.0, 1.0], 2, [1.0, 2.0]),
        ([0.0, 2.0, 1.0, 2.0], 1, [2.0]),
    ],
)
def test_the_channels_that_are_read_with_the_smallest_weights_go(
    reads: list[float], kept: int, stay: list[float]
) -> None:
    gm = two_layers(reads)
    policy = Policy({("channels", "0"): kept})
    result = PruneChannels(policy)(gm).graph_module
    assert result.get_submodule("0").weight.flatten().tolist() == stay
    masked = PruneChannels(policy).masked(gm).get_submodule("0").weight.flatten()
    assert masked[masked != 0].tolist() == stay


def test_the_importance_is_summed_over_all_readers() -> None:
    module = Wired(
        lambda m, x: (lambda y: m.b(y) + m.c(y))(torch.relu(m.a(x))),
        a=nn.Conv2d(1, 3, 1),
        b=nn.Conv2d(3, 1, 1),
        c=nn.Conv2d(3, 1, 1),
    )
    gm, _ = prepared(module, 1, 2, 2)
    with torch.no_grad():
        module.a.weight.copy_(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))
        module.b.weight.copy_(torch.tensor([3.0, 2.0, 0.0]).view(1, 3, 1, 1))
        module.c.weight.copy_(torch.tensor([0.0, 2.0, -3.5]).view(1, 3, 1, 1))
    result = PruneChannels({("channels", "a"): 2})(gm).graph_module
    assert result.get_submodule("a").weight.flatten().tolist() == [2.0, 3.0]


def test_a_reader_that_is_called_twice_counts_once() -> None:
    module = Wired(
        lambda m, x: (lambda y: m.b(y) + m.b(-y) + m.c(y))(torch.relu(m.a(x))),
        a=nn.Conv2d(1, 2, 1),
        b=nn.Conv2d(2, 1, 1),
        c=nn.Conv2d(2, 1, 1),
    )
    gm, _ = prepared(module, 1, 2, 2)
    with torch.no_grad():
        module.a.weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        module.b.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
        module.c.weight.copy_(torch.tensor([0.0, 1.5]).view(1, 2, 1, 1))
    result = PruneChannels({("channels", "a"): 1})(gm).graph_module
    assert result.get_submodule("a").weight.flatten().tolist() == [2.0]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(broken: float) -> None:
    gm, _ = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)), 3, 4, 4)
    with torch.no_grad():
        gm.get_submodule("2").weight[1, 2] = broken
    with pytest.raises(PassError, match="'weight' of '2' holds NaN"):
        PruneChannels({("channels", "1"): 2})(gm)
    assert PruneChannels({("channels", "0"): 2})(gm).modified
    assert not PruneChannels({("channels", "1"): 4})(gm).modified


# What stays as it was.


def test_the_model_and_the_given_graph_stay_as_they_were() -> None:
    module, inputs = Cnn(("residual", "grouped"), 6, "flatten", True, "relu", 2).build()
    module.eval()
    gm = trace(module, inputs)
    tensors = {name: (id(value), value.clone()) for name, value in module.state_dict(keep_vars=True).items()}
    text, code = str(module), gm.code
    PruneChannels(PruneChannels().search_space(gm).uniform(0.5))(gm)
    PruneChannels(PruneChannels().search_space(gm).uniform(0.5)).masked(gm)
    assert str(module) == text
    assert gm.code == code
    for name, value in module.state_dict(keep_vars=True).items():
        assert id(value) == tensors[name][0]
        assert torch.equal(value, tensors[name][1])


def test_classes_modes_gradients_and_buffers_are_kept() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Conv2d(6, 2, 1))
    module[0].weight.requires_grad_(False)
    gm, inputs = prepared(module, 3, 4, 4)
    gm.train()
    gm.get_submodule("1").eval()
    result = PruneChannels({("channels", "0"): 3})(gm).graph_module
    for path in ("0", "1", "2", "3"):
        assert type(result.get_submodule(path)) is type(gm.get_submodule(path))
        assert result.get_submodule(path).training == gm.get_submodule(path).training
    assert {name: value.requires_grad for name, value in result.named_parameters()} == {
        name: value.requires_grad for name, value in gm.named_parameters()
    }
    assert result.get_submodule("1").running_mean.shape == (3,)
    assert result.get_submodule("1").num_batches_tracked is gm.get_submodule("1").num_batches_tracked
    assert result.get_submodule("3").bias is gm.get_submodule("3").bias
    assert result(inputs).shape == (2, 2, 4, 4)


def test_the_unpruned_state_does_not_fit_the_pruned_graph() -> None:
    gm, _ = prepared(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), 3)
    result = PruneChannels({("channels", "0"): 2})(gm).graph_module
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        result.load_state_dict(gm.state_dict())
    assert result.get_submodule("0").weight.shape == (2, 3)


# What can be decided.


def space_of(module: nn.Module, *size: int, capabilities: Capabilities | None = None, **options: Any) -> SearchSpace:
    return PruneChannels(**options).search_space(prepared(module, *size)[0], capabilities)


def test_the_choices_are_the_kept_counts() -> None:
    network = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 2, 1))
    (decision,) = space_of(network, 3, 4, 4)
    assert (decision.kind, decision.site, decision.operator) == ("channels", "0", "conv")
    assert decision.choices == tuple(range(1, 11))
    assert decision.default == 10
    assert decision.features == {
        **{"t": 1, "type": 0, "n": 2, "c": 10, "h": 4, "w": 4, "stride": 1, "k": 1},
        **{"macs": 2 * 10 * 16, "weights": 20, "channels": 10},
    }
    (decision,) = space_of(network, 3, 4, 4, round_to=4)
    assert decision.choices == (4, 8, 10)
    (decision,) = space_of(network, 3, 4, 4, round_to=2, capabilities=Capabilities(channel_tile=3))
    assert decision.choices == (6, 10)


def test_a_group_below_one_tile_is_not_decided() -> None:
    network = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Conv2d(10, 4, 1), nn.Conv2d(4, 2, 1))
    assert [decision.site for decision in space_of(network, 3, 4, 4, round_to=8)] == ["0"]
    assert len(space_of(nn.Conv2d(3, 2, 1), 3, 4, 4)) == 0


def test_a_unit_may_be_several_channels_of_a_tile() -> None:
    network = nn.Sequential(nn.Conv2d(3, 16, 1, groups=1), nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 2, 1))
    space = space_of(network, 3, 4, 4, capabilities=Capabilities(channel_tile=8))
    assert [(decision.site, decision.choices) for decision in space] == [("0", (2, 4)), ("1", (2, 4))]
    gm, inputs = prepared(network, 3, 4, 4)
    result = pruned(gm, inputs, Policy({("channels", "0"): 2, ("channels", "1"): 1}))
    assert result.get_submodule("1").weight.shape == (4, 2, 1, 1)
    assert result.get_submodule("1").groups == 4


@settings(max_examples=3)
@given(network=cnns(max_blocks=2), tile=st.integers(1, 4))
def test_what_a_target_restricts_can_be_applied(network: Cnn, tile: int) -> None:
    gm, inputs = traced(network, torch.float64)
    space = PruneChannels().search_space(gm).restrict(Capabilities(channel_tile=tile))
    policy = space.decode([0] * len(space))
    if policy != space.default():
        pruned(gm, inputs, policy)


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ((), ["stem.0", "body.0", "body.2"]),
        (("stem.0",), ["body.0", "body.2"]),
        ("stem", ["body.0", "body.2"]),
        (("body.1",), ["stem.0", "body.2"]),
        (("*.0",), ["body.2"]),
        (("body", "stem"), []),
        (("head",), ["stem.0", "body.0", "body.2"]),
    ],
)
def test_the_channels_of_ignored_modules_stay(ignore: Any, left: list[str]) -> None:
    module = nn.Sequential()
    module.add_module("stem", nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    module.add_module("body", nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)))
    module.add_module("head", nn.Conv2d(4, 2, 1))
    gm, _ = prepared(module, 3, 4, 4)
    step = PruneChannels(ignore=ignore)
    assert [decision.site for decision in step.search_space(gm)] == left
    reasons = {entry.site: entry.reason for entry in step.explain(gm)}
    assert [site for site, reason in reasons.items() if reason is None] == left
    gone = [site for site in ("stem.0", "body.0", "body.2") if site not in left]
    for site in gone:
        with pytest.raises(PolicyError, match="ignored by"):
            step.with_policy(Policy({("channels", site): 1}))(gm)


def test_a_pattern_that_matches_nothing_is_a_mistake() -> None:
    module = Wired(lambda m, x: m.second(m.first(x)), first=nn.Linear(3, 4), second=nn.Linear(4, 2))
    gm, _ = prepared(module, 3)
    for use in (PruneChannels(ignore=("frist",)), PruneChannels(ignore=("nothing.*",))):
        with pytest.raises(PassError, match="matches no module"):
            use.search_space(gm)
    with pytest.raises(PassError, match="Did you mean 'first'"):
        PruneChannels(ignore=("frist",))(gm)


# What would be cut.


@settings(max_examples=3)
@given(network=cnns(max_blocks=2))
def test_explain_says_what_is_then_cut(network: Cnn) -> None:
    gm, _ = traced(network, torch.float64)
    before = gm.code
    for decision in PruneChannels().search_space(gm):
        step = PruneChannels({decision.key: decision.choices[0]})
        entries = step.explain(gm)
        (entry,) = [entry for entry in entries if entry.kept < entry.size]
        assert (entry.site, entry.kept, entry.size) == (decision.site, decision.choices[0], decision.default)
        result = step(gm).graph_module
        assert entry.saved_elements == elements(gm) - elements(result)
        mine, yours = dict(gm.named_parameters()), dict(result.named_parameters())
        shrunk = {name.rpartition(".")[0] for name in mine if mine[name].shape != yours[name].shape}
        assert shrunk <= set(entry.layers)
    assert gm.code == before


def test_explain_tells_what_froze_a_group() -> None:
    gm, _ = traced(Transformer(2, 4, 6, 1, True, 0), torch.float64)
    entries = {entry.site: entry for entry in PruneChannels().explain(gm)}
    assert "residual stream" in str(entries["embed"].reason)
    assert "LayerNorm" in str(entries["embed"].reason)
    assert "output" in str(entries["head"].reason)
    assert entries["blocks.0.mlp.0"].reason is None
    assert {entry.operator for entry in entries.values()} == {"embedding", "linear"}
    assert all(entry.kept == entry.size and entry.saved_elements == 0 for entry in entries.values())


def test_a_quantized_graph_is_refused() -> None:
    graph = Quantize()(trace(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.randn(2, 3, 6, 6))).graph_module
    for refusing in (PruneChannels(), PruneChannels().search_space):
        with pytest.raises(PassError, match=r"'0.*' is quantized already"):
            refusing(graph)
