"""Canonicalize: what goes, what only looks as if it could go, and that nothing computed changes by a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from fxopt.errors import PassError
from fxopt.graph import edit, trace
from fxopt.passes import Canonicalize
from fxopt.testing import assert_equivalent
from tests.strategies import Cnn, Transformer, networks, traced

Function = Callable[..., Any]


class Calls(nn.Module):
    """A function of the input and of the module, between two layers."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.0)
        self.drop_some = nn.Dropout(0.5)
        self.register_buffer("table", torch.arange(4.0))
        self.gain = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self, self.first(x)))


def between(function: Function, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule, list[fx.Node]]:
    """The traced graph, the canonical one, and the calls between its two layers."""
    torch.manual_seed(0)
    example = torch.randn(2, 3, 4, 4)
    gm = trace(Calls(function), example)
    result = Canonicalize(**options)(gm)
    assert_equivalent(gm, result.graph_module, example, relative=0.0, batch=3)
    again = Canonicalize(**options)(result.graph_module)
    assert not again.modified
    assert list(result.graph_module.state_dict()) == list(gm.state_dict())
    assert result.modified == (str(result.graph_module.graph) != str(gm.graph))
    calls = [
        node
        for node in result.graph_module.graph.nodes
        if node.op in ("call_module", "call_function") and node.target not in ("first", "last")
    ]
    return gm, result.graph_module, calls


def functions(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


GONE: dict[str, Function] = {
    "dropout at rate 0": lambda m, x: m.drop(x),
    "switched-off dropout": lambda m, x: nn.functional.dropout(x, 0.3, training=False),
    "clone": lambda m, x: x.clone(),
    "alias": lambda m, x: torch.ops.aten.alias.default(x),
    "to its own type": lambda m, x: x.to(torch.float32),
    "copy to its own type": lambda m, x: x.to(torch.float32, copy=True),
    "slice of everything": lambda m, x: x[:],
    "slice as long as the dimension": lambda m, x: x[:, 0:4, :100],
    "view to the shape it has": lambda m, x: x.view(x.shape),
    "reshape of everything but one size": lambda m, x: x.reshape(x.shape[0], 4, 4, -1),
    "flatten of one dimension": lambda m, x: torch.flatten(x, 3),
    "expansion to the shape it has": lambda m, x: x.expand(-1, 4, -1, -1),
    "squeeze of a wide dimension": lambda m, x: x.squeeze(1),
    "permutation that leaves the order": lambda m, x: x.permute(0, 1, -2, -1),
    "transposition of a dimension with itself": lambda m, x: x.transpose(-1, 3),
    "padding by nothing": lambda m, x: nn.functional.pad(x, (0, 0, 0, 0)),
    "concatenation of one": lambda m, x: torch.cat([x], 1),
    "plus zero": lambda m, x: x + 0,
    "minus zero": lambda m, x: x - 0.0,
    "times one": lambda m, x: x * 1,
    "by one": lambda m, x: x / 1.0,
    "to the first power": lambda m, x: x**1,
    "a chain": lambda m, x: (m.drop(x.clone()) * 1)[:] + 0,
}

STAYS: dict[str, Function] = {
    "dropout": lambda m, x: m.drop_some(x),
    "contiguous of a transposed tensor": lambda m, x: x.transpose(2, 3).contiguous(),
    "to another type": lambda m, x: x.to(torch.float64).to(torch.float32),
    "detach": lambda m, x: x.detach(),
    "slice that leaves one out": lambda m, x: torch.ops.aten.slice.Tensor(x, 2, 1, 4),
    "slice by steps": lambda m, x: torch.ops.aten.slice.Tensor(x, 2, 0, 4, 2),
    "view to another shape and back": lambda m, x: x.view(x.shape[0], 16, 4).view(x.shape[0], 4, 4, 4),
    "transposition": lambda m, x: x.transpose(2, 3),
    "permutation": lambda m, x: x.permute(0, 1, 3, 2),
    "padding": lambda m, x: nn.functional.pad(x, (1, 0, 0, 0)),
    "concatenation with itself": lambda m, x: torch.cat([x, x], 2),
    "plus one": lambda m, x: x + 1,
    "zero minus": lambda m, x: 0 - x,
    "times zero": lambda m, x: x * 0,
    "to the second power": lambda m, x: x**2,
    "rounded division by one": lambda m, x: torch.div(x, 1, rounding_mode="floor"),
    "a parameter's product": lambda m, x: x * m.gain,
    "expansion that is read otherwise": lambda m, x: x.mean(1, True).expand_as(x).relu(),
    "expansion without another operand": lambda m, x: x.mean(1, True).expand_as(x) * 2.0,
    "batch as a number": lambda m, x: x * x.shape[0],
    "random numbers": lambda m, x: x + 0.0 * torch.rand(4, 1, 1),
}


@pytest.mark.parametrize("what", GONE)
def test_what_computes_nothing_goes(what: str) -> None:
    gm, result, calls = between(GONE[what])
    assert calls == []
    assert result is not gm


@pytest.mark.parametrize("what", STAYS)
def test_what_only_looks_like_it_stays(what: str) -> None:
    gm, result, calls = between(STAYS[what])
    assert calls
    assert result is gm


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * x.mean((2, 3), True).expand_as(x),
        lambda m, x: x.mean((2, 3), True).expand(-1, 4, 4, 4) - x,
        lambda m, x: x / (2.0 + torch.sigmoid(m.gain)).expand_as(x),
    ],
)
def test_an_expansion_goes_where_its_reader_expands(function: Function) -> None:
    _, _, calls = between(function)
    assert calls
    assert not [node for node in calls if "expand" in str(node.target)]


def test_one_expansion_stays_where_both_are_expanded() -> None:
    _, _, calls = between(lambda m, x: x.mean((2, 3), True).expand_as(x) * x.mean(1, True).expand_as(x))
    assert len([node for node in calls if "expand" in str(node.target)]) == 1


@pytest.mark.parametrize("what", ["dropout", "detach"])
def test_for_inference_drops_what_serves_training(what: str) -> None:
    _, _, calls = between(STAYS[what], for_inference=True)
    assert calls == []


def test_dropout_stays_a_module_that_trains() -> None:
    gm, result, _ = between(lambda m, x: m.drop_some(m.drop(x)))
    assert result is not gm
    assert isinstance(result.get_submodule("drop_some"), nn.Dropout)
    assert "drop" not in dict(result.named_modules())
    assert "drop" in dict(gm.named_modules())


def test_identity_modules_go_and_hooked_ones_stay() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    layer = gm.graph.find_nodes(op="call_module", target="0")[0]
    node = edit.insert_module(gm, "identity", nn.Identity(), layer, (layer,))
    edit.replace_uses(layer, node)
    edit.finish(gm)
    result = Canonicalize()(gm)
    assert result.modified
    assert not result.graph_module.graph.find_nodes(op="call_module", target="identity")
    gm.get_submodule("identity").register_forward_hook(lambda *_: None)
    assert not Canonicalize()(gm).modified


def test_a_type_that_differs_is_no_identity() -> None:
    class Counts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 1.0) + (x + 0)

    gm = trace(Counts(), torch.randint(0, 9, (2, 3)))
    result = Canonicalize()(gm).graph_module
    assert functions(result) == [torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor]
    assert_equivalent(gm, result, torch.randint(0, 9, (2, 3)), relative=0.0)


@pytest.mark.parametrize(("reader", "stays"), [(torch.ops.aten.view.default, True), (torch.ops.aten.add.Tensor, False)])
def test_contiguous_stays_before_a_view_that_other_layouts_would_break(reader: Any, stays: bool) -> None:
    gm = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 4, 4))
    layer = gm.graph.find_nodes(op="call_module", target="0")[0]
    plain = edit.insert_function(gm, torch.ops.aten.contiguous.default, layer, (layer,))
    size = [-1, 64] if reader is torch.ops.aten.view.default else 1
    read = edit.insert_function(gm, reader, plain, (plain, size))
    edit.replace_uses(layer, read, except_=(plain,))
    edit.finish(gm)
    result = Canonicalize()(gm)
    assert result.modified != stays
    assert (torch.ops.aten.contiguous.default in functions(result.graph_module)) == stays
    image = torch.randn(3, 3, 4, 4).to(memory_format=torch.channels_last)
    assert torch.equal(result.graph_module(image), gm(image))


@pytest.mark.parametrize(("end", "goes"), [(2, False), (2**63 - 1, True)])
def test_a_slice_as_long_as_the_example_batch_is_no_identity_at_others(end: int, goes: bool) -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    layer = gm.graph.find_nodes(op="call_module", target="0")[0]
    part = edit.insert_function(gm, torch.ops.aten.slice.Tensor, layer, (layer, 0, 0, end))
    edit.replace_uses(layer, part)
    edit.finish(gm)
    result = Canonicalize()(gm)
    assert result.modified == goes
    x = torch.randn(5, 3)
    assert torch.equal(result.graph_module(x), gm(x))


def test_dead_code_goes() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    layer = gm.graph.find_nodes(op="call_module", target="0")[0]
    dead = edit.insert_function(gm, torch.ops.aten.exp.default, layer, (layer,))
    edit.insert_function(gm, torch.ops.aten.neg.default, dead, (dead,))
    gm.recompile()
    for node in gm.graph.nodes:
        node.meta.setdefault("val", layer.meta["val"])
    result = Canonicalize()(gm)
    assert result.modified
    assert functions(result.graph_module) == []
    assert functions(gm) != []


@pytest.mark.parametrize("function", [lambda x: x.clone(), lambda x: x * 1, lambda x: x + 0])
def test_a_copy_of_an_input_that_is_given_back_stays(function: Function) -> None:
    class Copies(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return function(x), function(torch.relu(x))

    gm = trace(Copies(), torch.randn(2, 3))
    result = Canonicalize()(gm).graph_module
    x = torch.randn(2, 3)
    kept = x.clone()
    first, second = result(x)
    first.zero_()
    assert torch.equal(x, kept)
    assert torch.equal(second, torch.relu(kept))
    assert len(functions(result)) == 2


def test_copies_stay_where_the_graph_writes_in_place() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            old = self.count.clone()
            self.count.add_(1)
            return x + old + self.count

    example = torch.randn(2, 3)
    gm = trace(Writes(), example)
    result = Canonicalize(for_inference=True)(gm).graph_module
    result.count.zero_()
    assert torch.equal(result(example), example + 1)
    assert torch.equal(result(example), example + 1 + 2)


# Constants.


def folded(gm: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in gm.named_buffers() if name.startswith("folded_constant")}


def test_what_depends_on_constants_alone_becomes_a_buffer_outside_the_state() -> None:
    def function(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + (m.table * torch.tensor([1.0, 2.0, 3.0, 4.0])).exp().view(4, 1, 1)

    gm, result, calls = between(function)
    assert [node.target for node in calls] == [torch.ops.aten.add.Tensor]
    (constant,) = folded(result).values()
    assert torch.equal(constant.flatten(), (gm.table * torch.tensor([1.0, 2.0, 3.0, 4.0])).exp())
    assert torch.equal(result.table, gm.table)


def test_parameters_are_folded_for_inference_only() -> None:
    function = lambda m, x: x * m.gain.exp()  # noqa: E731
    gm, result, _ = between(function)
    assert result is gm
    _, result, calls = between(function, for_inference=True)
    assert len(calls) == 1
    assert len(folded(result)) == 1


def test_equal_constants_become_one_and_others_do_not() -> None:
    def function(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.arange(4.0).view(4, 1, 1)
        x = x + torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1)
        return x - torch.tensor([0.0, 1.0, 2.0, 4.0]).view(4, 1, 1)

    _, result, calls = between(function)
    assert len(calls) == 3
    assert len(folded(result)) == 2
    assert calls[0].args[1] is calls[1].args[1]
    assert calls[2].args[1] is not calls[1].args[1]


def test_large_constants_are_left_to_run_time() -> None:
    function = lambda m, x: x + torch.arange(4.0).view(4, 1, 1).expand(4, 4, 4)  # noqa: E731
    _, result, calls = between(function, max_constant_elements=63)
    assert [tuple(value.shape) for value in folded(result).values()] == [(4, 1, 1)]
    assert len(calls) == 2
    gm, result, _ = between(function, max_constant_elements=0)
    assert result is gm


def test_statistics_that_a_module_updates_are_no_constants() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm.running_mean.exp()

    gm = trace(Reads().eval(), torch.randn(2, 3))
    assert not Canonicalize()(gm).modified
    assert Canonicalize(for_inference=True)(gm).modified


def test_a_constant_that_is_given_back_is_computed_each_time() -> None:
    class Gives(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, torch.arange(3.0) * 2

    result = Canonicalize()(trace(Gives(), torch.randn(2, 3))).graph_module
    result(torch.randn(2, 3))[1].zero_()
    assert torch.equal(result(torch.randn(2, 3))[1], torch.tensor([0.0, 2.0, 4.0]))


def test_folding_follows_a_move_to_another_type() -> None:
    _, result, _ = between(lambda m, x: x + torch.arange(4.0).view(4, 1, 1).sqrt())
    assert all(value.dtype == torch.float64 for value in folded(result.double()).values())


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match="max_constant_elements"):
        Canonicalize(max_constant_elements=-1)


# All of it, on random networks.


@settings(max_examples=5)
@given(network=networks())
def test_random_networks_compute_the_same_to_the_bit(network: Cnn | Transformer) -> None:
    gm, example = traced(network)
    for step in (Canonicalize(), Canonicalize(for_inference=True)):
        result = step(gm)
        assert_equivalent(gm, result.graph_module, example, relative=0.0, batch=3)
        assert not step(result.graph_module).modified
        assert list(result.graph_module.state_dict()) == list(gm.state_dict())
        assert result.modified == (result.graph_module is not gm)


def test_gradients_are_the_same() -> None:
    gm, example = traced(Cnn(("residual", "gated"), 4, "flatten", True, "relu", 0))
    node = gm.graph.find_nodes(op="call_module", target="classifier")[0]
    assert node is not None
    result = Canonicalize()(gm).graph_module
    for graph in (gm, result):
        graph.zero_grad()
        graph(example).square().sum().backward()
        gradients = {name: value.grad.clone() for name, value in graph.named_parameters()}
        if graph is gm:
            expected = gradients
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in gradients)
