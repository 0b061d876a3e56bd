"""Tracing: what a traced model computes, holds and gives back is what the model does, in both modes, at any batch."""

from __future__ import annotations

import copy
import dataclasses
import pickle  # noqa: TID251 (what torch gives for a graph is looked at)
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.export import Dim

from fxopt.errors import TraceError
from fxopt.graph import trace, verify
from fxopt.graph.edit import fork
from fxopt.graph.shapes import TRACE_META
from tests.graph.checks import Calls, assert_same, assert_traced, image, rows, run, small
from tests.strategies import Cnn, Transformer, networks

# Example inputs.


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.embed = nn.Embedding(7, 4)

    def forward(self, x: Tensor, index: Tensor | None = None, *, scale: Tensor | float = 1.0) -> Tensor:
        y = self.linear(x) * scale
        return y if index is None else y + self.embed(index)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    "example",
    [
        lambda batch: rows(batch),
        lambda batch: (rows(batch),),
        lambda batch: [rows(batch), torch.arange(batch)],
        lambda batch: {"x": rows(batch)},
        lambda batch: {"index": torch.arange(batch), "x": rows(batch)},
        lambda batch: ((rows(batch),), {"scale": rows(batch)}),
        lambda batch: ((rows(batch), None), {"scale": 2.0}),
    ],
)
def test_every_form_of_example_inputs(example: Callable[[int], Any], batch: int) -> None:
    gm = assert_traced(Inputs().eval(), example(batch), example(5))
    assert gm.meta[TRACE_META]["batch"] == max(batch, 2)


def test_nested_and_keyword_only_inputs() -> None:
    class Net(nn.Module):
        def forward(self, *, parts: dict[str, Any], more: list[Tensor]) -> Tensor:
            return parts["a"] * parts["b"][0] + more[0]

    def example(batch: int) -> Any:
        return {"parts": {"a": rows(batch), "b": (rows(batch),)}, "more": [rows(batch)]}

    assert_traced(Net(), example(2), example(4))


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


@pytest.mark.parametrize(
    "pack",
    [
        lambda x: (x, x + 1),
        lambda x: [x, (x + 1, x)],
        lambda x: {"logits": x, "more": [x + 1, None, 3]},
        lambda x: OrderedDict(second=x + 1, first=x),
        lambda x: Pair(x, (x + 1,)),
        lambda x: (x[:, :2], x.sum()),
    ],
)
def test_the_structure_of_outputs_is_kept(pack: Callable[[Tensor], Any]) -> None:
    model = Calls(lambda self, x: pack(self.linear(x)), linear=nn.Linear(4, 4))
    assert_traced(model, rows(2), rows(5))


def test_a_dataclass_as_output() -> None:
    model = Calls(lambda self, x: Output(self.linear(x), (x, x * 2)), linear=nn.Linear(4, 4))
    gm = trace(model, rows(2))
    x = rows(3)
    found, expected = gm(x), model(x)
    assert type(found) is Output
    assert_same(found.logits, expected.logits)
    assert_same(found.hidden, expected.hidden)
    assert gm.meta[TRACE_META] == {"batch": 2, "dynamic_batch": True}


def test_a_loop_over_the_batch_is_traced_at_a_fixed_batch() -> None:
    model = Calls(lambda self, x: torch.stack([self.linear(row) for row in x]), linear=nn.Linear(4, 4))
    gm = assert_traced(model, rows(3), rows(3), dynamic=False)
    assert gm.meta[TRACE_META] == {"batch": 3, "dynamic_batch": False}


def test_a_graph_of_fixed_batch_refuses_others() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return torch.stack([x[row] * (row + 1) for row in range(x.shape[0])]) * scale

    gm = trace(Loop(), {"x": torch.randn(3, 4), "scale": torch.randn(4)})
    x, scale = torch.randn(3, 4), torch.randn(4)
    for graph in (gm, copy.deepcopy(gm), fork(gm)):
        assert torch.equal(graph(x=x, scale=scale), Loop()(x, scale))
        with pytest.raises(TraceError, match=r"at a batch of 3.*got 5 samples"):
            graph(x=torch.randn(5, 4), scale=scale)


# Doors.


def test_graph_modules_enter_by_the_same_door() -> None:
    model = small().eval()
    symbolic = fx.symbolic_trace(model)
    captured: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        captured.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: F.relu(x * 2.0).sum(1), backend=backend)(rows(2))
    assert_traced(symbolic, image(2), image(3))
    verify(trace(captured[0], rows(2)))
    assert_same(trace(captured[0], rows(2))(rows(3).fill_(1.0)), (torch.full((3,), 8.0),))


def test_a_traced_graph_comes_back_as_it_is() -> None:
    gm = trace(small(), image(2))
    nodes = [(node.name, node.op, node.target, node.args) for node in gm.graph.nodes]
    assert trace(gm) is gm
    assert trace(gm, image(7)) is gm
    assert [(node.name, node.op, node.target, node.args) for node in gm.graph.nodes] == nodes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_keeps_its_mode(training: bool, dynamic: bool) -> None:
    model = nn.Sequential(small(), nn.Dropout(0.4)).train(training)
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    gm = trace(torch.export.export(model, (image(2),), dynamic_shapes=shapes))
    verify(gm)
    assert gm.training is training
    assert {type(module): module.training for module in gm.modules()}[nn.BatchNorm2d] is training
    assert gm.meta[TRACE_META] == {"batch": 2, "dynamic_batch": dynamic}
    x = image(4 if dynamic else 2)
    assert_same(run(gm, x), run(model, x))
    assert_same(run(gm.eval(), x), run(model.eval(), x))
    assert {name for name in gm.state_dict() if "num_batches" not in name} <= set(model.state_dict())


def test_a_frozen_norm_in_a_program_of_train_mode_stays_frozen() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    model[0].eval()
    gm = trace(torch.export.export(model, (image(2),)))
    assert [gm.get_submodule(name).training for name in ("0", "2")] == [False, True]


# State, gradients and statistics.


@settings(max_examples=6)
@given(networks())
def test_training_goes_as_the_models_own(network: Cnn | Transformer) -> None:
    model, example = network.build()
    twin = copy.deepcopy(model).train()
    gm = trace(model.train(), example)
    assert gm.training
    for net in (gm, twin):
        run(net, example).square().sum().backward()
    expected = dict(twin.named_parameters())
    for name, parameter in gm.named_parameters():
        assert parameter is model.get_parameter(name)
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0.0, atol=0.0)
    assert_same(dict(gm.state_dict()), dict(twin.state_dict()))
    assert_same(run(gm.eval(), example), run(twin.eval(), example))


def test_the_mode_of_every_module_is_kept() -> None:
    model = small().train()
    model[1].eval()
    gm = trace(model, image(2))
    assert {name: module.training for name, module in gm.named_modules()} == {
        name: module.training for name, module in model.named_modules()
    }


def test_tensors_and_their_names_are_the_models_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.unused = nn.Linear(2, 2)
            self.register_buffer("shift", torch.randn(4))
            self.register_buffer("hidden", torch.randn(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x) + self.shift * self.hidden)

    model = Net()
    gm = assert_traced(model, torch.tensor([[1], [2]]), torch.tensor([[3], [4], [6]]))
    assert gm.head.weight is gm.embed.weight is model.embed.weight
    assert "hidden" in dict(gm.named_buffers())
    assert "hidden" not in gm.state_dict()
    with torch.no_grad():
        model.hidden.add_(1.0)
    assert_same(gm(torch.tensor([[5]])), model(torch.tensor([[5]])))


def test_what_is_shared_stays_shared() -> None:
    linear = nn.Linear(4, 4)
    twice = Calls(lambda self, x: self.one(torch.relu(self.one(x))), one=linear)
    names = Calls(lambda self, x: self.two(torch.relu(self.one(x))), one=linear, two=linear)
    functional = Calls(lambda self, x: F.linear(self.one(x), self.one.weight.t()), one=linear)
    for model in (twice, names, functional):
        assert_traced(model, rows(2), rows(3))


def test_a_functional_layer_becomes_a_module_where_its_parameters_stand() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, padding=1, groups=1) * 2

    gm = assert_traced(nn.Sequential(Own(3, 4, 3)), image(2), image(3))
    (call,) = gm.graph.find_nodes(op="call_module")
    assert call.target == "0"
    assert type(gm.get_submodule("0")) is nn.Conv2d


def test_mutated_buffers_are_mutated_by_the_call_alone() -> None:
    def count(self: Any, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return (x - self.mean) * self.count

    model = Calls(count, count=torch.zeros(()), mean=torch.zeros(4))
    gm = trace(model, rows(2))
    assert float(model.count) == 0.0
    assert not model.mean.any()
    twin = copy.deepcopy(model)
    for batch in (3, 2, 5):
        x = rows(batch)
        assert_same(gm(x), twin(x))
    assert float(gm.count) == float(model.count) == 3.0


def on_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x).clone()
    y[:, 0] = 0.0
    y[:, 1:3] += x[:, 1:3]
    y.view(-1).mul_(2.0)
    return y


def on_the_input(self: Any, x: Tensor) -> Tensor:
    x.mul_(2.0)
    return self.linear(x).relu_().add_(x)


def read_before_and_after(self: Any, x: Tensor) -> Tensor:
    y = self.linear(x)
    z = y * 2
    y.add_(1)
    return y + z


@pytest.mark.parametrize("function", [on_a_view, on_the_input, read_before_and_after])
def test_in_place_operators(function: Callable[..., Tensor]) -> None:
    assert_traced(Calls(function, linear=nn.Linear(4, 4)), rows(2), rows(5))


def test_in_place_modules_leave_the_users_own_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)).eval()
    gm = assert_traced(model, image(2), image(3))
    assert model[1].inplace
    assert not gm.get_submodule("1").inplace


# Copies.


def test_a_deep_copy_is_silent_and_computes_the_same() -> None:
    gm = trace(nn.Sequential(small(), nn.Dropout(0.5)).eval(), image(2))
    twin = copy.deepcopy(gm)
    verify(twin)
    x = image(3)
    assert_same(twin(x), gm(x))
    assert twin.meta == gm.meta
    assert [node.meta["val"].shape for node in twin.graph.nodes if node.op != "output"] == [
        node.meta["val"].shape for node in gm.graph.nodes if node.op != "output"
    ]
    assert trace(twin) is twin
    with torch.no_grad():
        twin.get_parameter("0.0.weight").zero_()
    assert gm.get_parameter("0.0.weight").any()
    assert_same(copy.deepcopy(nn.Sequential(gm))(x), gm(x))


def test_a_deep_copy_keeps_ties_and_structure() -> None:
    linear = nn.Linear(4, 4)
    model = Calls(lambda self, x: {"out": self.two(self.one(x))}, one=linear, two=linear)
    twin = copy.deepcopy(trace(model, rows(2)))
    assert twin.get_parameter("one.weight") is twin.get_parameter("two.weight")
    assert twin.get_parameter("one.weight") is not linear.weight
    x = rows(3)
    assert_same(twin(x), model(x))


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_pickles_compute_the_same() -> None:
    gm = trace(small().eval(), image(2))
    x = image(3)
    assert_same(pickle.loads(pickle.dumps(gm))(x), gm(x))


def test_a_state_dict_moves_between_model_and_graph(tmp_path: Any) -> None:
    model = small().eval()
    other = small().eval()
    gm = trace(other, image(2))
    torch.save(model.state_dict(), tmp_path / "weights.pt")  # noqa: TID251
    gm.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))  # noqa: TID251
    x = image(3)
    assert_same(gm(x), model(x))
    assert_same(other(x), model(x))
