"""The conformance suite for passes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt._seeding import seeded
from fxopt.decisions import Capabilities, Policy
from fxopt.errors import FxoptError, PolicyError
from fxopt.graph import trace, verify
from fxopt.graph.edit import fork
from fxopt.graph.shapes import TRACE_META
from fxopt.passes.base import Pass, Pipeline, TunablePass
from fxopt.testing._equivalence import assert_equivalent
from fxopt.testing._expect import expect

__all__ = ["NETWORKS", "PassConformance", "TunablePassConformance", "expect", "traced"]

_Network = Callable[[], tuple[nn.Module, Any]]


class PassConformance:
    """Every promise of a pass, as tests. Subclass it, say which pass, and let pytest collect it.

    Each promise is checked on a few small networks, among them a residual one, one with depthwise and grouped
    convolutions, a multilayer perceptron and a transformer block; add your own with :attr:`more_networks`.

    Example::

        class TestMyPass(PassConformance):
            pass_type = MyPass
            options = {"threshold": 0.5}
            equivalent = True

    Attributes:
        pass_type: The pass's class.
        options: Its fields.
        first: Passes to run on every network before.
        equivalent: Whether the result has to compute what the graph computed.
        tolerance: The largest difference then, as a part of the largest magnitude of an output.
        repeatable: Whether the pass takes its own result, and at last finds nothing to do. One that does not has to
            refuse it.
        more_networks: Functions that give a module and example inputs, by name.
    """

    pass_type: ClassVar[type[Pass]]
    options: ClassVar[dict[str, Any]] = {}
    first: ClassVar[tuple[Pass, ...]] = ()
    equivalent: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-5
    repeatable: ClassVar[bool] = True
    more_networks: ClassVar[Mapping[str, _Network]] = {}

    def make(self) -> Pass:
        """The pass under test."""
        return self.pass_type(**self.options)

    def tuned(self, gm: fx.GraphModule) -> Pass:
        """The pass under test, ready to change this graph."""
        del gm
        return self.make()

    def idle(self, gm: fx.GraphModule) -> Pass:
        """The pass under test as it is applied to a graph that it has changed already."""
        return self.tuned(gm)

    def graphs(self) -> Iterator[tuple[str, fx.GraphModule, Any]]:
        """Name, traced graph and example inputs of every network, in eval mode."""
        for name, make in {**NETWORKS, **self.more_networks}.items():
            graph, example = traced(make)
            gm = fork(graph)
            for step in self.first:
                gm = step(gm).graph_module
            yield name, gm, example

    # What a pass is.

    def test_it_is_a_frozen_dataclass_with_a_name(self) -> None:
        """Its fields are its options; two with the same options are equal, and hashable."""
        made = self.make()
        expect(dataclasses.is_dataclass(made), "a pass is a dataclass")
        expect(made.name != "" and made.name == made.name.lower().replace("_", "-"), f"bad name {made.name!r}")
        expect(made == self.make() and hash(made) == hash(self.make()), "equal options make equal passes")
        for field in dataclasses.fields(made):
            try:
                setattr(made, field.name, None)
            except dataclasses.FrozenInstanceError:
                continue
            raise AssertionError(f"field {field.name!r} can be changed; freeze the dataclass")

    # What it leaves.

    def test_it_leaves_the_given_graph_as_it_was(self) -> None:
        """Graph, modules, modes and every element of every tensor are what they were."""
        for name, gm, _ in self.graphs():
            before = _snapshot(gm)
            self.tuned(gm)(gm)
            expect(_snapshot(gm) == before, f"{name}: the given graph was changed")

    def test_modified_is_honest(self) -> None:
        """False gives the very graph back; True gives one that differs."""
        seen = set()
        for name, gm, _ in self.graphs():
            result = self.tuned(gm)(gm)
            seen.add(result.modified)
            if result.modified:
                expect(_snapshot(result.graph_module) != _snapshot(gm), f"{name}: modified, and yet the same")
            else:
                expect(result.graph_module is gm, f"{name}: not modified, and yet another graph")
        expect(True in seen, "the pass modifies none of the networks; add one with more_networks")

    def test_the_result_is_canonical_and_runs(self) -> None:
        """The code is that of the graph, at other batch sizes too, and its values are finite."""
        for name, gm, example in self.graphs():
            result = self.tuned(gm)(gm).graph_module
            verify(result)
            expect(result.meta.get(TRACE_META) == gm.meta[TRACE_META], f"{name}: the trace's meta is lost")
            assert_equivalent(result, _Interpreted(result), example, relative=0.0, batch=3)

    def test_it_is_deterministic(self) -> None:
        """The same pass on the same graph gives the same graph."""
        for name, gm, _ in self.graphs():
            one, other = (self.tuned(gm)(gm).graph_module for _ in range(2))
            expect(_snapshot(one) == _snapshot(other), f"{name}: two runs differ")

    def test_it_keeps_what_it_computes(self) -> None:
        """An equivalent pass changes no output beyond the tolerance; any pass keeps their structure and shapes."""
        allowed = self.tolerance if self.equivalent else math.inf
        for _, gm, example in self.graphs():
            assert_equivalent(gm, self.tuned(gm)(gm).graph_module, example, relative=allowed, batch=5)

    def test_it_finds_nothing_more_to_do(self) -> None:
        """Applied to its own result the pass comes to an end, or says that it cannot be."""
        for name, gm, _ in self.graphs():
            result, modified = self.tuned(gm)(gm)
            if not self.repeatable:
                if modified:
                    _expect_refused(self.tuned(gm), result, f"{name}: the pass takes its own result")
                continue
            for _ in range(10):
                result, modified = self.idle(result)(result)
                if not modified:
                    break
            expect(not modified, f"{name}: still modified after ten runs")

    def test_the_result_trains(self) -> None:
        """After a backward pass the parameters that were trainable have gradients, and modes can be set."""
        for name, gm, example in self.graphs():
            result = self.tuned(gm)(gm).graph_module
            trained = _copy_of(result).train()
            modes = {module.training for module in trained.modules()}
            expect(modes == {True}, f"{name}: train() does not reach every module")
            outputs = trained(*example) if isinstance(example, tuple) else trained(example)
            outputs.float().square().mean().backward()
            gradients = [p.grad for p in trained.parameters() if p.requires_grad]
            expect(any(grad is not None for grad in gradients), f"{name}: no parameter gets a gradient")

    # Where it runs.

    def test_it_runs_in_torchs_pass_manager_and_in_a_pipeline(self) -> None:
        """Both give what the pass alone gives."""
        for name, gm, _ in self.graphs():
            step = self.tuned(gm)
            alone = step(gm)
            for runner in (PassManager(passes=[step], run_checks_after_each_pass=True), Pipeline((step,))):
                result = runner(gm)
                expect(bool(result.modified) == alone.modified, f"{name}: {type(runner).__name__} reports otherwise")
                same = _snapshot(result.graph_module) == _snapshot(alone.graph_module)
                expect(same, f"{name}: {type(runner).__name__} gives another graph")

    def test_a_graph_that_is_not_canonical_is_refused(self) -> None:
        """The pass says so before it does anything."""
        plain = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
        _expect_refused(self.make(), plain, "a graph without shapes was accepted")


class TunablePassConformance(PassConformance):
    """The promises of a pass that decides something, besides those of every pass.

    Attributes:
        pass_type: The pass's class, a subclass of TunablePass.
    """

    pass_type: ClassVar[type[TunablePass]]

    def make(self) -> TunablePass:
        """The pass under test."""
        return self.pass_type(**self.options)

    def tuned(self, gm: fx.GraphModule) -> TunablePass:
        """The pass with its own policy, or with the first choice of every decision that changes something."""
        made = self.make()
        if made.policy is not None:
            return made
        first = {
            decision.key: next((choice for choice in decision.choices if choice != decision.default), decision.default)
            for decision in made.search_space(gm)
        }
        return made.with_policy(Policy(first))

    def idle(self, gm: fx.GraphModule) -> TunablePass:
        """The pass with every decision at its default."""
        made = self.make()
        return made.with_policy(made.search_space(gm).default())

    def test_the_default_policy_changes_nothing(self) -> None:
        """Every decision's default leaves the model as it is."""
        for name, gm, _ in self.graphs():
            step = self.make()
            result = step.with_policy(step.search_space(gm).default())(gm)
            expect(not result.modified, f"{name}: the default policy modifies the graph")

    def test_declaring_decisions_changes_nothing(self) -> None:
        """The search space is the same at every call, and the graph is left alone."""
        for name, gm, _ in self.graphs():
            step = self.make()
            before = _snapshot(gm)
            spaces = [step.search_space(gm, Capabilities()) for _ in range(2)]
            expect(spaces[0] == spaces[1], f"{name}: two calls give two spaces")
            expect(_snapshot(gm) == before, f"{name}: declaring decisions changes the graph")
            kinds = {decision.kind for decision in spaces[0]}
            expect(kinds <= set(step.kinds), f"{name}: decides {kinds}, which is more than its kinds {step.kinds}")

    def test_every_policy_of_the_space_applies(self) -> None:
        """Sampled policies give graphs that run, and the JSON of a policy gives the same graph."""
        rng = np.random.default_rng(0)
        for name, gm, _ in self.graphs():
            step = self.make()
            policy = step.search_space(gm).sample(rng)
            result = step.with_policy(policy)(gm).graph_module
            again = step.with_policy(Policy.from_json(policy.to_json()))(gm).graph_module
            expect(_snapshot(result) == _snapshot(again), f"{name}: a policy from JSON gives another graph")

    def test_decisions_of_other_passes_are_left_alone(self) -> None:
        """A policy may hold decisions of kinds that are not this pass's."""
        for name, gm, _ in self.graphs():
            step = self.make()
            policy = step.search_space(gm).default().merged({("another kind", "nowhere"): 1})
            expect(not step.with_policy(policy)(gm).modified, f"{name}: a foreign decision changes the graph")

    def test_a_policy_of_another_model_is_refused(self) -> None:
        """It is a PolicyError that names the site, and the graph stays as it was."""
        for name, gm, _ in self.graphs():
            step = self.make()
            before = _snapshot(gm)
            try:
                step.with_policy(Policy({(step.kinds[0], "no.such.site"): 1}))(gm)
            except PolicyError as failure:
                expect("no.such.site" in str(failure), f"{name}: the message does not name the site: {failure}")
                expect(_snapshot(gm) == before, f"{name}: a failing pass changed the graph")
                continue
            raise AssertionError(f"{name}: a policy of another model was accepted")


@functools.cache
def traced(make: _Network) -> tuple[fx.GraphModule, Any]:
    with seeded(0):
        module, example = make()
        _randomize_statistics(module)
    return trace(module.eval(), example), example


def _randomize_statistics(module: nn.Module) -> None:
    """Batch norms as after training, so that leaving one out shows."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)


def _copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A deep copy; torch's own copying of a graph's signature warns of itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(gm)


class _Interpreted(nn.Module):
    """A graph run node by node, without its generated code."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.gm = gm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.gm.graph.process_inputs(*args, **kwargs)
        return self.gm.graph.process_outputs(fx.Interpreter(self.gm).run(*flat, enable_io_processing=False))


def _snapshot(gm: fx.GraphModule) -> dict[str, Any]:
    """All that a graph is, in comparable form."""
    modules = {
        path: (type(module).__name__, module.training, module.extra_repr() if path else "")
        for path, module in gm.named_modules(remove_duplicate=False)
        if not isinstance(module, fx.GraphModule)
    }
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    buffers = dict(gm.named_buffers(remove_duplicate=False))
    return {
        "graph": [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in gm.graph.nodes],
        "code": gm.code,
        "meta": repr(gm.meta),
        "modules": modules,
        "parameters": {name: (_content(value), value.requires_grad) for name, value in parameters.items()},
        "buffers": {name: _content(value) for name, value in buffers.items()},
        "keys": list(gm.state_dict()),
    }


def _content(tensor: torch.Tensor) -> tuple[Any, ...]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return (tensor.dtype, tuple(tensor.shape), data)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        found: torch.Tensor = self.head(self.drop(x.mean((2, 3)) * 1))
        return found


class _Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6())
        self.grouped = nn.Conv2d(12, 8, 1, groups=2)
        self.project = nn.Conv2d(8, 4, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.grouped(self.depthwise(self.expand(x))))
        found: torch.Tensor = self.head(x + self.project(y))
        return found


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mix = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + torch.arange(8.0)
        heads = self.qkv(self.norm(x)).view(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        x = x + self.mix(y.transpose(1, 2).reshape(x.shape))
        found: torch.Tensor = self.head((x + self.mlp(x)).mean(1))
        return found


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 5))


NETWORKS: dict[str, _Network] = {
    "residual": lambda: (_Residual(), torch.randn(2, 3, 6, 6)),
    "mobile": lambda: (_Mobile(), torch.randn(2, 4, 6, 6)),
    "perceptron": lambda: (_perceptron(), torch.randn(2, 6)),
    "transformer": lambda: (_Transformer(), torch.randint(0, 11, (2, 7))),
}


def _expect_refused(step: Pass, gm: fx.GraphModule, message: str) -> None:
    try:
        step(gm)
    except FxoptError:
        return
    raise AssertionError(message)
