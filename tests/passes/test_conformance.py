"""Every pass keeps every promise of fxopt.testing.PassConformance; a pass that breaks one is caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from fxopt.graph import edit
from fxopt.passes import (
    Canonicalize,
    EqualizeWeights,
    FoldBatchNorm,
    Pass,
    PassResult,
    Pipeline,
    PruneChannels,
    SelectOperators,
    SparsifyWeights,
)
from fxopt.testing import PassConformance, TunablePassConformance, assert_equivalent


class TestCanonicalize(PassConformance):
    pass_type = Canonicalize
    equivalent = True
    tolerance = 0.0


class TestCanonicalizeForInference(PassConformance):
    pass_type = Canonicalize
    options: ClassVar = {"for_inference": True}
    equivalent = True
    tolerance = 0.0


class TestFoldBatchNorm(PassConformance):
    pass_type = FoldBatchNorm
    equivalent = True


class TestEqualizeWeights(PassConformance):
    pass_type = EqualizeWeights
    equivalent = True


class TestPruneChannels(TunablePassConformance):
    pass_type = PruneChannels
    options: ClassVar = {"round_to": 2}


class TestSelectOperators(TunablePassConformance):
    pass_type = SelectOperators
    options: ClassVar = {"kernels": (5, 3)}


class TestSparsifyWeights(TunablePassConformance):
    pass_type = SparsifyWeights
    options: ClassVar = {"fractions": (0.5,), "patterns": ("2:4", "kernel:3")}


class TestPipeline(PassConformance):
    pass_type = Pipeline
    options: ClassVar = {"passes": (Canonicalize(), FoldBatchNorm())}
    equivalent = True


@dataclass(frozen=True)
class Careless(Pass):
    """A pass that breaks the promise that ``how`` names."""

    name: ClassVar[str] = "careless"
    how: str = ""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        linear = next(path for path, module in graph_module.named_modules() if isinstance(module, nn.Linear))
        module = graph_module.get_submodule(linear)
        if self.how == "writes into a tensor":
            module.weight.data.mul_(1.5)
        elif self.how == "claims a change":
            return PassResult(graph_module, True)
        elif self.how == "adds an output":
            copy = edit.clone_module(module)
            copy.weight = nn.Parameter(torch.cat([module.weight, module.weight]).detach())
            copy.bias = nn.Parameter(torch.cat([module.bias, module.bias]).detach())
            edit.replace_module(graph_module, linear, copy)
        else:
            copy = edit.clone_module(module)
            factor = 0.5 if self.how == "changes outputs" else torch.rand(1).item() + 0.1
            copy.weight = nn.Parameter(module.weight.detach() * factor)
            edit.replace_module(graph_module, linear, copy)
        edit.finish(graph_module)
        return PassResult(graph_module, True)


@pytest.mark.parametrize(
    ("how", "promise"),
    [
        ("writes into a tensor", "test_it_leaves_the_given_graph_as_it_was"),
        ("claims a change", "test_modified_is_honest"),
        ("changes outputs", "test_it_keeps_what_it_computes"),
        ("changes outputs", "test_it_finds_nothing_more_to_do"),
        ("is random", "test_it_is_deterministic"),
        ("adds an output", "test_it_keeps_what_it_computes"),
    ],
)
def test_the_suite_catches_a_broken_promise(how: str, promise: str) -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU())

    class Suite(PassConformance):
        pass_type = Careless
        options: ClassVar = {"how": how}
        equivalent = True
        more_networks: ClassVar = {"fresh": lambda: (network, torch.randn(2, 3))}

        def graphs(self):
            return (found for found in super().graphs() if found[0] == "fresh")

    with pytest.raises(AssertionError):
        getattr(Suite(), promise)()


def test_equivalence_tells_what_differs() -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(2, 3)
    assert_equivalent(one, one, x, relative=0.0, batch=4)
    with pytest.raises(AssertionError, match="On the example, output 0 differs by"):
        assert_equivalent(one, other, x)
    with pytest.raises(AssertionError, match=r"is \(2, 2\) .* and \(2, 4\)"):
        assert_equivalent(one, nn.Linear(3, 4), x)
    assert_equivalent(one, other, x, relative=float("inf"))
    with pytest.raises(AssertionError, match="another structure"):
        assert_equivalent(one, nn.LSTM(3, 2), x, relative=float("inf"))


def test_equivalence_compares_relative_to_the_largest_output() -> None:
    one = nn.Linear(3, 2).double()
    other = nn.Linear(3, 2).double()
    other.load_state_dict({name: value * (1 + 1e-9) for name, value in one.state_dict().items()})
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_equivalent(one, other, x, relative=1e-8)
    with pytest.raises(AssertionError):
        assert_equivalent(one, other, x, relative=1e-10)


def test_equivalence_sees_nan() -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.bias[0] = float("nan")
    with pytest.raises(AssertionError, match="differs by nan"):
        assert_equivalent(one, other, torch.randn(2, 3))
