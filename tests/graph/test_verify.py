"""Every rule of canonical graphs, broken on purpose: refused with the node's name and what to do."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from fxopt.errors import VerifyError
from fxopt.graph import edit, trace, verify
from tests.graph.checks import Calls, rows
from tests.strategies import Cnn, Transformer, networks, traced

_aten = torch.ops.aten


@settings(max_examples=5)
@given(networks())
def test_traced_graphs_are_canonical(network: Cnn | Transformer) -> None:
    verify(traced(network)[0])


@pytest.fixture
def gm() -> fx.GraphModule:
    model = Calls(lambda self, x: torch.relu(self.linear(x)) + self.shift, linear=nn.Linear(4, 4), shift=torch.ones(4))
    return trace(model, rows(2))


def node(gm: fx.GraphModule, op: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.op == op)


def call(gm: fx.GraphModule, target: Callable[..., object], kind: str = "call_function") -> str:
    """Put a call in front of the output; its name."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        made = gm.graph.create_node(kind, target, (output.args[0][0],))
    made.meta["val"] = output.args[0][0].meta["val"]
    output.args = ((made,),)
    return made.name


def a_missing_module(gm: fx.GraphModule) -> str:
    name = call(gm, "linear", "call_module")
    gm.graph.output_node().all_input_nodes[0].target = "nowhere"
    return name


def a_deleted_module(gm: fx.GraphModule) -> str:
    gm.delete_submodule("linear")
    return "linear"


def a_deleted_buffer(gm: fx.GraphModule) -> str:
    del gm.shift
    return node(gm, "get_attr").name


def a_value_left_out(gm: fx.GraphModule) -> str:
    del node(gm, "call_function").meta["val"]
    return node(gm, "call_function").name


def an_input_without_value(gm: fx.GraphModule) -> str:
    del node(gm, "placeholder").meta["val"]
    return node(gm, "placeholder").name


def a_read_ahead_of_the_call(gm: fx.GraphModule) -> str:
    gm.graph.output_node().prepend(node(gm, "call_module"))
    return node(gm, "call_module").name


BROKEN = {
    "module": (a_missing_module, "nonexistent attribute nowhere"),
    "deleted module": (a_deleted_module, "linear"),
    "deleted buffer": (a_deleted_buffer, "shift"),
    "method": (lambda gm: call(gm, "relu", "call_method"), "tensor method 'relu'; trace the module with fxopt.trace"),
    "packet": (lambda gm: call(gm, _aten.relu), "no ATen overload; trace the module with fxopt.trace"),
    "torch function": (lambda gm: call(gm, nn.functional.relu), "no ATen overload"),
    "own function": (lambda gm: call(gm, rows), "no ATen overload"),
    "value": (a_value_left_out, "carries no value; end edits with fxopt.graph.edit.finish"),
    "input": (an_input_without_value, "carries no value"),
    "order": (a_read_ahead_of_the_call, "malformed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_told_with_its_node(gm: fx.GraphModule, name: str) -> None:
    verify(gm)
    break_it, said = BROKEN[name]
    broken = break_it(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm)
    assert said in str(caught.value)
    assert broken in str(caught.value)


def test_a_broken_node_is_named_in_the_error(gm: fx.GraphModule) -> None:
    name = a_value_left_out(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm)
    assert caught.value.node == name


def test_a_graph_needs_one_output(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(gm.graph.output_node())
    with pytest.raises(VerifyError, match=r"has 0 outputs; make it with fxopt.trace"):
        verify(gm)


@pytest.mark.parametrize("target", [operator.mul, operator.getitem, math.floor, max, torch.sym_max, _aten.relu.default])
def test_arithmetic_on_shapes_is_canonical(gm: fx.GraphModule, target: Callable[..., object]) -> None:
    call(gm, target)
    verify(gm)


def test_a_symbolic_trace_is_not_canonical() -> None:
    with pytest.raises(VerifyError, match=r"'x' is not canonical.*no value|'input_1' is not canonical"):
        verify(fx.symbolic_trace(nn.Linear(2, 2)))


def test_edits_end_verified(gm: fx.GraphModule) -> None:
    call(gm, _aten.neg.default)
    edit.finish(gm)
    verify(gm)
