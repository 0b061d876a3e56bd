"""Shape propagation: what it finds is what the model gives, and it writes to nothing of the model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxopt.errors import VerifyError
from fxopt.graph import edit, propagate, shape, trace, values_at_batch
from tests.graph.checks import Calls, image, rows
from tests.strategies import Cnn, Transformer, networks, traced


class Recorder(fx.Interpreter):
    """Runs a graph on real tensors and keeps the shape and type of every value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.found[n] = pytree.tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), value)
        return value


def recorded(gm: fx.GraphModule, example: Tensor) -> dict[fx.Node, Any]:
    recorder = Recorder(gm)
    with torch.no_grad():
        recorder.run(example, enable_io_processing=False)
    return recorder.found


@settings(max_examples=5)
@given(networks(), st.integers(1, 5))
def test_values_are_those_of_a_run(network: Cnn | Transformer, batch: int) -> None:
    gm, example = traced(network)
    for size, values in ((2, {node: node.meta["val"] for node in gm.graph.nodes}), (batch, values_at_batch(gm, batch))):
        samples = example[:1].repeat(size, *[1] * (example.dim() - 1))
        for node, expected in recorded(gm, samples).items():
            assert all(isinstance(leaf, FakeTensor | int | float) for leaf in pytree.tree_leaves(values[node]))
            found = pytree.tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), values[node])
            assert node.op == "output" or pytree.tree_leaves(found) == pytree.tree_leaves(expected), node


def test_values_at_another_batch_leave_the_graph_alone() -> None:
    gm = trace(nn.Sequential(nn.Linear(4, 3)), rows(2))
    before = {node: node.meta["val"] for node in gm.graph.nodes}
    values = values_at_batch(gm, 7)
    assert [tuple(value.shape) for value in values.values() if isinstance(value, Tensor)] == [(7, 4), (7, 3)]
    assert all(node.meta["val"] is value for node, value in before.items())
    assert values_at_batch(gm, 2) == before


def test_no_tensor_of_the_model_is_written_to() -> None:
    def count(self: Any, x: Tensor) -> Tensor:
        self.count.add_(1)
        return self.norm(x) * self.count

    state = {"count": torch.zeros(()), "norm": nn.BatchNorm1d(4)}
    model = Calls(count, **state).train()
    gm = trace(model, rows(2))
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict().items()}
    propagate(gm)
    values_at_batch(gm, 5)
    edit.finish(gm)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor._version == before[name][1]
    assert gm.training
    assert model.norm.training


def test_a_parameter_that_was_resized_is_seen() -> None:
    gm = trace(nn.Sequential(nn.Linear(4, 3)), rows(2))
    linear = gm.get_submodule("0")
    linear.weight.data = torch.zeros(5, 4)
    linear.bias.data = torch.zeros(5)
    propagate(gm)
    assert shape(gm.graph.output_node().all_input_nodes[0]) == (2, 5)


def test_modules_can_compute_while_shapes_are_found() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))).train()
    gm = trace(model, rows(2))
    failures: list[BaseException] = []
    done = threading.Event()

    def compute() -> None:
        x = rows(3)
        try:
            while not done.is_set():
                assert type(model(x)) is Tensor
                assert all(module.training for module in model.modules())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=compute)
    thread.start()
    for _ in range(5):
        propagate(gm)
    done.set()
    thread.join()
    assert not failures


def test_types_and_several_inputs() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            return x.double() + 1, index > 2

    gm = trace(Net(), (rows(3), torch.arange(3)))
    assert [str(node.meta["val"].dtype) for node in gm.graph.output_node().all_input_nodes] == [
        "torch.float64",
        "torch.bool",
    ]


def test_hooks_and_structures_of_the_graph_are_no_hindrance() -> None:
    gm = trace(Calls(lambda self, x: {"a": (x * 2, [x])}), rows(2))
    propagate(gm)
    assert shape(gm.graph.find_nodes(op="placeholder")[0]) == (2, 4)


def test_what_is_no_tensor_has_no_shape() -> None:
    gm = trace(nn.Linear(4, 4), rows(2))
    with pytest.raises(VerifyError, match=r"Node 'output' has no tensor value; run fxopt.graph.propagate"):
        shape(gm.graph.output_node())


def test_an_input_without_a_value_is_named() -> None:
    gm = trace(nn.Linear(4, 4), rows(2))
    (entry,) = gm.graph.find_nodes(op="placeholder")
    del entry.meta["val"]
    with pytest.raises(VerifyError, match=f"Input '{entry.name}' has no fake value; make the graph with fxopt.trace"):
        propagate(gm)


def test_a_node_that_does_not_fit_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    gm = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), image(2))
    edit.replace_module(gm, "0", nn.Conv2d(3, 6, 3))
    with pytest.raises(
        VerifyError, match=r"Node '_1' \(call_module 1\) does not fit its inputs: .*6 channels"
    ) as caught:
        propagate(gm)
    assert caught.value.node == "_1"
    assert capfd.readouterr() == ("", "")


def test_a_fixed_batch_is_replaced_in_views() -> None:
    def loop(self: Any, x: Tensor) -> Tensor:
        steps = [row.sum() for row in x]
        return self.linear(x.view(x.shape[0], 2, 2).flatten(1)) + steps[0]

    gm = trace(Calls(loop, linear=nn.Linear(4, 4)), rows(3))
    assert not gm.meta["fxopt"]["dynamic_batch"]
    for batch in (3, 5):
        values = values_at_batch(gm, batch)
        assert [tuple(values[node].shape) for node in gm.graph.output_node().all_input_nodes] == [(batch, 4)]


class Pairs(nn.Module):
    """Takes the two samples of its batch apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.layer(x).unbind(0)
        return torch.stack((left, right))


def test_a_model_of_one_batch_says_so_when_asked_for_another() -> None:
    gm = trace(Pairs().eval(), torch.randn(2, 4))
    assert values_at_batch(gm, 2)
    with pytest.raises(VerifyError, match="at a batch of 2 only, and costs are asked for at 1"):
        values_at_batch(gm, 1)
