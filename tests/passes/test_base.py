"""The life of a pass, pipelines, torch's pass manager, and the passes by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase
from torch.fx.passes.infra.pass_manager import PassManager, this_before_that_pass_constraint

from fxopt import passes
from fxopt.decisions import Policy
from fxopt.errors import PassError, PolicyError, UnknownNameError, VerifyError
from fxopt.graph import edit, trace, verify
from fxopt.graph.edit import fork
from fxopt.passes import Canonicalize, FoldBatchNorm, Pass, PassResult, Pipeline, PruneChannels, TunablePass
from fxopt.testing import assert_equivalent


class Net(nn.Module):
    """Two outputs in a dict, a layer called twice, a parameter read directly, a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.unused = nn.Linear(2, 2)
        self.register_buffer("note", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(self.conv(x))) * self.scale
        return {"features": y, "mean": torch.relu(y).mean((2, 3))}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def gm(model: nn.Module) -> fx.GraphModule:
    return trace(model, torch.randn(2, 3, 5, 5))


@dataclass(frozen=True)
class Scale(Pass):
    """Halves the convolution's weights, and then fails if told to."""

    name: ClassVar[str] = "scale"
    failure: Exception | None = None
    log: list[Any] = field(default_factory=list, compare=False)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        copy = edit.clone_module(graph_module.get_submodule("conv"))
        copy.weight = nn.Parameter(copy.weight.detach() / 2)
        edit.replace_module(graph_module, "conv", copy)
        relu = next(node for node in graph_module.graph.nodes if node.target is torch.ops.aten.relu.default)
        edit.replace_uses(relu, relu.args[0])
        graph_module.get_submodule("norm").momentum = 0.5
        graph_module.get_submodule("norm").train()
        if self.failure:
            raise self.failure
        edit.finish(graph_module)
        return PassResult(graph_module, True)

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.log.append(("requires", graph_module))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.log.append(("ensures", graph_module))


@dataclass(frozen=True)
class Returns(Pass):
    """Returns what it is told."""

    name: ClassVar[str] = "returns"
    what: Any = None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        return self.what(graph_module) if callable(self.what) else self.what


def state(gm: fx.GraphModule) -> list[Any]:
    modules = [(name, id(module), module.training) for name, module in gm.named_modules()]
    tensors = [(name, id(value), value.clone()) for name, value in gm.state_dict(keep_vars=True).items()]
    return [gm.code, str(gm.graph), modules, [name_id[:2] for name_id in tensors], gm.get_submodule("norm").momentum]


# The life of a pass.


def test_the_given_graph_stays_and_the_result_is_new(gm: fx.GraphModule, model: nn.Module) -> None:
    before = state(gm)
    result = Scale()(gm)
    assert result.modified
    assert result.graph_module is not gm
    assert state(gm) == before
    assert gm.get_submodule("conv").weight is model.conv.weight
    assert torch.equal(result.graph_module.get_submodule("conv").weight * 2, model.conv.weight)


@pytest.mark.parametrize("failure", [RuntimeError("boom"), PolicyError("not this one"), KeyError("x")])
def test_a_failing_pass_leaves_the_graph_as_it_was(gm: fx.GraphModule, model: nn.Module, failure: Exception) -> None:
    before, weight = state(gm), model.conv.weight.detach().clone()
    with pytest.raises((PassError, PolicyError)):
        Scale(failure)(gm)
    assert state(gm) == before
    assert torch.equal(model.conv.weight, weight)
    verify(gm)


def test_errors_on_purpose_pass_and_others_are_wrapped(gm: fx.GraphModule) -> None:
    with pytest.raises(PolicyError, match=r"^not this one$"):
        Scale(PolicyError("not this one"))(gm)
    with pytest.raises(PassError, match="Pass 'scale' failed: RuntimeError: boom") as raised:
        Scale(RuntimeError("boom"))(gm)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_requires_sees_the_graph_and_ensures_the_result(gm: fx.GraphModule) -> None:
    step = Scale()
    result = step(gm)
    assert step.log == [("requires", gm), ("ensures", result.graph_module)]


def test_a_graph_that_is_not_canonical_is_refused_before(gm: fx.GraphModule) -> None:
    step = Scale()
    for node in gm.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(VerifyError):
        step(gm)
    assert step.log == []


def test_a_result_that_is_not_canonical_is_refused(gm: fx.GraphModule) -> None:
    def breaks(graph: fx.GraphModule) -> PassResult:
        next(iter(graph.graph.nodes)).meta.pop("val")
        return PassResult(graph, True)

    with pytest.raises(PassError, match="Pass 'returns' left a graph that is not canonical"):
        Returns(breaks)(gm)
    verify(gm)


@pytest.mark.parametrize("what", [None, 3, PassResult(nn.ReLU(), True)])
def test_a_pass_returns_a_pass_result(gm: fx.GraphModule, what: object) -> None:
    with pytest.raises(PassError, match=r"return a PassResult"):
        Returns(what)(gm)


def test_what_is_not_modified_is_the_given_graph(gm: fx.GraphModule) -> None:
    assert Returns(lambda graph: PassResult(graph, False))(gm) == PassResult(gm, False)


# The private copy.


def test_a_fork_computes_the_same_from_the_same_tensors(gm: fx.GraphModule, model: nn.Module) -> None:
    twin = fork(gm)
    assert_equivalent(gm, twin, torch.randn(2, 3, 5, 5), relative=0.0, batch=4)
    assert list(twin.state_dict()) == list(gm.state_dict()) == list(model.state_dict())
    mine, yours = dict(gm.named_parameters()), dict(twin.named_parameters())
    assert mine.keys() == yours.keys()
    assert all(mine[name] is yours[name] for name in mine)
    assert [name for name, _ in twin.named_buffers()] == [name for name, _ in gm.named_buffers()]
    assert twin.meta == gm.meta
    verify(twin)


def test_edits_of_a_fork_do_not_reach_the_original(gm: fx.GraphModule) -> None:
    before = state(gm)
    twin = fork(gm)
    twin.train()
    twin.meta["more"] = 1
    conv = twin.get_submodule("conv")
    conv.register_forward_hook(lambda *_: None)
    conv.bias = None
    twin.get_submodule("norm").register_buffer("extra", torch.zeros(1))
    twin.delete_submodule("unused")
    twin.graph.erase_node(twin.graph.output_node())
    assert state(gm) == before
    assert "more" not in gm.meta
    assert not gm.get_submodule("conv")._forward_hooks
    gm(torch.randn(2, 3, 5, 5))


def test_what_is_shared_within_a_graph_is_shared_within_its_fork() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3)
            self.two = self.one

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    twin = fork(trace(Shared(), torch.randn(2, 3)))
    modules = [module for _, module in twin.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)]
    assert len(modules) == 2
    assert modules[0] is modules[1]


# Pipelines.


class TorchPass(PassBase):
    """One of torch's: edits in place, and puts in a node that carries no value yet."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
            node.target = torch.ops.aten.sigmoid.default
            with graph_module.graph.inserting_after(node):
                twice = graph_module.graph.call_function(torch.ops.aten.neg.default, (node,))
            node.replace_all_uses_with(twice, delete_user_cb=lambda user, twice=twice: user is not twice)
        graph_module.recompile()
        return PassResult(graph_module, True)


def remove_relu(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):
        node.replace_all_uses_with(node.args[0])


def do_nothing(graph_module: fx.GraphModule) -> PassResult:
    return PassResult(graph_module, False)


def fail(graph_module: fx.GraphModule) -> None:
    remove_relu(graph_module)
    raise ValueError("boom")


@pytest.mark.parametrize("foreign", [TorchPass(), PassManager([TorchPass()]), remove_relu])
def test_torchs_passes_run_in_a_pipeline(gm: fx.GraphModule, foreign: Any) -> None:
    before = state(gm)
    result = Pipeline((Scale(), foreign, Canonicalize()) if foreign is not remove_relu else (foreign,))(gm)
    assert result.modified
    assert state(gm) == before
    verify(result.graph_module)
    assert not result.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)


def test_a_pipeline_is_its_passes_in_order(gm: fx.GraphModule) -> None:
    one, other = FoldBatchNorm(), PruneChannels()
    expected = other(one(gm).graph_module).graph_module
    result = Pipeline((one, Pipeline([other])))(gm)
    assert str(result.graph_module.graph) == str(expected.graph)
    assert Pipeline((one, other)) == Pipeline([one, other])
    assert hash(Pipeline((one, other))) == hash(Pipeline([one, other]))


@pytest.mark.parametrize("steps", [(), (do_nothing,), (Pipeline(), do_nothing, PruneChannels())])
def test_a_pipeline_that_does_nothing_gives_the_graph_back(gm: fx.GraphModule, steps: tuple[Any, ...]) -> None:
    assert Pipeline(steps)(gm) == PassResult(gm, False)


def test_a_pipeline_names_the_pass_that_failed_and_those_before(gm: fx.GraphModule) -> None:
    before = state(gm)
    with pytest.raises(PassError, match=r"stopped at 'fail', after canonicalize, TorchPass: .*boom") as raised:
        Pipeline((Canonicalize(), TorchPass(), fail, Scale()))(gm)
    assert isinstance(raised.value.__cause__, PassError)
    assert state(gm) == before
    with pytest.raises(PassError, match="stopped at 'prune-channels', the first pass: The graph has no") as raised:
        Pipeline((PruneChannels({("channels", "nowhere"): 1}),))(gm)
    assert isinstance(raised.value.__cause__, PolicyError)


def test_a_function_that_returns_something_else_is_named(gm: fx.GraphModule) -> None:
    def odd(graph_module: fx.GraphModule) -> int:
        return 3

    with pytest.raises(PassError, match="Pass 'odd' returned no GraphModule"):
        Pipeline((odd,))(gm)


@pytest.mark.parametrize("bad", [(Canonicalize,), (3,), Canonicalize(), 3])
def test_a_pipeline_takes_instances(bad: Any) -> None:
    with pytest.raises(PassError, match="Pipeline takes"):
        Pipeline(bad)


# torch's pass manager.


def test_passes_run_in_torchs_pass_manager(gm: fx.GraphModule) -> None:
    fold, clean = FoldBatchNorm(), Canonicalize(for_inference=True)
    order = this_before_that_pass_constraint(fold, clean)
    manager = PassManager([clean, fold], [order], run_checks_after_each_pass=True)
    manager.add_checks(verify)
    result = manager(gm)
    assert manager.passes == [fold, clean]
    assert not result.modified
    assert result.graph_module is gm


def test_the_pass_manager_runs_until_nothing_changes() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval(), torch.randn(2, 3))
    manager = PassManager([FoldBatchNorm(), Canonicalize(), TorchPass()], steps=2)
    result = manager(gm)
    assert result.modified
    assert [type(module) for module in result.graph_module.children()] == [nn.Linear, nn.Linear]


def test_the_pass_manager_chains_the_cause(gm: fx.GraphModule) -> None:
    with pytest.raises(Exception, match="'Scale' pass after the following passes: \\['Canonicalize'\\]") as raised:
        PassManager([Canonicalize(), Scale(RuntimeError("boom"))])(gm)
    assert isinstance(raised.value.__cause__, PassError)


# Policies.


def test_a_policy_may_be_any_mapping() -> None:
    choices = {("channels", "conv"): 2, ("bits", "conv"): (8, 8)}
    step = PruneChannels(choices)
    assert step.policy == Policy(choices)
    assert step.own_choices == {("channels", "conv"): 2}
    assert step.with_policy(Policy()) == PruneChannels(Policy())
    assert PruneChannels(ignore=("a",)).with_policy(Policy()).ignore == ("a",)
    with pytest.raises(PolicyError):
        PruneChannels({"conv": 2})


# Names.


def test_every_name_leads_to_its_pass() -> None:
    for name in passes.names():
        assert passes.load(name).name == name
        assert issubclass(passes.load(name), Pass)
    assert {"canonicalize", "fold-batch-norm", "prune-channels", "quantize"} <= set(passes.names())
    assert passes.create("prune-channels", round_to=8) == PruneChannels(round_to=8)
    assert issubclass(passes.load("prune-channels"), TunablePass)


def test_a_wrong_name_suggests_the_right_one() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'prune-channels'\?"):
        passes.create("prune_chanels")
    with pytest.raises(PassError, match="no option 'rounding'; its options are policy, ignore, bounds, round_to"):
        passes.create("prune-channels", rounding=8)


def test_passes_are_registered_by_class_or_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes._PASSES, "_entries", dict(passes._PASSES._entries))
    passes.register("scale", Scale)
    assert isinstance(passes.create("scale"), Scale)
    passes.register("again", "fxopt.passes.canonicalize:Canonicalize")
    assert passes.create("again") == Canonicalize()
    with pytest.raises(PassError, match="already"):
        passes.register("scale", Scale)
    for path in ("nowhere", "fxopt.passes:", ":Scale"):
        with pytest.raises(PassError, match="has the form"):
            passes.register("bad", path)
    for name, path in (("gone", "fxopt.nowhere:Pass"), ("other", "fxopt.errors:PassError")):
        passes.register(name, path)
        with pytest.raises(PassError, match=name):
            passes.load(name)


def test_names_cost_no_torch() -> None:
    code = "import sys, fxopt.passes as p; p.names(); dir(p); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = passes.Nothing
