"""The table of operators: consistent with torch and with the rules of channels; what is not in it is a barrier."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn

from fxopt.graph import _labels, ops, trace
from fxopt.graph.channels import analyze
from tests.graph.checks import Calls, image, rows
from tests.strategies import Cnn, Transformer, networks, traced

_aten = torch.ops.aten
KNOWN = {**ops._FUNCTIONS, **ops._MODULES}


def test_every_meaning_is_consistent() -> None:
    for meaning in KNOWN.values():
        assert meaning.flow in _labels._RULES, meaning
        assert not meaning.activation or meaning.kind == "elementwise", meaning
        assert not meaning.fuses or meaning.kind in ("elementwise", "norm", "none"), meaning


def test_every_function_of_the_table_is_torchs() -> None:
    unknown = [name for name in ops._FUNCTIONS if not hasattr(_aten, name.removeprefix("aten::"))]
    assert not unknown


def test_every_module_of_torch_that_is_an_activation_is_in_the_table() -> None:
    unary = (nn.Threshold, nn.Softsign, nn.LogSigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink)
    listed = [cls for cls, meaning in ops._MODULES.items() if meaning.activation]
    assert not set(unary) & set(listed)
    for cls in listed:
        module = cls()
        x = torch.linspace(-3.0, 3.0, 8).view(2, 4)
        whole = module(x)
        for column in range(4):
            torch.testing.assert_close(module(x[:, column]), whole[:, column])


def meanings(model: nn.Module, example: Tensor) -> list[ops.OpSemantics]:
    gm = trace(model, example)
    return [ops.semantics(gm, node) for node in gm.graph.nodes]


def test_the_meaning_of_modules_functions_and_ends() -> None:
    model = Calls(
        lambda self, x: torch.relu(self.conv(x)).flatten(1) * self.scale, conv=nn.Conv2d(3, 4, 3), scale=torch.ones(64)
    )
    found = {meaning.name: meaning for meaning in meanings(model, image(2))}
    assert list(found) == ["parameter", "input", "Conv2d", "relu", "flatten", "mul", "output"]
    assert (found["Conv2d"].kind, found["Conv2d"].flow) == ("conv", "conv")
    assert found["relu"].activation
    assert found["relu"].fuses
    assert (found["mul"].kind, found["mul"].flow) == ("elementwise", "broadcast")
    assert found["input"].kind == found["output"].kind == found["flatten"].kind == "none"


def test_subclasses_mean_what_their_bases_do() -> None:
    class Own(nn.Linear):
        pass

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    gm = fx.symbolic_trace(nn.Sequential(nn.Identity()))
    (node,) = gm.graph.find_nodes(op="call_module")
    for module, name, flow in ((Own(2, 2), "Linear", "linear"), (Unknown(), "Unknown", "barrier")):
        gm.add_submodule("0", module)
        assert (ops.semantics(gm, node).name, ops.semantics(gm, node).flow) == (name, flow)


def test_arithmetic_on_shapes_costs_nothing() -> None:
    model = Calls(lambda self, x: x.view(x.shape[0] * x.shape[1] // 2, 2))
    gm = trace(model, rows(2))
    scalars = [node for node in gm.graph.nodes if isinstance(node.meta.get("val"), int)]
    assert scalars
    assert {(ops.semantics(gm, node).kind, ops.semantics(gm, node).flow) for node in scalars} == {("none", "scalar")}


def test_what_writes_in_place_is_a_barrier() -> None:
    def write(self: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].add_(1)
        return y

    found = [meaning for meaning in meanings(Calls(write), rows(2)) if meaning.name == "aten.add_.Tensor"]
    assert [(meaning.kind, meaning.flow) for meaning in found] == [("unknown", "barrier")]


UNKNOWN = {
    "fft": lambda x: torch.fft.rfft(x).real,
    "sort": lambda x: torch.sort(x, dim=1)[0],
    "einsum": lambda x: torch.einsum("bchw,bchw,bchw->bc", x, x, x),
    "roll": lambda x: x.roll(1, 1),
    "topk": lambda x: torch.topk(x, 2, dim=1)[0],
    "gather": lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_operator_freezes_what_it_reads_and_says_so(name: str) -> None:
    function = UNKNOWN[name]
    model = Calls(lambda self, x: function(self.b(torch.relu(self.a(x)))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 5, 1))
    gm = trace(model, image(2))
    channels = analyze(gm)
    assert [(group.site, group.size) for group in channels.groups] == [("a", 4)]
    (frozen,) = [group for group in channels.frozen if group.site == "b"]
    assert frozen.frozen_by
    readers = [node.name for node in gm.graph.find_nodes(op="call_module", target="b")[0].users]
    assert any(reader in frozen.frozen_by for reader in readers)


@settings(max_examples=5)
@given(networks())
def test_all_of_the_usual_networks_is_known(network: Cnn | Transformer) -> None:
    gm, _ = traced(network)
    assert not [node for node in gm.graph.nodes if ops.semantics(gm, node).kind == "unknown"]


def test_one_can_add_an_operator() -> None:
    gm = trace(Calls(lambda self, x: torch.special.ndtr(self.a(x)), a=nn.Linear(4, 4)), rows(2))
    node = gm.graph.output_node().all_input_nodes[0]
    name = node.target._schema.name
    assert ops.semantics(gm, node).flow == "barrier"
    try:
        ops.register_function(name, ops.OpSemantics("ndtr", "elementwise", "unary", activation=True))
        assert ops.semantics(gm, node).name == "ndtr"
        assert ops.is_activation(gm, node)
    finally:
        del ops._FUNCTIONS[name]


def test_arguments_by_name() -> None:
    gm = trace(Calls(lambda self, x: torch.add(x, x, alpha=2).sum((1,), True)), rows(2))
    entry, add, total, _ = gm.graph.nodes
    assert ops.arguments(add) == {"self": entry, "other": entry, "alpha": 2}
    assert ops.arguments(total) == {"self": add, "dim": [1], "keepdim": True, "dtype": None}
    gm = trace(Calls(lambda self, x: x.view(x.shape[0] * 2, 2)), rows(2))
    (product,) = [node for node in gm.graph.nodes if "mul" in node.name]
    assert list(ops.arguments(product)) == ["0", "1"]


def test_the_table_is_public() -> None:
    assert all(inspect.getdoc(getattr(ops, name)) for name in ops.__all__ if callable(getattr(ops, name)))
